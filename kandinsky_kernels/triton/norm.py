# SPDX-License-Identifier: Apache-2.0
"""Norms on GPUs. All are bound by memory: every input is read once, every output written once,
arithmetic is fp32.

Locals: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
"""

import triton
import triton.language as tl


@triton.jit
def _normalise(b_x, m_c, C, eps):
    """(x - mean) / sqrt(variance + eps) of one row; two passes over registers, so that no square of
    the mean cancels."""
    mean = tl.sum(b_x, 0) / C
    b_x = tl.where(m_c, b_x - mean, 0.0)
    return b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / C + eps))


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
    """x [B, S, C] -> LayerNorm(x) * (1 + scale) + shift. A program keeps scale and shift in
    registers over ROWS rows.

    Grid (ceil(S / ROWS), B); BLOCK >= C, a power of two.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_scale = 1.0 + tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i_row in range(first, tl.minimum(first + ROWS, S)):
        b_x = tl.load(p_x + i_batch * x_batch + i_row * x_row + o_c, m_c, 0.0).to(tl.float32)
        b_y = _normalise(b_x, m_c, C, eps) * b_scale + b_shift
        tl.store(p_out + (i_batch * S + i_row) * C + o_c, b_y.to(p_out.dtype.element_ty), m_c)


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
    """y = x + gate * branch, rounded, and with NORM also the modulated norm of y. Grid and BLOCK as
    in `modulated_norm`."""
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_gate = tl.load(p_gate + i_batch * gate_batch + o_c, m_c, 0.0).to(tl.float32)
    if NORM:
        b_scale = 1.0 + tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0).to(tl.float32)
        b_shift = tl.load(p_shift + i_batch * shift_batch + o_c, m_c, 0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i_row in range(first, tl.minimum(first + ROWS, S)):
        b_x = tl.load(p_x + i_batch * x_batch + i_row * x_row + o_c, m_c, 0.0).to(tl.float32)
        b_branch = tl.load(
            p_branch + i_batch * branch_batch + i_row * branch_row + o_c, m_c, 0.0
        ).to(tl.float32)
        b_y = (b_x + b_gate * b_branch).to(p_y.dtype.element_ty)
        p_row = (i_batch * S + i_row) * C + o_c
        tl.store(p_y + p_row, b_y, m_c)
        if NORM:
            b_out = _normalise(b_y.to(tl.float32), m_c, C, eps) * b_scale + b_shift
            tl.store(p_out + p_row, b_out.to(p_out.dtype.element_ty), m_c)


@triton.jit
def _angles(
    p_cos,
    p_sin,
    p_positions,
    o_token,
    m_token,
    D,
    first_pair,
    second_pair,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cos and sin of every token's angle for every pair, [tokens, BLOCK / 2]."""
    o_half = tl.arange(0, BLOCK // 2)
    o_row = tl.load(p_positions + o_token * AXES, m_token, 0)[:, None]
    if AXES > 1:
        o_row = tl.where(
            (o_half < first_pair)[None],
            o_row,
            tl.load(p_positions + o_token * AXES + 1, m_token, 0)[:, None],
        )
    if AXES > 2:
        o_row = tl.where(
            (o_half < second_pair)[None],
            o_row,
            tl.load(p_positions + o_token * AXES + 2, m_token, 0)[:, None],
        )
    o_angle = o_row * (D // 2) + o_half[None]
    m_angle = m_token[:, None] & (o_half < D // 2)[None]
    return tl.load(p_cos + o_angle, m_angle, 0.0), tl.load(p_sin + o_angle, m_angle, 0.0)


@triton.jit
def norm_rope(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_positions,
    p_offsets,
    p_y,
    p_means,
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
    MEANS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RMSNorm of each head, rotation of adjacent pairs, and with MEANS the mean of every block of
    tokens.

    x [B, S, H, D] -> y [B, S, H, D], means fp32 [B, H, N, D]. A program takes one block of tokens
    (TOKENS of them at a time) and HEADS heads. Pairs from first_pair on belong to the second of
    AXES axes, from second_pair on to the third; 0 axes: no rotation. Without MEANS blocks are
    TOKENS long. Grid (blocks, ceil(H / HEADS), B); BLOCK >= D, a power of two.
    """
    i_block, i_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)
    if MEANS:
        # inside of the S tokens: nobody waited for the offsets to check them
        first = tl.maximum(tl.load(p_offsets + i_block), 0)
        last = tl.minimum(tl.load(p_offsets + i_block + 1), S)
    else:
        first, last = i_block * TOKENS, tl.minimum(i_block * TOKENS + TOKENS, S)
    for i_head in range(tl.program_id(1) * HEADS, tl.minimum(tl.program_id(1) * HEADS + HEADS, H)):
        b_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(first, last, TOKENS):
            o_token = (start + tl.arange(0, TOKENS)).to(tl.int64)
            m_token = o_token < last
            m_tile = m_token[:, None] & m_d[None]
            o_x = i_batch * x_batch + o_token[:, None] * x_token + i_head * x_head + o_d[None]
            b_x = tl.load(p_x + o_x, m_tile, 0.0).to(tl.float32)  # [TOKENS, BLOCK]
            b_y = b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps))[:, None] * b_weight[None]
            if AXES > 0:
                b_cos, b_sin = _angles(
                    p_cos,
                    p_sin,
                    p_positions,
                    o_token,
                    m_token,
                    D,
                    first_pair,
                    second_pair,
                    AXES,
                    BLOCK,
                )
                b_even, b_odd = tl.split(tl.reshape(b_y, [TOKENS, BLOCK // 2, 2]))
                b_y = tl.reshape(
                    tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos),
                    [TOKENS, BLOCK],
                )
            b_y = b_y.to(p_y.dtype.element_ty)
            tl.store(
                p_y + ((i_batch * S + o_token[:, None]) * H + i_head) * D + o_d[None], b_y, m_tile
            )
            if MEANS:
                b_sum += tl.sum(tl.where(m_tile, b_y.to(tl.float32), 0.0), 0)
        if MEANS:
            tl.store(
                p_means + ((i_batch * H + i_head) * N + i_block) * D + o_d,
                b_sum / (last - first),
                m_d,
            )


@triton.jit
def _normalise_backward(b_x, b_grad, m_c, C, eps):
    """(the normalised row, the gradient of the row) for the gradient b_grad of the normalised
    row."""
    mean = tl.sum(b_x, 0) / C
    b_x = tl.where(m_c, b_x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / C + eps)
    b_normed = b_x * inverse
    return b_normed, inverse * (
        b_grad - tl.sum(b_grad, 0) / C - b_normed * (tl.sum(b_grad * b_normed, 0) / C)
    )


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
    """Gradient of x; and this program's part of those of scale and shift, fp32 [B, programs, 2, C].
    grad is contiguous. Grid as above."""
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_scale = 1.0 + tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0).to(tl.float32)
    b_of_scale, b_of_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i_row in range(first, tl.minimum(first + ROWS, S)):
        b_x = tl.load(p_x + i_batch * x_batch + i_row * x_row + o_c, m_c, 0.0).to(tl.float32)
        b_grad = tl.load(p_grad + (i_batch * S + i_row) * C + o_c, m_c, 0.0).to(tl.float32)
        b_normed, b_grad_x = _normalise_backward(b_x, b_grad * b_scale, m_c, C, eps)
        b_of_scale += b_grad * b_normed
        b_of_shift += b_grad
        tl.store(
            p_grad_x + (i_batch * S + i_row) * C + o_c, b_grad_x.to(p_grad_x.dtype.element_ty), m_c
        )
    p_sum = p_sums + (i_batch * tl.num_programs(0) + tl.program_id(0)) * 2 * C + o_c
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
    """Gradients of x and branch; and this program's part of those of gate, scale and shift, fp32
    [B, programs, 3, C].

    ADD: y has a gradient of its own. Gradients are contiguous. Grid as above.
    """
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_gate = tl.load(p_gate + i_batch * gate_batch + o_c, m_c, 0.0).to(tl.float32)
    b_scale = 1.0 + tl.load(p_scale + i_batch * scale_batch + o_c, m_c, 0.0).to(tl.float32)
    b_of_gate = tl.zeros([BLOCK], tl.float32)
    b_of_scale, b_of_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i_row in range(first, tl.minimum(first + ROWS, S)):
        o_row = (i_batch * S + i_row) * C + o_c
        b_y = tl.load(p_y + i_batch * y_batch + i_row * y_row + o_c, m_c, 0.0).to(tl.float32)
        b_grad = tl.load(p_grad_normed + o_row, m_c, 0.0).to(tl.float32)
        b_normed, b_grad_x = _normalise_backward(b_y, b_grad * b_scale, m_c, C, eps)
        b_of_scale += b_grad * b_normed
        b_of_shift += b_grad
        if ADD:
            b_grad_x += tl.load(p_grad_y + o_row, m_c, 0.0).to(tl.float32)
        b_of_gate += b_grad_x * tl.load(
            p_branch + i_batch * branch_batch + i_row * branch_row + o_c, m_c, 0.0
        ).to(tl.float32)
        tl.store(p_grad_x + o_row, b_grad_x.to(p_grad_x.dtype.element_ty), m_c)
        tl.store(p_grad_branch + o_row, (b_grad_x * b_gate).to(p_grad_branch.dtype.element_ty), m_c)
    p_sum = p_sums + (i_batch * tl.num_programs(0) + tl.program_id(0)) * 3 * C + o_c
    tl.store(p_sum, b_of_gate, m_c)
    tl.store(p_sum + C, b_of_scale, m_c)
    tl.store(p_sum + 2 * C, b_of_shift, m_c)


@triton.jit
def norm_rope_backward(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_positions,
    p_grad,
    p_grad_x,
    p_sums,
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
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of x; and this program's part of that of weight, fp32 [programs, D]. grad is
    contiguous; the rest as in `norm_rope`.

    A program takes TOKENS tokens and HEADS heads.
    """
    i_batch = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)
    o_token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    m_token = o_token < S
    m_tile = m_token[:, None] & m_d[None]
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_head in range(tl.program_id(1) * HEADS, tl.minimum(tl.program_id(1) * HEADS + HEADS, H)):
        o_row = ((i_batch * S + o_token[:, None]) * H + i_head) * D + o_d[None]
        b_grad = tl.load(p_grad + o_row, m_tile, 0.0).to(tl.float32)  # [TOKENS, BLOCK]
        if AXES > 0:
            b_cos, b_sin = _angles(
                p_cos, p_sin, p_positions, o_token, m_token, D, first_pair, second_pair, AXES, BLOCK
            )
            b_even, b_odd = tl.split(tl.reshape(b_grad, [TOKENS, BLOCK // 2, 2]))
            b_grad = tl.reshape(
                tl.join(b_even * b_cos + b_odd * b_sin, b_odd * b_cos - b_even * b_sin),
                [TOKENS, BLOCK],
            )
        b_x = tl.load(
            p_x + i_batch * x_batch + o_token[:, None] * x_token + i_head * x_head + o_d[None],
            m_tile,
            0.0,
        ).to(tl.float32)
        b_inverse = (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps))[:, None]
        b_normed = b_x * b_inverse
        b_sum += tl.sum(b_grad * b_normed, 0)
        b_grad = b_grad * b_weight[None]
        b_grad = b_inverse * (b_grad - b_normed * (tl.sum(b_grad * b_normed, 1) / D)[:, None])
        tl.store(p_grad_x + o_row, b_grad.to(p_grad_x.dtype.element_ty), m_tile)
    i_program = (i_batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(
        0
    ) + tl.program_id(0)
    tl.store(p_sums + i_program * D + o_d, b_sum, m_d)
