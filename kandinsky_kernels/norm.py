# SPDX-License-Identifier: Apache-2.0
"""Norms of a diffusion transformer, fused with what surrounds them.

That is the modulation by a timestep's scale and shift, the gated residual before a norm, and the
rotary embedding behind one. Sizes: B samples, S tokens, C channels, H heads of D numbers, N blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from ._library import declare, differentiate

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1.1920928955078125e-07  # torch.nn.RMSNorm(eps=None) on an fp32 input

_modulated_norm = declare(
    "modulated_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    reference.modulated_norm,
)
_gated_add_norm = declare(
    "gated_add_norm(Tensor x, Tensor branch, Tensor gate, Tensor? scale, Tensor? shift,"
    " float eps) -> (Tensor, Tensor)",
    reference.gated_add_norm,
)
_norm_rope = declare(
    "norm_rope(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor? positions, int[] pairs,"
    " Tensor? block_offsets, float eps) -> (Tensor, Tensor)",
    reference.norm_rope,
)
_modulated_norm_backward = declare(
    "modulated_norm_backward(Tensor x, Tensor scale, Tensor grad, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference.modulated_norm_backward,
)
_gated_add_norm_backward = declare(
    "gated_add_norm_backward(Tensor y, Tensor branch, Tensor gate, Tensor scale, Tensor? grad_y,"
    " Tensor grad_normed, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_add_norm_backward,
)
_norm_rope_backward = declare(
    "norm_rope_backward(Tensor x, Tensor weight, Tensor? cos, Tensor? sin, Tensor? positions,"
    " int[] pairs, Tensor grad, float eps) -> (Tensor, Tensor)",
    reference.norm_rope_backward,
)


class Rotary(NamedTuple):
    """The angles by which the pairs of a head turn, for tokens on a grid of A axes.

    A head of D numbers has D / 2 pairs of neighbours, and each pair belongs to one axis: the first
    pairs[0] pairs to axis 0, the next pairs[1] to axis 1, and so on. Pair c of axis a turns by the
    angle whose cosine and sine are cos[p, c] and sin[p, c] with p = positions[token, a]. The tables
    have one row for each position along an axis instead of one for each token.
    """

    cos: Tensor  # fp32 [P, D / 2], where P is larger than every position
    sin: Tensor  # fp32 [P, D / 2]
    positions: Tensor  # int32 [S, A], A from 1 to 3
    pairs: tuple[int, ...]  # A numbers with sum D / 2

    @classmethod
    def per_token(cls, cos: Tensor, sin: Tensor) -> "Rotary":
        """The angles of tables [S, D / 2] that have one row for each token."""
        S, half = cos.shape
        positions = torch.arange(S, dtype=torch.int32, device=cos.device)
        return cls(cos, sin, positions[:, None], (half,))


NO_ROTATION = (None, None, None, ())


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = LAYER_NORM_EPS,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: adaptive layer norm (arXiv 2212.09748).

    Args:
        x: [B, S, C], any float dtype, last dimension contiguous.
        scale, shift: [B, C], fp32 or x's dtype.
        eps: added to the variance.

    Returns:
        [B, S, C] in x's dtype, contiguous. The arithmetic is fp32 (fp64 for fp64 inputs), and the
        result is rounded once.

    Raises:
        ValueError: on other shapes and strides.
        TypeError: on tensors that are not floats.
    """
    return _modulated_norm(x, scale, shift, eps)


def gated_add_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = LAYER_NORM_EPS,
) -> tuple[Tensor, Tensor | None]:
    """The gated residual y = x + gate * branch and, with scale and shift, modulated_norm(y).

    Args:
        x, branch: [B, S, C] of one dtype, last dimension contiguous.
        gate, scale, shift: [B, C], fp32 or x's dtype; scale and shift both or neither.
        eps: added to the variance.

    Returns:
        (y, normed), each [B, S, C] in x's dtype and contiguous. y is rounded before it is
        normalised. normed is None without scale and shift.

    Raises:
        ValueError: on other shapes and strides, or when only one of scale and shift is given.
        TypeError: on other dtypes.
    """
    y, normed = _gated_add_norm(x, branch, gate, scale, shift, eps)
    return y, None if scale is None else normed


def norm_rope(
    x: Tensor, weight: Tensor, rotary: Rotary | None = None, eps: float = RMS_NORM_EPS
) -> Tensor:
    """RMSNorm over the head dimension times weight, then a rotation of pairs (arXiv 2104.09864).

    The rotation is (y0, y1) = (x0 cos - x1 sin, x0 sin + x1 cos) for the pairs of neighbours
    (0, 1), (2, 3), and so on.

    Args:
        x: [B, S, H, D], any float dtype, D even, last dimension contiguous.
        weight: [D], any float dtype.
        rotary: the angles; None for the norm alone.
        eps: added to the mean square.

    Returns:
        [B, S, H, D] in x's dtype, contiguous, rounded once.

    Raises:
        ValueError: on other shapes and strides, and on positions outside of the tables; on a GPU
            these read the nearest row instead, because looking for them would wait for the GPU.
        TypeError: on other dtypes.
    """
    return _norm_rope(x, weight, *_tables(rotary), None, eps)[0]


