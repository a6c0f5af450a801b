# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the video VAE: group norm in two passes over memory, attention over whole
earlier frames, and causal convolution.

Activations are [B, T, Y, X, C]; a kernel gets the strides of all dimensions but the last, whose
elements are next to each other. Frames and samples are counted in int64, because a video has more
than 2^31 elements.

Prefixes: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
"""

import triton
import triton.language as tl


@triton.jit
def _pixel_offsets(o_pixel, X, row, pixel):
    """Where pixels, counted over a frame's rows of X, begin in a frame with these strides."""
    return (o_pixel // X).to(tl.int64) * row + (o_pixel % X).to(tl.int64) * pixel


@triton.jit
def slab_moments(
    p_x,
    p_mean,
    p_spread,
    T,
    pixels,
    X,
    slabs,
    x_batch,
    x_frame,
    x_row,
    x_pixel,
    SLAB: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of the group norm: x [B, T, Y, X, BLOCK] -> for every slab of SLAB pixels of a
    frame the mean of each group, and the sum of squared differences from it, fp64
    [B, T, slabs, GROUPS] each.

    Each thread adds up SLAB / ROWS terms in fp32, around the mean of the slab's first ROWS pixels,
    so that no square of a large mean cancels; channels are joined in fp64. Grid (slabs, T, B);
    BLOCK and GROUPS are powers of two.
    """
    i_slab = tl.program_id(0)
    i_frame = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    o_pixel = i_slab * SLAB + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK)
    o_g = tl.arange(0, GROUPS)
    p_frame = p_x + i_batch * x_batch + i_frame * x_frame
    count = tl.minimum(SLAB, pixels - i_slab * SLAB)
    o_in = _pixel_offsets(o_pixel, X, x_row, x_pixel)
    p_first = p_frame + o_in[:, None] + o_c[None]
    m_first = (o_pixel < pixels)[:, None]
    b_x = tl.load(p_first, m_first, 0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_pivot = tl.sum(b_x, 0) / tl.minimum(ROWS, count)  # [BLOCK]
    # around an infinite pivot an infinite mean would become NaN
    b_pivot = tl.where(tl.abs(b_pivot) < float("inf"), b_pivot, 0.0)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_square = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(0, SLAB, ROWS):
        m_pixel = o_pixel < pixels
        o_in = _pixel_offsets(o_pixel, X, x_row, x_pixel)
        p_in = p_frame + o_in[:, None] + o_c[None]
        b_x = tl.load(p_in, m_pixel[:, None], 0.0).to(tl.float32)
        b_x = tl.where(m_pixel[:, None], b_x - b_pivot[None], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
        o_pixel += ROWS
    b_offset = tl.sum(b_sum, 0).to(tl.float64) / count  # [BLOCK]
    b_spread = tl.sum(b_square, 0).to(tl.float64) - b_offset * b_offset * count
    b_mean = tl.reshape(b_pivot.to(tl.float64) + b_offset, [GROUPS, BLOCK // GROUPS])
    b_middle = tl.sum(b_mean, 1) / (BLOCK // GROUPS)  # [GROUPS]
    b_away = b_mean - b_middle[:, None]  # [GROUPS, BLOCK // GROUPS]
    b_parts = tl.reshape(b_spread, [GROUPS, BLOCK // GROUPS])
    b_spread = tl.sum(b_parts + b_away * b_away * count, 1)  # [GROUPS]
    o_out = ((i_batch * T + i_frame) * slabs + i_slab) * GROUPS + o_g
    tl.store(p_mean + o_out, b_middle)
    tl.store(p_spread + o_out, b_spread)


@triton.jit
def join_moments(
    p_mean,
    p_spread,
    p_moments,
    pixels,
    slabs,
    width,
    SLAB: tl.constexpr,
    GROUPS: tl.constexpr,
    MANY: tl.constexpr,
):
    """Joins what `slab_moments` found of the slabs of a frame: mean and variance of each group,
    fp64 [frames, GROUPS, 2]. A group has `width` channels.

    Slabs are added MANY at a time and in order, so that the result of a frame does not depend on
    how many frames there are. Grid (frames,).
    """
    i_frame = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, GROUPS)
    o_s = tl.arange(0, MANY)
    p_mean += i_frame * slabs * GROUPS
    p_spread += i_frame * slabs * GROUPS
    b_mean = tl.zeros([GROUPS], tl.float64)
    for start in range(0, slabs, MANY):
        o_slab = start + o_s
        m_slab = o_slab < slabs
        b_pixels = tl.minimum(SLAB, pixels - o_slab * SLAB)
        b_count = tl.where(m_slab, b_pixels, 0).to(tl.float64)
        p_part = p_mean + o_slab[:, None] * GROUPS + o_g[None]
        b_part = tl.load(p_part, m_slab[:, None], 0.0)  # [MANY, GROUPS]
        b_mean += tl.sum(b_part * b_count[:, None], 0)
    b_mean = b_mean / pixels
    b_spread = tl.zeros([GROUPS], tl.float64)
    for start in range(0, slabs, MANY):
        o_slab = start + o_s
        m_slab = o_slab < slabs
        b_pixels = tl.minimum(SLAB, pixels - o_slab * SLAB)
        b_count = tl.where(m_slab, b_pixels, 0).to(tl.float64) * width
        p_away = p_mean + o_slab[:, None] * GROUPS + o_g[None]
        b_away = tl.load(p_away, m_slab[:, None], 0.0) - b_mean[None]  # [MANY, GROUPS]
        p_within = p_spread + o_slab[:, None] * GROUPS + o_g[None]
        b_within = tl.load(p_within, m_slab[:, None], 0.0)
        b_between = tl.where(m_slab[:, None], b_away * b_away * b_count[:, None], 0.0)
        b_spread += tl.sum(b_within + b_between, 0)
    p_moments += (i_frame * GROUPS + o_g) * 2
    tl.store(p_moments, b_mean)
    tl.store(p_moments + 1, b_spread / pixels / width)


@triton.jit
def group_norm_silu(
    p_x,
    p_front,
    p_scale,
    p_shift,
    p_out,
    T,
    Y,
    X,
    C,
    x_batch,
    x_frame,
    x_row,
    x_pixel,
    front_batch,
    front_frame,
    front_row,
    front_pixel,
    scale_batch,
    shift_batch,
    FRONT: tl.constexpr,
    PAD: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass of the group norm: silu(x * scale + shift) of x [B, T, Y, X, C], written with the
    edges of the next convolution, which repeat the nearest pixel and the first frame:
    [B, T + 2 PAD, Y + 2 PAD, X + 2 PAD, C]. scale and shift are [B, C].

    FRONT: the first two frames are copied from p_front [B, 2, Y + 2, X + 2, C] instead, which a
    streamed decoder kept of the frames before. Grid (tiles of ROWS pixels, frames of the output,
    B); BLOCK >= C, a power of two.
    """
    i_out = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    o_pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK)
    area = (Y + 2 * PAD) * (X + 2 * PAD)
    o_y = o_pixel // (X + 2 * PAD)
    o_x = o_pixel % (X + 2 * PAD)
    m_c = o_c < C
    m_tile = (o_pixel < area)[:, None] & m_c[None]
    i_pixel = (i_batch * (T + 2 * PAD) + i_out) * area + o_pixel
    p_o = p_out + i_pixel[:, None] * C + o_c[None]
    if FRONT and i_out < 2:
        o_in = (
            i_batch * front_batch
            + i_out.to(tl.int64) * front_frame
            + o_y.to(tl.int64) * front_row
            + o_x.to(tl.int64) * front_pixel
        )
        b_front = tl.load(p_front + o_in[:, None] + o_c[None], m_tile)  # [ROWS, BLOCK]
        tl.store(p_o, b_front, m_tile)
    else:
        i_frame = tl.maximum(i_out - 2 * PAD, 0).to(tl.int64)
        o_from_y = tl.minimum(tl.maximum(o_y - PAD, 0), Y - 1).to(tl.int64)
        o_from_x = tl.minimum(tl.maximum(o_x - PAD, 0), X - 1).to(tl.int64)
        o_from = i_batch * x_batch + i_frame * x_frame + o_from_y * x_row + o_from_x * x_pixel
        b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0)  # [BLOCK]
        b_scale = b_scale.to(tl.float32)
        b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0)
        b_shift = b_shift.to(tl.float32)
        b_x = tl.load(p_x + o_from[:, None] + o_c[None], m_tile, 0.0)  # [ROWS, BLOCK]
        b_y = b_x.to(tl.float32) * b_scale[None] + b_shift[None]
        if SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        b_y = b_y.to(p_out.dtype.element_ty)
        tl.store(p_o, b_y, m_tile)


