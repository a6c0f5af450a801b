# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the DiT's norms and their gradients. All are bound by memory: every input is
read once, every output written once. Arithmetic is fp32.

Vectors of the modulation (scale, shift, gate) are [B, C]. A kernel gets the strides of all
dimensions but the last, whose elements are next to each other.

Prefixes: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
"""

import triton
import triton.language as tl


@triton.jit
def _normalise(b_x, m_c, C, eps):
    """(x - mean) / sqrt(variance + eps) of one row b_x [BLOCK], fp32; two passes over registers, so
    that no square of the mean cancels."""
    mean = tl.sum(b_x, 0) / C
    b_x = tl.where(m_c, b_x - mean, 0.0)
    variance = tl.sum(b_x * b_x, 0) / C
    return b_x * (1.0 / tl.sqrt(variance + eps))


@triton.jit
def modulated_norm(
    p_x,
    p_scale,
    p_shift,
    p_out,
    S,
    C,
    x_batch,
    x_row,
    scale_batch,
    shift_batch,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [B, S, C] -> LayerNorm(x) * (1 + scale) + shift, [B, S, C]. A program keeps scale and shift
    in registers over ROWS rows.

    Grid (ceil(S / ROWS), B); BLOCK >= C, a power of two.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0)  # [BLOCK]
    b_scale = 1.0 + b_scale.to(tl.float32)
    b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0)
    b_shift = b_shift.to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, S)
    for i_row in range(first, last):
        p_row = p_x + i_batch * x_batch + i_row * x_row + o_c
        b_x = tl.load(p_row, m_c, 0.0).to(tl.float32)
        b_y = _normalise(b_x, m_c, C, eps) * b_scale + b_shift
        p_row = p_out + (i_batch * S + i_row) * C + o_c
        b_out = b_y.to(p_out.dtype.element_ty)
        tl.store(p_row, b_out, m_c)


@triton.jit
def gated_add_norm(
    p_x,
    p_branch,
    p_gate,
    p_scale,
    p_shift,
    p_y,
    p_out,
    S,
    C,
    x_batch,
    x_row,
    branch_batch,
    branch_row,
    gate_batch,
    scale_batch,
    shift_batch,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, branch [B, S, C] -> y = x + gate * branch, rounded to the dtype of y, and with NORM also
    out = LayerNorm(y) * (1 + scale) + shift.

    Without NORM p_scale, p_shift and p_out are not read or written. Grid and BLOCK as in
    `modulated_norm`.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_gate = tl.load(p_gate + i_batch * gate_batch + o_c, m_c, 0.0)  # [BLOCK]
    b_gate = b_gate.to(tl.float32)
    if NORM:
        b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0)  # [BLOCK]
        b_scale = 1.0 + b_scale.to(tl.float32)
        b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0)
        b_shift = b_shift.to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, S)
    for i_row in range(first, last):
        p_row = p_x + i_batch * x_batch + i_row * x_row + o_c
        b_x = tl.load(p_row, m_c, 0.0).to(tl.float32)
        p_row = p_branch + i_batch * branch_batch + i_row * branch_row + o_c
        b_branch = tl.load(p_row, m_c, 0.0).to(tl.float32)
        b_y = (b_x + b_gate * b_branch).to(p_y.dtype.element_ty)
        o_out = (i_batch * S + i_row) * C + o_c
        tl.store(p_y + o_out, b_y, m_c)
        if NORM:
            b_out = _normalise(b_y.to(tl.float32), m_c, C, eps) * b_scale + b_shift
            p_row = p_out + o_out
            b_out = b_out.to(p_out.dtype.element_ty)
            tl.store(p_row, b_out, m_c)


@triton.jit
def _row(p_token, axis, m_token, positions):
    """The row of the rotary tables that each token [tokens, 1, 1] reads for the pairs of an axis,
    held inside of the tables, because nobody has waited for the GPU to check the positions."""
    o_row = tl.load(p_token + axis, m_token, 0)
    return tl.minimum(tl.maximum(o_row, 0), positions - 1)


@triton.jit
def _angles(
    p_cos,
    p_sin,
    p_positions,
    positions,
    o_token,
    m_token,
    D,
    first_pair,
    second_pair,
    AXES: tl.constexpr,
    VECTOR: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cos and sin of the rotary angle of every token [TURN, 1, 1] and pair, fp32
    [TURN, HEADS, BLOCK / 2] each, the same for every head.

    p_positions int32 [S, AXES] says which row of the tables p_cos and p_sin fp32
    [positions, D / 2] a token reads for the pairs of each axis. VECTOR, a power of two, divides
    D / 2 and the pairs at which axes begin: so many pairs lie side by side in one row.
    """
    o_pair = tl.arange(0, BLOCK // 2)[None, None]
    p_token = p_positions + o_token * AXES
    o_row = _row(p_token, 0, m_token, positions)  # [tokens, 1, 1]
    if AXES > 1:
        o_second = _row(p_token, 1, m_token, positions)
        o_row = tl.where(o_pair < first_pair, o_row, o_second)  # [tokens, 1, BLOCK / 2]
    if AXES > 2:
        o_third = _row(p_token, 2, m_token, positions)
        o_row = tl.where(o_pair < second_pair, o_row, o_third)
    o_angle = o_row.to(tl.int64) * (D // 2) + o_pair  # [tokens, 1, BLOCK / 2]
    o_angle = tl.max_contiguous(tl.multiple_of(o_angle, [1, 1, VECTOR]), [1, 1, VECTOR])
    # The heads are in the addresses, so that a lane reads the angles of its own numbers.
    o_angle = tl.broadcast_to(o_angle, [TURN, HEADS, BLOCK // 2])
    m_angle = tl.broadcast_to(m_token & (o_pair < D // 2), [TURN, HEADS, BLOCK // 2])
    b_cos = tl.load(p_cos + o_angle, m_angle, 0.0)
    b_sin = tl.load(p_sin + o_angle, m_angle, 0.0)
    return b_cos, b_sin


@triton.jit
def _rotated(b_y, b_cos, b_sin, TURN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs of neighbours of b_y [TURN, HEADS, BLOCK], turned by angles [.., BLOCK / 2]."""
    b_even, b_odd = tl.split(tl.reshape(b_y, [TURN, HEADS, BLOCK // 2, 2]))
    b_left = b_even * b_cos - b_odd * b_sin  # [TURN, HEADS, BLOCK / 2]
    b_right = b_even * b_sin + b_odd * b_cos
    return tl.reshape(tl.join(b_left, b_right), [TURN, HEADS, BLOCK])


@triton.jit(do_not_specialize=["positions"])
def norm_rope(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_positions,
    p_offsets,
    p_y,
    p_means,
    positions,
    S,
    H,
    N,
    D,
    first_pair,
    second_pair,
    x_batch,
    x_token,
    x_head,
    eps,
    AXES: tl.constexpr,
    VECTOR: tl.constexpr,
    MEANS: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RMSNorm of each head, rotation of adjacent pairs, and with MEANS the mean of every block of
    tokens.

    x [B, S, H, D] -> y [B, S, H, D], means fp32 [B, H, N, D]. A program takes HEADS heads, which
    divide H, of one block of tokens, TURN of them at a time. Lanes lie along the channels of a head
    and then along heads, warps along tokens: nothing passes between warps before the means. Pairs
    from first_pair on belong to the second of AXES axes, from second_pair on to the third; 0 axes:
    no rotation. Without MEANS blocks are TOKENS long. Grid (blocks, H / HEADS, B); BLOCK >= D, a
    power of two; VECTOR as in `_angles`.
    """
    i_block = tl.program_id(0)
    i_batch = tl.program_id(2).to(tl.int64)
    o_head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[None, :, None]
    o_d = tl.arange(0, BLOCK)[None, None]
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)  # [1, 1, BLOCK]
    if MEANS:
        # held inside of the S tokens, because nobody has waited for the GPU to check the offsets
        first = tl.maximum(tl.load(p_offsets + i_block), 0)
        last = tl.minimum(tl.load(p_offsets + i_block + 1), S)
    else:
        first = i_block * TOKENS
        last = tl.minimum(i_block * TOKENS + TOKENS, S)
    b_sum = tl.zeros([TURN, HEADS, BLOCK], tl.float32)
    o_x = i_batch * x_batch + o_head * x_head + o_d
    o_y = i_batch * S * H * D + o_head * D + o_d
    for start in range(first, last, TURN):
        o_token = (start + tl.arange(0, TURN))[:, None, None]
        m_token = o_token < last
        o_token = o_token.to(tl.int64)
        m_tile = m_token & m_d
        b_x = tl.load(p_x + (o_token * x_token + o_x), m_tile, 0.0).to(
            tl.float32
        )  # [TURN, HEADS, BLOCK]
        if AXES > 0:
            b_cos, b_sin = _angles(
                p_cos,
                p_sin,
                p_positions,
                positions,
                o_token,
                m_token,
                D,
                first_pair,
                second_pair,
                AXES,
                VECTOR,
                TURN,
                HEADS,
                BLOCK,
            )
        b_square = tl.sum(b_x * b_x, 2, keep_dims=True) / D  # [TURN, HEADS, 1]
        b_y = b_x * tl.rsqrt(b_square + eps) * b_weight
        if AXES > 0:
            b_y = _rotated(b_y, b_cos, b_sin, TURN, HEADS, BLOCK)
        b_y = b_y.to(p_y.dtype.element_ty)
        tl.store(p_y + (o_token * (H * D) + o_y), b_y, m_tile)
        if MEANS:
            b_sum += tl.where(m_token, b_y.to(tl.float32), 0.0)
    if MEANS:
        b_mean = tl.sum(b_sum, 0, keep_dims=True) / (last - first)  # [1, HEADS, BLOCK]
        p_means += (i_batch * H * N + o_head * N + i_block) * D + o_d
        tl.store(p_means, b_mean, m_d)


@triton.jit
def _normalise_backward(b_x, b_grad, m_c, C, eps):
    """A row b_x [BLOCK], normalised, and its gradient, from the gradient b_grad of the normalised
    row. Both are fp32 [BLOCK]; the mean and the projection on the row leave the gradient because
    the norm removes them from the row."""
    mean = tl.sum(b_x, 0) / C
    b_x = tl.where(m_c, b_x - mean, 0.0)
    variance = tl.sum(b_x * b_x, 0) / C
    inverse = 1.0 / tl.sqrt(variance + eps)
    b_normed = b_x * inverse
    b_centred = b_grad - tl.sum(b_grad, 0) / C
    projection = tl.sum(b_grad * b_normed, 0) / C
    return b_normed, inverse * (b_centred - b_normed * projection)


@triton.jit
def modulated_norm_backward(
    p_x,
    p_scale,
    p_grad,
    p_grad_x,
    p_sums,
    S,
    C,
    x_batch,
    x_row,
    scale_batch,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of x [B, S, C] from that of `modulated_norm`'s result, grad, which is
    contiguous; and this program's part of the gradients of scale and shift, fp32
    [B, programs, 2, C].

    Programs do not add to one sum, so that results have the same bits every time. Grid and BLOCK
    as in `modulated_norm`.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0)  # [BLOCK]
    b_scale = 1.0 + b_scale.to(tl.float32)
    b_of_scale = tl.zeros([BLOCK], tl.float32)
    b_of_shift = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, S)
    for i_row in range(first, last):
        p_row = p_x + i_batch * x_batch + i_row * x_row + o_c
        b_x = tl.load(p_row, m_c, 0.0).to(tl.float32)
        p_row = p_grad + (i_batch * S + i_row) * C + o_c
        b_grad = tl.load(p_row, m_c, 0.0).to(tl.float32)
        b_normed, b_grad_x = _normalise_backward(b_x, b_grad * b_scale, m_c, C, eps)
        b_of_scale += b_grad * b_normed
        b_of_shift += b_grad
        p_row = p_grad_x + (i_batch * S + i_row) * C + o_c
        b_grad_x = b_grad_x.to(p_grad_x.dtype.element_ty)
        tl.store(p_row, b_grad_x, m_c)
    i_program = i_batch * tl.num_programs(0) + tl.program_id(0)
    p_sum = p_sums + i_program * 2 * C + o_c
    tl.store(p_sum, b_of_scale, m_c)
    tl.store(p_sum + C, b_of_shift, m_c)


@triton.jit
def gated_add_norm_backward(
    p_y,
    p_branch,
    p_gate,
    p_scale,
    p_grad_y,
    p_grad_normed,
    p_grad_x,
    p_grad_branch,
    p_sums,
    S,
    C,
    y_batch,
    y_row,
    branch_batch,
    branch_row,
    gate_batch,
    scale_batch,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of x and branch [B, S, C] from those of `gated_add_norm`'s results; and this
    program's part of the gradients of gate, scale and shift, fp32 [B, programs, 3, C].

    ADD: y, which is used beside its norm, has a gradient of its own, grad_y. Gradients are
    contiguous. Grid and BLOCK as in `modulated_norm`.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_gate = tl.load(p_gate + i_batch * gate_batch + o_c, m_c, 0.0)  # [BLOCK]
    b_gate = b_gate.to(tl.float32)
    b_scale = tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0)  # [BLOCK]
    b_scale = 1.0 + b_scale.to(tl.float32)
    b_of_gate = tl.zeros([BLOCK], tl.float32)
    b_of_scale = tl.zeros([BLOCK], tl.float32)
    b_of_shift = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, S)
    for i_row in range(first, last):
        o_row = (i_batch * S + i_row) * C + o_c
        p_row = p_y + i_batch * y_batch + i_row * y_row + o_c
        b_y = tl.load(p_row, m_c, 0.0).to(tl.float32)
        b_grad = tl.load(p_grad_normed + o_row, m_c, 0.0).to(tl.float32)
        b_normed, b_grad_x = _normalise_backward(b_y, b_grad * b_scale, m_c, C, eps)
        b_of_scale += b_grad * b_normed
        b_of_shift += b_grad
        if ADD:
            b_grad_x += tl.load(p_grad_y + o_row, m_c, 0.0).to(tl.float32)
        p_row = p_branch + i_batch * branch_batch + i_row * branch_row + o_c
        b_branch = tl.load(p_row, m_c, 0.0).to(tl.float32)
        b_of_gate += b_grad_x * b_branch
        tl.store(p_grad_x + o_row, b_grad_x.to(p_grad_x.dtype.element_ty), m_c)
        b_grad_branch = b_grad_x * b_gate
        p_row = p_grad_branch + o_row
        b_grad_branch = b_grad_branch.to(p_grad_branch.dtype.element_ty)
        tl.store(p_row, b_grad_branch, m_c)
    i_program = i_batch * tl.num_programs(0) + tl.program_id(0)
    p_sum = p_sums + i_program * 3 * C + o_c
    tl.store(p_sum, b_of_gate, m_c)
    tl.store(p_sum + C, b_of_scale, m_c)
    tl.store(p_sum + 2 * C, b_of_shift, m_c)


@triton.jit(do_not_specialize=["positions"])
def norm_rope_backward(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_positions,
    p_grad,
    p_grad_x,
    p_sums,
    positions,
    S,
    H,
    D,
    first_pair,
    second_pair,
    x_batch,
    x_token,
    x_head,
    eps,
    AXES: tl.constexpr,
    VECTOR: tl.constexpr,
    TURN: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of x [B, S, H, D] from that of `norm_rope`'s result, grad, which is contiguous;
    and this program's part of the gradient of weight, fp32 [programs, D].

    The gradient is rotated back first. A program takes TOKENS tokens, TURN at a time, and HEADS
    heads. Grid (ceil(S / TOKENS), H / HEADS, B); the rest as in `norm_rope`.
    """
    i_batch = tl.program_id(2).to(tl.int64)
    o_head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[None, :, None]
    o_d = tl.arange(0, BLOCK)[None, None]
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)  # [1, 1, BLOCK]
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, S)
    b_sum = tl.zeros([TURN, HEADS, BLOCK], tl.float32)
    p_x += i_batch * x_batch + o_head * x_head + o_d
    p_grad += i_batch * S * H * D + o_head * D + o_d
    p_grad_x += i_batch * S * H * D + o_head * D + o_d
    for start in range(first, last, TURN):
        o_token = (start + tl.arange(0, TURN))[:, None, None]
        m_token = o_token < last
        o_token = o_token.to(tl.int64)
        m_tile = m_token & m_d
        o_row = o_token * (H * D)
        b_grad = tl.load(p_grad + o_row, m_tile, 0.0).to(tl.float32)  # [TURN, HEADS, BLOCK]
        b_x = tl.load(p_x + o_token * x_token, m_tile, 0.0).to(tl.float32)
        if AXES > 0:
            b_cos, b_sin = _angles(
                p_cos,
                p_sin,
                p_positions,
                positions,
                o_token,
                m_token,
                D,
                first_pair,
                second_pair,
                AXES,
                VECTOR,
                TURN,
                HEADS,
                BLOCK,
            )
            b_grad = _rotated(b_grad, b_cos, -b_sin, TURN, HEADS, BLOCK)
        b_square = tl.sum(b_x * b_x, 2, keep_dims=True) / D  # [TURN, HEADS, 1]
        b_inverse = tl.rsqrt(b_square + eps)
        b_normed = b_x * b_inverse
        b_sum += b_grad * b_normed
        b_grad = b_grad * b_weight
        b_projection = tl.sum(b_grad * b_normed, 2, keep_dims=True) / D  # [TURN, HEADS, 1]
        b_grad = b_inverse * (b_grad - b_normed * b_projection)
        tl.store(p_grad_x + o_row, b_grad.to(p_grad_x.dtype.element_ty), m_tile)
    i_program = i_batch * tl.num_programs(1) + tl.program_id(1)
    i_program = i_program * tl.num_programs(0) + tl.program_id(0)
    b_sum = tl.sum(tl.sum(b_sum, 0, keep_dims=True), 1, keep_dims=True)  # [1, 1, BLOCK]
    tl.store(p_sums + i_program * D + o_d, b_sum, m_d)