def norm_rope_means(
    x: Tensor,
    weight: Tensor,
    rotary: Rotary | None,
    block_offsets: Tensor,
    eps: float = RMS_NORM_EPS,
) -> tuple[Tensor, Tensor]:
    """`norm_rope`, and the mean of its result over every block of tokens, which NABLA compares.

    Args:
        x, weight, rotary, eps: as for `norm_rope`.
        block_offsets: int32 [N + 1], ascending from 0 to S. Block i has the tokens from
            block_offsets[i] to block_offsets[i + 1].

    Returns:
        (y [B, S, H, D], means [B, H, N, D]). The means are of y as rounded, in fp32, or in fp64
        for fp64 x.

    Raises:
        ValueError, TypeError: as `norm_rope`; and for other offsets, whose values kernels on a GPU
            do not look at.
    """
    return _norm_rope(x, weight, *_tables(rotary), block_offsets, eps)


def _tables(rotary: Rotary | None) -> tuple:
    if rotary is None:
        return NO_ROTATION
    checks.axes(rotary.pairs)
    return rotary


# ---- gradients


def _keep_modulated_norm(ctx, inputs: tuple, _) -> None:
    x, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.dtypes = scale.dtype, shift.dtype


def _modulated_norm_gradients(ctx, grad: Tensor) -> tuple:
    x, scale = ctx.saved_tensors
    grad_x, *vectors = _modulated_norm_backward(x, scale, grad.contiguous(), ctx.eps)
    return (grad_x, *_cast(vectors, ctx.dtypes), None)


def _keep_gated_add_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, scale, shift, ctx.eps = inputs
    y, _ = output
    ctx.save_for_backward(y, branch, gate, scale)
    ctx.dtypes = [vector.dtype for vector in (gate, scale, shift) if vector is not None]


def _gated_add_norm_gradients(ctx, grad_y: Tensor | None, grad_normed: Tensor | None) -> tuple:
    y, branch, gate, scale = ctx.saved_tensors
    if grad_normed is None:
        assert grad_y is not None  # one of the two outputs was used
        return (*_gated_add_gradients(y, branch, gate, grad_y), None, None, None)
    grad_y = None if grad_y is None else grad_y.contiguous()
    grad_normed = grad_normed.contiguous()
    grad_x, grad_branch, *vectors = _gated_add_norm_backward(
        y, branch, gate, scale, grad_y, grad_normed, ctx.eps
    )
    return (grad_x, grad_branch, *_cast(vectors, ctx.dtypes), None)


def _gated_add_gradients(
    y: Tensor, branch: Tensor, gate: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, branch and gate of a sum that no norm follows."""
    wide = torch.promote_types(y.dtype, torch.float32)
    grad_branch = gate.to(wide)[:, None] * grad
    grad_gate = (branch.to(wide) * grad).sum(1)  # [B, C]
    return grad, grad_branch.to(y.dtype), grad_gate.to(gate.dtype)


def _cast(vectors: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [vector.to(dtype) for vector, dtype in zip(vectors, dtypes, strict=True)]


def _keep_norm_rope(ctx, inputs: tuple, _) -> None:
    *tensors, ctx.pairs, block_offsets, ctx.eps = inputs
    ctx.save_for_backward(*tensors, block_offsets)


def _norm_rope_gradients(ctx, grad_y: Tensor | None, grad_means: Tensor | None) -> tuple:
    x, weight, cos, sin, positions, block_offsets = ctx.saved_tensors
    grad = x.new_zeros(x.shape) if grad_y is None else grad_y
    if grad_means is not None and block_offsets is not None:
        # a mean gives each token of its block an equal share of its gradient
        lengths = block_offsets.diff()[:, None]
        shares = (grad_means / lengths).transpose(1, 2)  # [B, N, H, D]
        owner = reference.block_of_token(block_offsets, x.shape[1])
        grad = (grad + shares.index_select(1, owner)).to(x.dtype)  # [B, S, H, D]
    grad_x, grad_weight = _norm_rope_backward(
        x, weight, cos, sin, positions, ctx.pairs, grad.contiguous(), ctx.eps
    )
    constants = (None,) * 6  # angles, blocks and eps
    return (grad_x, grad_weight.to(weight.dtype), *constants)


differentiate("modulated_norm", _keep_modulated_norm, _modulated_norm_gradients)
differentiate("gated_add_norm", _keep_gated_add_norm, _gated_add_norm_gradients)
ANGLES = slice(2, 4)
differentiate("norm_rope", _keep_norm_rope, _norm_rope_gradients, ANGLES)
