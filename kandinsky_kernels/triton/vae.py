# SPDX-License-Identifier: Apache-2.0
"""The video VAE on GPUs: group norm in two passes over memory, attention over whole earlier frames,
and convolution.

Locals: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
"""

import triton
import triton.language as tl


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
    """Mean and sum of squared differences from it, fp64 [B, T, slabs, GROUPS], of every SLAB pixels
    of a frame of x [B, T, Y, X, BLOCK].

    Sums are in fp32 around the mean of the slab's first ROWS pixels, SLAB / ROWS terms long, and in
    fp64 between channels. Grid (slabs, T, B); BLOCK and GROUPS are powers of two.
    """
    i_slab, i_frame, i_batch = (
        tl.program_id(0),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    o_pixel, o_c, o_g = (
        i_slab * SLAB + tl.arange(0, ROWS),
        tl.arange(0, BLOCK),
        tl.arange(0, GROUPS),
    )
    p_frame = p_x + i_batch * x_batch + i_frame * x_frame
    count = tl.minimum(SLAB, pixels - i_slab * SLAB)
    o_x = (o_pixel // X).to(tl.int64) * x_row + (o_pixel % X).to(tl.int64) * x_pixel
    b_x = tl.load(p_frame + o_x[:, None] + o_c[None], (o_pixel < pixels)[:, None], 0.0).to(
        tl.float32
    )
    b_pivot = tl.sum(b_x, 0) / tl.minimum(ROWS, count)
    b_pivot = tl.where(tl.abs(b_pivot) < float("inf"), b_pivot, 0.0)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_square = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(0, SLAB, ROWS):
        m_pixel = o_pixel < pixels
        o_x = (o_pixel // X).to(tl.int64) * x_row + (o_pixel % X).to(tl.int64) * x_pixel
        b_x = tl.load(p_frame + o_x[:, None] + o_c[None], m_pixel[:, None], 0.0).to(tl.float32)
        b_x = tl.where(m_pixel[:, None], b_x - b_pivot[None], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
        o_pixel += ROWS
    b_offset = tl.sum(b_sum, 0).to(tl.float64) / count  # [BLOCK]
    b_spread = tl.sum(b_square, 0).to(tl.float64) - b_offset * b_offset * count
    b_mean = tl.reshape(b_pivot.to(tl.float64) + b_offset, [GROUPS, BLOCK // GROUPS])
    b_middle = tl.sum(b_mean, 1) / (BLOCK // GROUPS)  # [GROUPS]
    b_away = b_mean - b_middle[:, None]
    b_spread = tl.sum(tl.reshape(b_spread, [GROUPS, BLOCK // GROUPS]) + b_away * b_away * count, 1)
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
    """The slabs of every frame, MANY at a time and in order: mean and variance, fp64 [frames,
    GROUPS, 2]. width: channels of a group.

    Grid (frames,); one order of summation for every frame, however many there are.
    """
    i_frame = tl.program_id(0).to(tl.int64)
    o_g, o_s = tl.arange(0, GROUPS), tl.arange(0, MANY)
    p_mean += i_frame * slabs * GROUPS
    p_spread += i_frame * slabs * GROUPS
    b_mean = tl.zeros([GROUPS], tl.float64)
    for start in range(0, slabs, MANY):
        o_slab = start + o_s
        m_slab = o_slab < slabs
        b_count = tl.where(m_slab, tl.minimum(SLAB, pixels - o_slab * SLAB), 0).to(tl.float64)
        b_part = tl.load(p_mean + o_slab[:, None] * GROUPS + o_g[None], m_slab[:, None], 0.0)
        b_mean += tl.sum(b_part * b_count[:, None], 0)
    b_mean = b_mean / pixels
    b_spread = tl.zeros([GROUPS], tl.float64)
    for start in range(0, slabs, MANY):
        o_slab = start + o_s
        m_slab = o_slab < slabs
        b_count = (
            tl.where(m_slab, tl.minimum(SLAB, pixels - o_slab * SLAB), 0).to(tl.float64) * width
        )
        b_away = (
            tl.load(p_mean + o_slab[:, None] * GROUPS + o_g[None], m_slab[:, None], 0.0)
            - b_mean[None]
        )
        b_part = tl.load(p_spread + o_slab[:, None] * GROUPS + o_g[None], m_slab[:, None], 0.0)
        b_spread += tl.sum(
            b_part + tl.where(m_slab[:, None], b_away * b_away * b_count[:, None], 0.0), 0
        )
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
    """silu(x * scale + shift) of x [B, T, Y, X, C], gathered with clamped coordinates into [B, T +
    2 PAD, Y + 2 PAD, X + 2 PAD, C].

    FRONT: the first two frames are copied from p_front [B, 2, Y + 2, X + 2, C]. Grid (tiles of ROWS
    pixels, frames of the output, B); BLOCK >= C, a power of two.
    """
    i_out, i_batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_pixel, o_c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    area = (Y + 2 * PAD) * (X + 2 * PAD)
    o_y, o_x, m_c = o_pixel // (X + 2 * PAD), o_pixel % (X + 2 * PAD), o_c < C
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
        tl.store(p_o, tl.load(p_front + o_in[:, None] + o_c[None], m_tile), m_tile)
    else:
        i_frame = tl.maximum(i_out - 2 * PAD, 0).to(tl.int64)
        o_from_y = tl.minimum(tl.maximum(o_y - PAD, 0), Y - 1).to(tl.int64)
        o_from_x = tl.minimum(tl.maximum(o_x - PAD, 0), X - 1).to(tl.int64)
        o_from = i_batch * x_batch + i_frame * x_frame + o_from_y * x_row + o_from_x * x_pixel
        b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0).to(tl.float32)
        b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0).to(tl.float32)
        b_y = (
            tl.load(p_x + o_from[:, None] + o_c[None], m_tile, 0.0).to(tl.float32) * b_scale[None]
            + b_shift[None]
        )
        if SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        tl.store(p_o, b_y.to(p_out.dtype.element_ty), m_tile)


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
    """softmax(scale query key^T) value over a prefix of the keys, `keys` tokens a frame, online and
    in base 2; out, natural log-sum-exp.

    Grid (blocks of ROWS queries, T, B), latest frames first because they are the longest. BLOCK >=
    D, a power of two; WHOLE: they are equal. Products over D go DEPTH at a time, so that the keys
    need few registers beside the sums of a head as wide as the channels.
    """
    i_frame, i_batch = (T - 1 - tl.program_id(1)).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_row = tl.program_id(0) * ROWS
    o_row, o_key, o_d, o_depth = (
        tl.arange(0, ROWS),
        tl.arange(0, KEYS),
        tl.arange(0, BLOCK),
        tl.arange(0, DEPTH),
    )
    m_row = i_row + o_row < P
    p_q = p_query + i_batch * q_batch + i_frame * q_frame + i_row.to(tl.int64) * q_token
    p_k, p_v = p_key + i_batch * k_batch, p_value + i_batch * v_batch
    o_q, o_k = o_row[:, None] * q_token + o_depth[None], o_key[None] * k_token + o_depth[:, None]
    o_v = o_key[:, None] * v_token + o_d[None]
    k_step, v_step = tl.full([], KEYS, tl.int64) * k_token, tl.full([], KEYS, tl.int64) * v_token

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
            b_query, b_key = tl.load(p_q + d + o_q, m_q, 0.0), tl.load(p_k + d + o_k, m_k, 0.0)
            b_logit = tl.dot(b_query, b_key, b_logit, input_precision=PRECISION)
        b_logit = tl.where(m_key[None], b_logit * scale_log2, -float("inf"))
        b_max, b_old = tl.maximum(b_max, tl.max(b_logit, 1)), b_max
        b_decay = tl.exp2(b_old - b_max)
        b_share = tl.exp2(b_logit - b_max[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_share, 1)
        m_v = m_key[:, None] if WHOLE else m_key[:, None] & (o_d < D)[None]
        b_value = tl.load(p_v + o_v, m_v, 0.0)
        b_out = tl.dot(
            b_share.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION
        )
        p_k += k_step
        p_v += v_step

    b_out = b_out / b_sum[:, None]
    i_out = (i_batch * T + i_frame) * P + i_row
    m_out = m_row[:, None] if WHOLE else m_row[:, None] & (o_d < D)[None]
    tl.store(
        p_out + i_out * D + (o_row[:, None] * D + o_d[None]),
        b_out.to(p_out.dtype.element_ty),
        m_out,
    )
    tl.store(p_lse + i_out + o_row, (b_max + tl.log2(b_sum)) * 0.6931471805599453, m_row)


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
    """Convolution of x [B, T + KT - 1, ., ., C] with weight [N, KT, KY, KX, C] as a product of
    matrices: out [B, T', Y, X, N].

    A row is a pixel of the result, a column one of its channels; the sum runs over taps and, DEPTH
    at a time, their channels, in one loop, so that the next operands are under way whatever tap
    they belong to. Grid (tiles of ROWS x COLUMNS, T', B), tiles of one row of pixels after each
    other, which read the same input. WHOLE: DEPTH divides C and COLUMNS divides N.
    """
    columns = tl.cdiv(N, COLUMNS)
    i_frame, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
    o_n, o_c = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    m_row, m_n = o_row < Y * X, o_n < N
    o_x = (o_row // X * SY).to(tl.int64) * x_row + (o_row % X * SX).to(tl.int64) * x_pixel
    p_x += i_batch * x_batch + i_frame * ST * x_frame
    p_in, p_w = (
        p_x + o_x[:, None] + o_c[None],
        p_weight + o_n.to(tl.int64)[None] * (KT * KY * KX * C) + o_c[:, None],
    )

    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    parts = tl.cdiv(C, DEPTH)
    for i in range(0, KT * KY * KX * parts):
        i_tap, i_c = i // parts, i % parts * DEPTH
        o_tap = (
            (i_tap // (KY * KX)).to(tl.int64) * x_frame
            + (i_tap // KX % KY).to(tl.int64) * x_row
            + (i_tap % KX).to(tl.int64) * x_pixel
        )
        m_c = o_c < C - i_c
        m_in = m_row[:, None] if WHOLE else m_row[:, None] & m_c[None]
        b_x = tl.load(p_in + (o_tap + i_c), m_in, 0.0)
        b_weight = (
            tl.load(p_w + (i_tap * C + i_c))
            if WHOLE
            else tl.load(p_w + (i_tap * C + i_c), m_c[:, None] & m_n[None], 0.0)
        )
        b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)

    if BIAS:
        b_out += tl.load(p_bias + o_n, m_n, 0.0).to(tl.float32)[None]
    T = tl.num_programs(1)
    p_o = p_out + ((i_batch * T + i_frame) * Y * X + o_row)[:, None] * N + o_n[None]
    tl.store(
        p_o,
        b_out.to(p_out.dtype.element_ty),
        m_row[:, None] if WHOLE else m_row[:, None] & m_n[None],
    )
