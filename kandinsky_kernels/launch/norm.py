# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels for the DiT's norms and their gradients.

Each returns what the operator of its name returns. `rows`, where a launcher takes it, is how many
rows a program of the grid goes through, by default what `tuning` chooses for the sequence: a trial
on a small input passes the number of the caller's binary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tuning
from .._library import attach, on
from .trials import Draw, alike, block_ends


def refuse_norm(x: Tensor, *_) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    if not x.numel():
        return "there is nothing to compute"
    if x.shape[-1] <= 16384:
        return None
    return f"rows of {x.shape[-1]} channels do not fit into registers, 16384 do"


def launch_modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: int | None = None
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift of x [B, S, C], with scale and shift [B, C]."""
    from ..triton import norm as kernels

    B, S, C = x.shape
    out = x.new_empty(B, S, C)
    block = tuning.padded(C)
    rows = rows or tuning.norm_rows(S)
    launch = tuning.norm(block)
    grid = (-(-S // rows), B)
    with on(x):
        kernels.modulated_norm[grid](
            x,
            scale,
            shift,
            out,
            S,
            C,
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            shift.stride(0),
            eps,
            ROWS=rows,
            BLOCK=block,
            **launch.options,
        )
    return out


def launch_gated_add_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch of x [B, S, C], and the modulated norm of y, or an empty tensor without
    scale and shift."""
    from ..triton import norm as kernels

    B, S, C = x.shape
    y = x.new_empty(B, S, C)
    normed = scale is not None and shift is not None
    out = x.new_empty(B, S, C) if normed else x.new_empty(0)
    block = tuning.padded(C)
    rows = rows or tuning.norm_rows(S)
    launch = tuning.norm(block)
    if scale is None or shift is None:
        # the kernel wants addresses, which it does not read
        scale = gate
        shift = gate
    grid = (-(-S // rows), B)
    with on(x):
        kernels.gated_add_norm[grid](
            x,
            branch,
            gate,
            scale,
            shift,
            y,
            out,
            S,
            C,
            x.stride(0),
            x.stride(1),
            branch.stride(0),
            branch.stride(1),
            gate.stride(0),
            scale.stride(0),
            shift.stride(0),
            eps,
            NORM=normed,
            ROWS=rows,
            BLOCK=block,
            **launch.options,
        )
    return y, out


def rotary(
    weight: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rotary tables and positions as a kernel takes them: contiguous. Without a rotation the
    kernel does not read them but wants addresses, which those of the weight are."""
    if cos is None or sin is None or positions is None:
        return weight, weight, weight
    return cos.contiguous(), sin.contiguous(), positions.contiguous()


def pairs_side_by_side(pairs: list[int]) -> int:
    """How many pairs, at most four, a kernel may read at once: all axes have a multiple of it."""
    return math.gcd(4, *pairs)


def launch_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    block_offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm and rotation of every head of x [B, S, H, D], and the means of the result over blocks
    of tokens, fp32 [B, H, N, D], or an empty tensor without block_offsets."""
    from ..triton import norm as kernels

    B, S, H, D = x.shape
    y = x.new_empty(B, S, H, D)
    weight = weight.contiguous()
    if block_offsets is None:
        N = -(-S // tuning.TOKENS)
        means = x.new_empty(0, dtype=torch.float32)
        offsets = weight  # an address that the kernel does not read
    else:
        N = block_offsets.shape[0] - 1
        means = x.new_empty((B, H, N, D), dtype=torch.float32)
        offsets = block_offsets.contiguous()
    block = tuning.padded(D)
    tile = tuning.rope(H, block)
    axes = 0 if cos is None else len(pairs)
    cos, sin, positions = rotary(weight, cos, sin, positions)
    grid = (N, H // tile.heads, B)
    with on(x):
        kernels.norm_rope[grid](
            x,
            weight,
            cos,
            sin,
            positions,
            offsets,
            y,
            means,
            cos.shape[0],
            S,
            H,
            N,
            D,
            sum(pairs[:1]),
            sum(pairs[:2]),
            x.stride(0),
            x.stride(1),
            x.stride(2),
            eps,
            AXES=axes,
            VECTOR=pairs_side_by_side(pairs),
            MEANS=block_offsets is not None,
            TURN=tile.tokens,
            HEADS=tile.heads,
            TOKENS=tuning.TOKENS,
            BLOCK=block,
            **tile.launch.options,
        )
    return y, means


def launch_modulated_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and shift. Those of scale and shift are sums over programs of sums
    over a program's rows, so that they have the same bits every time."""
    from ..triton import norm as kernels

    B, S, C = x.shape
    block = tuning.padded(C)
    rows = rows or tuning.norm_backward_rows(S)
    launch = tuning.norm_backward(block)
    grad = grad.contiguous()
    grad_x = x.new_empty(B, S, C)
    programs = -(-S // rows)
    sums = x.new_empty((B, programs, 2, C), dtype=torch.float32)
    grid = (programs, B)
    with on(x):
        kernels.modulated_norm_backward[grid](
            x,
            scale,
            grad,
            grad_x,
            sums,
            S,
            C,
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            eps,
            ROWS=rows,
            BLOCK=block,
            **launch.options,
        )
    grad_scale, grad_shift = (sums[:, :, i].sum(1) for i in range(2))  # [B, C] each
    return grad_x, grad_scale, grad_shift


def launch_gated_add_norm_backward(
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    eps: float,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, branch, gate, scale and shift, from that of the norm's result and, where
    y is used beside it, that of y."""
    from ..triton import norm as kernels

    B, S, C = y.shape
    block = tuning.padded(C)
    rows = rows or tuning.norm_backward_rows(S)
    launch = tuning.norm_backward(block)
    grad_normed = grad_normed.contiguous()
    grad_x = y.new_empty(B, S, C)
    grad_branch = y.new_empty(B, S, C)
    # an address that the kernel does not read without a gradient of y
    grad_y_or_any = grad_normed if grad_y is None else grad_y.contiguous()
    programs = -(-S // rows)
    sums = y.new_empty((B, programs, 3, C), dtype=torch.float32)
    grid = (programs, B)
    with on(y):
        kernels.gated_add_norm_backward[grid](
            y,
            branch,
            gate,
            scale,
            grad_y_or_any,
            grad_normed,
            grad_x,
            grad_branch,
            sums,
            S,
            C,
            y.stride(0),
            y.stride(1),
            branch.stride(0),
            branch.stride(1),
            gate.stride(0),
            scale.stride(0),
            eps,
            ADD=grad_y is not None,
            ROWS=rows,
            BLOCK=block,
            **launch.options,
        )
    grad_gate, grad_scale, grad_shift = (sums[:, :, i].sum(1) for i in range(3))  # [B, C] each
    return grad_x, grad_branch, grad_gate, grad_scale, grad_shift


def launch_norm_rope_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    grad: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, from that of the rotated heads."""
    from ..triton import norm as kernels

    B, S, H, D = x.shape
    block = tuning.padded(D)
    tile = tuning.rope(H, block)
    grid = (-(-S // tuning.TOKENS), H // tile.heads, B)
    axes = 0 if cos is None else len(pairs)
    weight = weight.contiguous()
    grad = grad.contiguous()
    grad_x = x.new_empty(B, S, H, D)
    cos, sin, positions = rotary(weight, cos, sin, positions)
    sums = x.new_empty((math.prod(grid), D), dtype=torch.float32)
    with on(x):
        kernels.norm_rope_backward[grid](
            x,
            weight,
            cos,
            sin,
            positions,
            grad,
            grad_x,
            sums,
            cos.shape[0],
            S,
            H,
            D,
            sum(pairs[:1]),
            sum(pairs[:2]),
            x.stride(0),
            x.stride(1),
            x.stride(2),
            eps,
            AXES=axes,
            VECTOR=pairs_side_by_side(pairs),
            TURN=tile.tokens,
            HEADS=tile.heads,
            TOKENS=tuning.TOKENS,
            BLOCK=block,
            **tile.launch.options,
        )
    return grad_x, sums.sum(0)


def norm_constants(x: Tensor, *_) -> dict[str, int]:
    """The rows per program of the caller's binary."""
    return {"rows": tuning.norm_rows(x.shape[1])}


def norm_backward_constants(x: Tensor, *_) -> dict[str, int]:
    """The same for gradients."""
    return {"rows": tuning.norm_backward_rows(x.shape[1])}


def trial_norm(x: Tensor, *args) -> tuple:
    """Seventy rows of the caller's width in one sample, and its eps."""
    *tensors, eps = args
    draw = Draw(x.device)
    S = alike(70, x.shape[1])
    C = x.shape[-1]

    def small(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        shape = (1, S, C) if tensor.dim() == 3 else (1, C)
        return draw.like(tensor, *shape)

    smaller = [small(tensor) for tensor in (x, *tensors)]
    return *smaller, eps


def trial_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    block_offsets: Tensor | None,
    eps: float,
) -> tuple:
    """Two blocks, of 64 tokens and of some more, or as many as the caller's kind has; as many heads
    as make its binary; at any of nine positions along each axis."""
    _, S, H, D = x.shape
    draw = Draw(x.device)
    heads = tuning.rope(H, tuning.padded(D)).heads

    def as_many(candidate: int) -> tuple[int, ...]:
        return (tuning.rope(candidate, tuning.padded(D)).heads == heads,)

    H = alike(heads, H, as_many)
    offsets = None
    if block_offsets is None:
        S = alike(70, S, lambda tokens: (-(-tokens // tuning.TOKENS),))
    else:
        N = alike(2, block_offsets.shape[0] - 1)
        ends = block_ends(N, S)
        S = ends[-1]
        offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
    small_cos = None
    small_sin = None
    places = None
    if cos is not None:
        angles = draw.normal(9, D // 2)
        small_cos = angles.cos()
        small_sin = angles.sin()
        places = draw.integers(9, S, len(pairs))
    return (
        draw.like(x, 1, S, H, D),
        draw.like(weight, D).abs(),
        small_cos,
        small_sin,
        places,
        pairs,
        offsets,
        eps,
    )


def trial_norm_rope_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    grad: Tensor,
    eps: float,
) -> tuple:
    """The case of `trial_norm_rope` without blocks, and a random gradient."""
    *case, _, eps = trial_norm_rope(x, weight, cos, sin, positions, pairs, None, eps)
    _, S, H, D = case[0].shape
    draw = Draw(x.device)
    small_grad = draw.like(grad, 1, S, H, D)
    return *case, small_grad, eps


attach("modulated_norm", launch_modulated_norm, refuse_norm, trial_norm, norm_constants)
attach("gated_add_norm", launch_gated_add_norm, refuse_norm, trial_norm, norm_constants)
attach("norm_rope", launch_norm_rope, refuse_norm, trial_norm_rope)
attach(
    "modulated_norm_backward",
    launch_modulated_norm_backward,
    refuse_norm,
    trial_norm,
    norm_backward_constants,
)
attach(
    "gated_add_norm_backward",
    launch_gated_add_norm_backward,
    refuse_norm,
    trial_norm,
    norm_backward_constants,
)
attach("norm_rope_backward", launch_norm_rope_backward, refuse_norm, trial_norm_rope_backward)