@triton.jit(do_not_specialize=["first_frame"])
def frame_causal_attention(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    T,
    P,
    keys,
    first_frame,
    D,
    q_batch,
    q_frame,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    scale_log2,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """softmax(scale query key^T) value, where a query attends to all tokens of its own and of
    earlier frames; the softmax is online and in base 2.

    query [B, T, P, D], key and value [B, frames * keys, D] with `keys` tokens a frame; query frame
    t is frame first_frame + t of them. -> out [B, T, P, D] and the natural log-sum-exp fp32
    [B, T, P].

    Grid (blocks of ROWS queries, T, B), latest frames first because they are the longest. BLOCK >=
    D, a power of two; WHOLE: they are equal. Products over D go DEPTH at a time, so that the keys
    need few registers beside the sums of a head as wide as the channels.
    """
    i_frame = (T - 1 - tl.program_id(1)).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = tl.program_id(0) * ROWS
    o_row = tl.arange(0, ROWS)
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, BLOCK)
    o_depth = tl.arange(0, DEPTH)
    m_row = i_row + o_row < P
    p_q = p_query + i_batch * q_batch + i_frame * q_frame + i_row.to(tl.int64) * q_token
    p_k = p_key + i_batch * k_batch
    p_v = p_value + i_batch * v_batch
    o_q = o_row[:, None] * q_token + o_depth[None]  # [ROWS, DEPTH]
    o_k = o_key[None] * k_token + o_depth[:, None]  # [DEPTH, KEYS]
    o_v = o_key[:, None] * v_token + o_d[None]  # [KEYS, BLOCK]
    k_step = tl.full([], KEYS, tl.int64) * k_token
    v_step = tl.full([], KEYS, tl.int64) * v_token

    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK], tl.float32)
    seen = (first_frame + i_frame.to(tl.int32) + 1) * keys
    for start in range(0, seen, KEYS):
        m_key = start + o_key < seen
        b_logit = tl.zeros([ROWS, KEYS], tl.float32)
        for d in tl.static_range(0, BLOCK, DEPTH):
            m_depth = d + o_depth < D
            m_q = m_row[:, None] if WHOLE else m_row[:, None] & m_depth[None]
            m_k = m_key[None] if WHOLE else m_key[None] & m_depth[:, None]
            b_query = tl.load(p_q + d + o_q, m_q, 0.0)
            b_key = tl.load(p_k + d + o_k, m_k, 0.0)
            b_logit = tl.dot(b_query, b_key, b_logit, input_precision=PRECISION)
        b_logit = tl.where(m_key[None], b_logit * scale_log2, -float("inf"))
        b_old = b_max
        b_max = tl.maximum(b_max, tl.max(b_logit, 1))
        b_decay = tl.exp2(b_old - b_max)
        b_share = tl.exp2(b_logit - b_max[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_share, 1)
        m_v = m_key[:, None] if WHOLE else m_key[:, None] & (o_d < D)[None]
        b_value = tl.load(p_v + o_v, m_v, 0.0)
        b_share = b_share.to(b_value.dtype)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_share, b_value, b_out, input_precision=PRECISION)
        p_k += k_step
        p_v += v_step

    b_out = b_out / b_sum[:, None]
    i_out = (i_batch * T + i_frame) * P + i_row
    m_out = m_row[:, None] if WHOLE else m_row[:, None] & (o_d < D)[None]
    p_o = p_out + i_out * D + (o_row[:, None] * D + o_d[None])
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_o, b_out, m_out)
    p_l = p_lse + i_out + o_row
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453  # ln 2
    tl.store(p_l, b_lse, m_row)


