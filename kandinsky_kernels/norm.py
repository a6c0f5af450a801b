# SPDX-License-Identifier: Apache-2.0
"""Norms fused with what surrounds them in a diffusion transformer: modulation, gate and residual,
rotary embedding."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._library import declare, differentiate, in_double

LAYER_NORM_EPS = 1e-5
MOST_AXES = 3
RMS_NORM_EPS = 1.1920928955078125e-07  # torch.nn.RMSNorm(eps=None) on an fp32 input

_modulated_norm = declare(
    "modulated_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    reference.modulated_norm,
)
_gated_add_norm = declare(
    "gated_add_norm(Tensor x, Tensor branch, Tensor gate, Tensor? scale, Tensor? shift, float "
    "eps) -> (Tensor, Tensor)",
    reference.gated_add_norm,
)
_norm_rope = declare(
    "norm_rope(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor? positions, int[] pairs, "
    "Tensor? block_offsets, float eps)"
    " -> (Tensor, Tensor)",
    reference.norm_rope,
)
_modulated_norm_backward = declare(
    "modulated_norm_backward(Tensor x, Tensor scale, Tensor grad, float eps) -> (Tensor, Tensor, "
    "Tensor)",
    reference.modulated_norm_backward,
)
_gated_add_norm_backward = declare(
    "gated_add_norm_backward(Tensor y, Tensor branch, Tensor gate, Tensor scale, Tensor? grad_y, "
    "Tensor grad_normed, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_add_norm_backward,
)
_norm_rope_backward = declare(
    "norm_rope_backward(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor? positions, "
    "int[] pairs, Tensor grad, float eps)"
    " -> (Tensor, Tensor)",
    reference.norm_rope_backward,
)


class Rotary(NamedTuple):
    """By which angle each pair of a head turns, for tokens on a grid of A axes: tables of a few
    rows instead of one row per token.

    Pair c, one of the axis a that `pairs` assigns it to, turns by the angle of cos[p, c] and sin[p,
    c] with p = positions[token, a].
    """

    cos: Tensor  # fp32 [P, D / 2], P at least one more than the largest position
    sin: Tensor
    positions: Tensor  # int32 [S, A]
    pairs: tuple[int, ...]  # pairs per axis, A numbers with sum D / 2

    @classmethod
    def per_token(cls, cos: Tensor, sin: Tensor) -> "Rotary":
        """One row of angles [S, D / 2] for each token."""
        return cls(
            cos,
            sin,
            torch.arange(len(cos), dtype=torch.int32, device=cos.device)[:, None],
            (cos.shape[-1],),
        )


def _check_layout(name: str, x: Tensor) -> None:
    """The kernels read whole rows of floats."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}; cast it first.")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides "
            f"{list(x.stride())}; "
            "call .contiguous() first."
        )


