# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels for norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tuning
from .._library import attach, on


def refuse_norm(x: Tensor, *_) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    if not x.numel():
        return "there is nothing to compute"
    if x.shape[-1] <= 16384:
        return None
    return f"rows of {x.shape[-1]} channels do not fit into registers, 16384 do"


def launch_modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    from ..triton import norm as kernels

    B, S, C = x.shape
    out, block, rows = x.new_empty(B, S, C), tuning.padded(C), tuning.norm_rows(S)
    launch = tuning.norm(block)
    with on(x):
        kernels.modulated_norm[(-(-S // rows), B)](
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
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from ..triton import norm as kernels

    B, S, C = x.shape
    normed = scale is not None and shift is not None
    y, block, rows = x.new_empty(B, S, C), tuning.padded(C), tuning.norm_rows(S)
    out, launch = x.new_empty(B, S, C) if normed else x.new_empty(0), tuning.norm(block)
    scale, shift = (scale, shift) if normed else (gate, gate)
    with on(x):
        kernels.gated_add_norm[(-(-S // rows), B)](
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
    from ..triton import norm as kernels

    B, S, H, D = x.shape
    N = -(-S // tuning.TOKENS) if block_offsets is None else block_offsets.shape[0] - 1
    y, heads, launch = x.new_empty(B, S, H, D), tuning.rope_heads(H), tuning.rope(tuning.padded(D))
    means = x.new_empty(0 if block_offsets is None else (B, H, N, D), dtype=torch.float32)
    weight, axes = weight.contiguous(), 0 if cos is None else len(pairs)
    cos, sin, positions = (
        weight if tensor is None else tensor.contiguous() for tensor in (cos, sin, positions)
    )
    first, second = (sum(pairs[:count]) for count in (1, 2))
    with on(x):
        kernels.norm_rope[(N, -(-H // heads), B)](
            x,
            weight,
            cos,
            sin,
            positions,
            weight if block_offsets is None else block_offsets.contiguous(),
            y,
            means,
            S,
            H,
            N,
            D,
            first,
            second,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            eps,
            AXES=axes,
            MEANS=block_offsets is not None,
            HEADS=heads,
            TOKENS=tuning.TOKENS,
            BLOCK=tuning.padded(D),
            **launch.options,
        )
    return y, means


def launch_modulated_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of vectors are sums of sums over `tuning.norm_backward_rows` tokens: the same
    bits every time."""
    from ..triton import norm as kernels

    B, S, C = x.shape
    block, rows, grad = tuning.padded(C), tuning.norm_backward_rows(S), grad.contiguous()
    grad_x, launch = x.new_empty(B, S, C), tuning.norm_backward(block)
    sums = x.new_empty((B, -(-S // rows), 2, C), dtype=torch.float32)
    with on(x):
        kernels.modulated_norm_backward[(sums.shape[1], B)](
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
    return grad_x, *(sums[:, :, i].sum(1) for i in range(2))


def launch_gated_add_norm_backward(
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..triton import norm as kernels

    B, S, C = y.shape
    block = tuning.padded(C)
    rows = tuning.norm_backward_rows(S)
    launch = tuning.norm_backward(block)
    grad_normed = grad_normed.contiguous()
    grad_x = y.new_empty(B, S, C)
    grad_branch = y.new_empty(B, S, C)
    sums = y.new_empty((B, -(-S // rows), 3, C), dtype=torch.float32)
    with on(y):
        kernels.gated_add_norm_backward[(sums.shape[1], B)](
            y,
            branch,
            gate,
            scale,
            grad_normed if grad_y is None else grad_y.contiguous(),
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
    return grad_x, grad_branch, *(sums[:, :, i].sum(1) for i in range(3))


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
    from ..triton import norm as kernels

    B, S, H, D = x.shape
    heads = tuning.rope_heads(H)
    launch = tuning.rope_backward(tuning.padded(D))
    grid = (-(-S // tuning.TOKENS), -(-H // heads), B)
    axes = 0 if cos is None else len(pairs)
    first, second = (sum(pairs[:count]) for count in (1, 2))
    weight = weight.contiguous()
    grad_x = x.new_empty(B, S, H, D)
    cos, sin, positions = (
        weight if tensor is None else tensor.contiguous() for tensor in (cos, sin, positions)
    )
    sums = x.new_empty((math.prod(grid), D), dtype=torch.float32)
    with on(x):
        kernels.norm_rope_backward[grid](
            x,
            weight,
            cos,
            sin,
            positions,
            grad.contiguous(),
            grad_x,
            sums,
            S,
            H,
            D,
            first,
            second,
            *x.stride()[:3],
            eps,
            AXES=axes,
            HEADS=heads,
            TOKENS=tuning.TOKENS,
            BLOCK=tuning.padded(D),
            **launch.options,
        )
    return grad_x, sums.sum(0)


def trial_norm(x: Tensor, *args) -> tuple:
    """Three rows of the caller's width, one sample: random vectors, its eps."""
    *vectors, eps = args
    like = {"dtype": x.dtype, "device": x.device}
    rows = torch.randn(1, 3, x.shape[-1], **like)
    made = [
        None if v is None else torch.randn(rows.shape if v.dim() == 3 else (1, x.shape[-1]), **like)
        for v in vectors
    ]
    return (rows, *made, eps)


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
    """Seventy tokens of two heads, in blocks of 64 and 6, at any of nine positions along each
    axis."""
    D, angles = (
        x.shape[-1],
        None if cos is None else torch.randn(9, x.shape[-1] // 2, device=x.device),
    )
    places = (
        None
        if angles is None
        else torch.randint(9, (70, len(pairs)), device=x.device, dtype=torch.int32)
    )
    offsets = (
        None
        if block_offsets is None
        else torch.tensor([0, 64, 70], dtype=torch.int32, device=x.device)
    )
    return (
        torch.randn(1, 70, 2, D, dtype=x.dtype, device=x.device),
        torch.rand(D, dtype=weight.dtype, device=x.device),
        None if angles is None else angles.cos(),
        None if angles is None else angles.sin(),
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
    *case, _, eps = trial_norm_rope(x, weight, cos, sin, positions, pairs, None, eps)
    return *case, torch.randn_like(case[0]), eps


attach("modulated_norm", launch_modulated_norm, refuse_norm, trial_norm)
attach("gated_add_norm", launch_gated_add_norm, refuse_norm, trial_norm)
attach("norm_rope", launch_norm_rope, refuse_norm, trial_norm_rope)
attach("modulated_norm_backward", launch_modulated_norm_backward, refuse_norm, trial_norm)
attach("gated_add_norm_backward", launch_gated_add_norm_backward, refuse_norm, trial_norm)
attach("norm_rope_backward", launch_norm_rope_backward, refuse_norm, trial_norm_rope_backward)