@triton.jit
def causal_conv3d(
    p_x,
    p_weight,
    p_bias,
    p_out,
    Y,
    X,
    C,
    N,
    x_batch,
    x_frame,
    x_row,
    x_pixel,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    KT: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
    ST: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Convolution of x [B, T', Y', X', C], which has its edges, with weight [N, KT, KY, KX, C] and
    strides (ST, SY, SX), as a product of matrices: out [B, T, Y, X, N].

    A row is a pixel of the result, a column one of its channels; the sum runs over taps and, DEPTH
    at a time, their channels, in one loop, so that the next operands are under way whatever tap
    they belong to. Grid (tiles of ROWS x COLUMNS, T, B), tiles of one row of pixels after each
    other, which read the same input. WHOLE: DEPTH divides C and COLUMNS divides N.
    """
    columns = tl.cdiv(N, COLUMNS)
    i_frame = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    o_row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    o_n = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    o_c = tl.arange(0, DEPTH)
    m_row = o_row < Y * X
    m_n = o_n < N
    o_y = (o_row // X * SY).to(tl.int64) * x_row
    o_x = (o_row % X * SX).to(tl.int64) * x_pixel
    o_in = o_y + o_x
    p_x += i_batch * x_batch + i_frame * ST * x_frame
    p_in = p_x + o_in[:, None] + o_c[None]  # [ROWS, DEPTH]
    o_filter = o_n.to(tl.int64)[None] * (KT * KY * KX * C)
    p_w = p_weight + o_filter + o_c[:, None]  # [DEPTH, COLUMNS]

    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    parts = tl.cdiv(C, DEPTH)
    for i in range(0, KT * KY * KX * parts):
        i_tap = i // parts
        i_c = i % parts * DEPTH
        o_tap_t = (i_tap // (KY * KX)).to(tl.int64) * x_frame
        o_tap_y = (i_tap // KX % KY).to(tl.int64) * x_row
        o_tap_x = (i_tap % KX).to(tl.int64) * x_pixel
        o_tap = o_tap_t + o_tap_y + o_tap_x
        m_c = o_c < C - i_c
        m_in = m_row[:, None] if WHOLE else m_row[:, None] & m_c[None]
        b_x = tl.load(p_in + (o_tap + i_c), m_in, 0.0)
        p_tap = p_w + (i_tap * C + i_c)
        m_w = m_c[:, None] & m_n[None]
        b_weight = tl.load(p_tap) if WHOLE else tl.load(p_tap, m_w, 0.0)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)

    if BIAS:
        b_out += tl.load(p_bias + o_n, m_n, 0.0).to(tl.float32)[None]
    T = tl.num_programs(1)
    i_pixel = (i_batch * T + i_frame) * Y * X + o_row
    p_o = p_out + i_pixel[:, None] * N + o_n[None]  # [ROWS, COLUMNS]
    b_out = b_out.to(p_out.dtype.element_ty)
    m_out = m_row[:, None] if WHOLE else m_row[:, None] & m_n[None]
    tl.store(p_o, b_out, m_out)