def _check_rows(x: Tensor, **vectors: Tensor | None) -> None:
    """x must be [B, S, C]; every vector [B, C]."""
    if x.dim() != 3:
        raise ValueError(
            f"x must have shape [B, S, C], got {list(x.shape)}; add the missing dimension."
        )
    _check_layout("x", x)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must have shape [B, C] = {[x.shape[0], x.shape[2]]}, got "
                f"{list(vector.shape)}; "
                "give one vector per sample."
            )
        if vector is not None:
            _check_layout(name, vector)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without norm weights (adaptive layer norm, arXiv
    2212.09748).

    x: [B, S, C], any float dtype, last dimension contiguous. scale, shift: [B, C], fp32 or x's
    dtype. Returns a new contiguous [B, S, C] in x's dtype; arithmetic is fp32 (fp64 for fp64
    inputs) and rounded once. Raises ValueError on other shapes and strides, TypeError on tensors
    that are not floats.
    """
    _check_rows(x, scale=scale, shift=shift)
    op = reference.modulated_norm if in_double(x, scale, shift) else _modulated_norm
    return op(x, scale, shift, eps)


def gated_add_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = LAYER_NORM_EPS,
) -> tuple[Tensor, Tensor | None]:
    """y = x + gate * branch and, with scale and shift, also modulated_norm(y): one pass over a
    residual seam.

    x, branch: [B, S, C] of one dtype. gate, scale, shift: [B, C], fp32 or x's dtype. Returns (y,
    normed), both [B, S, C] in x's dtype and contiguous; y is rounded before it is normalised;
    normed is None without scale and shift. Raises ValueError on other shapes and strides, or when
    only one of scale and shift is given, TypeError on other dtypes.
    """
    _check_rows(x, gate=gate, scale=scale, shift=shift)
    if branch.shape != x.shape:
        raise ValueError(
            f"branch must have the shape of x {list(x.shape)}, got {list(branch.shape)}."
        )
    if branch.dtype != x.dtype:
        raise TypeError(
            f"branch must have the dtype of x {x.dtype}, got {branch.dtype}; cast one of them."
        )
    _check_layout("branch", branch)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only one of them.")
    op = reference.gated_add_norm if in_double(x, branch, gate, scale, shift) else _gated_add_norm
    y, normed = op(x, branch, gate, scale, shift, eps)
    return y, None if scale is None else normed


def _check_heads(x: Tensor, weight: Tensor, rotary: Rotary | None) -> None:
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must have shape [B, S, H, D] with even D, got {list(x.shape)}.")
    _check_layout("x", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape [D] = [{x.shape[-1]}], got {list(weight.shape)}.")
    if rotary is None:
        return
    cos, sin, positions, pairs = rotary
    half = x.shape[-1] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (cos.shape[0], half):
            raise ValueError(
                f"{name} must have shape [P, D / 2] = {[cos.shape[0], half]}, got "
                f"{list(table.shape)}."
            )
        if table.dtype != torch.float32 and not table.dtype == x.dtype == torch.float64:
            raise TypeError(
                f"{name} must be float32, or float64 beside a float64 x, got "
                f"{table.dtype}; cast it first."
            )
    if not 1 <= len(pairs) <= MOST_AXES or min(pairs) < 0 or sum(pairs) != half:
        raise ValueError(
            f"pairs must be 1 to {MOST_AXES} numbers with sum D / 2 = {half}, got {list(pairs)}."
        )
    if positions.shape != (x.shape[1], len(pairs)) or positions.dtype != torch.int32:
        raise ValueError(
            f"positions must be int32 [S, axes] = {[x.shape[1], len(pairs)]}, got "
            f"{positions.dtype} {list(positions.shape)}."
        )


def norm_rope(
    x: Tensor, weight: Tensor, rotary: Rotary | None = None, eps: float = RMS_NORM_EPS
) -> Tensor:
    """RMSNorm over the head dimension times weight, then a rotation of adjacent pairs (RoPE, arXiv
    2104.09864).

    (y0, y1) = (x0 cos - x1 sin, x0 sin + x1 cos) for the pairs (0, 1), (2, 3), ...
    x: [B, S, H, D], any float dtype, last dimension contiguous. weight: [D]. rotary: see `Rotary`;
    None for the norm alone. Returns a new contiguous tensor of x's shape and dtype, rounded once.
    Raises ValueError on other shapes and strides and, except by GPU kernels, which do not look at
    them, on positions outside of the tables; TypeError on other dtypes.
    """
    _check_heads(x, weight, rotary)
    op = reference.norm_rope if in_double(x, weight) else _norm_rope
    return op(x, weight, *(rotary or (None, None, None, ())), None, eps)[0]


def norm_rope_means(
    x: Tensor,
    weight: Tensor,
    rotary: Rotary | None,
    block_offsets: Tensor,
    eps: float = RMS_NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """`norm_rope` and the mean of its result over every block of tokens, as NABLA's selection wants
    it.

    block_offsets: int32 [N + 1], ascending from 0 to S; block i owns tokens block_offsets[i] to
    block_offsets[i + 1]. The means are of y as rounded. Returns (y [B, S, H, D], means [B, H, N, D]
    in fp32, or fp64 for fp64 x). Raises ValueError on other shapes and strides, TypeError on other
    dtypes.
    """
    _check_heads(x, weight, rotary)
    if block_offsets.dim() != 1 or block_offsets.dtype != torch.int32:
        raise ValueError(
            f"block_offsets must be int32 [N + 1], got {block_offsets.dtype} "
            f"{list(block_offsets.shape)}."
        )
    op = reference.norm_rope if in_double(x, weight) else _norm_rope
    return op(x, weight, *(rotary or (None, None, None, ())), block_offsets, eps)


# ---- gradients


def _keep_modulated_norm(ctx, inputs: tuple, _) -> None:
    x, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.dtypes = scale.dtype, shift.dtype


def _modulated_norm_gradients(ctx, grad: Tensor) -> tuple:
    grad_x, *vectors = _modulated_norm_backward(*ctx.saved_tensors, grad.contiguous(), ctx.eps)
    return (
        grad_x,
        *(vector.to(dtype) for vector, dtype in zip(vectors, ctx.dtypes, strict=True)),
        None,
    )


def _keep_gated_add_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gate, scale)
    ctx.dtypes = [gate.dtype, *(vector.dtype for vector in (scale, shift) if vector is not None)]


def _gated_add_norm_gradients(ctx, grad_y: Tensor | None, grad_normed: Tensor | None) -> tuple:
    y, branch, gate, scale = ctx.saved_tensors
    if grad_normed is None:  # nothing follows the sum
        wide = torch.promote_types(y.dtype, torch.float32)
        grad_branch = (gate.to(wide)[:, None] * grad_y).to(y.dtype)
        return (
            grad_y,
            grad_branch,
            (branch.to(wide) * grad_y).sum(1).to(gate.dtype),
            None,
            None,
            None,
        )
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_x, grad_branch, *vectors = _gated_add_norm_backward(
        y, branch, gate, scale, grad_y, grad_normed.contiguous(), ctx.eps
    )
    return (
        grad_x,
        grad_branch,
        *(vector.to(dtype) for vector, dtype in zip(vectors, ctx.dtypes, strict=True)),
        None,
    )


def _keep_norm_rope(ctx, inputs: tuple, _) -> None:
    *tensors, ctx.pairs, block_offsets, ctx.eps = inputs
    ctx.save_for_backward(*tensors, block_offsets)


def _norm_rope_gradients(ctx, grad_y: Tensor | None, grad_means: Tensor | None) -> tuple:
    x, weight, cos, sin, positions, block_offsets = ctx.saved_tensors
    grad = x.new_zeros(x.shape) if grad_y is None else grad_y
    # every token has its share of its block's
    if grad_means is not None and block_offsets is not None:
        shares = (grad_means / block_offsets.diff()[:, None]).transpose(1, 2)  # [B, N, H, D]
        owner = reference.block_of_token(block_offsets, x.shape[1])
        grad = (grad + shares.index_select(1, owner)).to(x.dtype)
    grad_x, grad_weight = _norm_rope_backward(
        x, weight, cos, sin, positions, ctx.pairs, grad.contiguous(), ctx.eps
    )
    return grad_x, grad_weight.to(weight.dtype), None, None, None, None, None, None


differentiate("modulated_norm", _keep_modulated_norm, _modulated_norm_gradients)
differentiate("gated_add_norm", _keep_gated_add_norm, _gated_add_norm_gradients)
differentiate("norm_rope", _keep_norm_rope, _norm_rope_gradients)
