# SPDX-License-Identifier: Apache-2.0
"""What a causal video VAE is made of besides convolutions, for videos of any length in pieces of
any length.

Activations are channels-last: [B, T, Y, X, C], contiguous in C, which is channels_last_3d memory of
[B, C, T, Y, X]. The group norm is in two steps, because its statistics span the whole video:
`group_moments` of every frame as it comes, `group_affine` once all are known, and `group_norm_silu`
of any piece. A frame's results never depend on the frames that are computed with it.
"""

import math

import torch
from torch import Tensor

from . import checks, reference
from ._library import declare, needs_reference

GROUP_NORM_EPS = 1e-6


def _empty_moments(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((*x.shape[:2], groups, 2), dtype=torch.float64)


def _empty_normed(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> Tensor:
    (B, T, Y, X, C), edge = x.shape, 2 * pad
    return x.new_empty((B, T + edge, Y + edge, X + edge, C))


def _empty_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(
        query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)
    )


def _empty_convolved(
    x_padded: Tensor, weight: Tensor, _: Tensor | None, stride: list[int]
) -> Tensor:
    sizes = zip(x_padded.shape[1:4], weight.shape[2:], stride, strict=True)
    counts = [(n - k) // step + 1 for n, k, step in sizes]
    return x_padded.new_empty((x_padded.shape[0], *counts, weight.shape[0]))


_group_moments = declare(
    "group_moments(Tensor x, int groups) -> Tensor", reference.group_moments, _empty_moments
)
_group_norm_silu = declare(
    "group_norm_silu(Tensor x, Tensor scale, Tensor shift, Tensor? front, bool pad, bool silu) -> "
    "Tensor",
    reference.group_norm_silu,
    _empty_normed,
)
_frame_causal_attention = declare(
    "frame_causal_attention(Tensor query, Tensor key, Tensor value, int first_frame, float scale) "
    "-> (Tensor, Tensor)",
    reference.frame_causal_attention,
    _empty_attention,
)
_causal_conv3d = declare(
    "causal_conv3d(Tensor x_padded, Tensor weight, Tensor? bias, int[] stride) -> Tensor",
    reference.causal_conv3d,
    _empty_convolved,
)


def _check_floats(name: str, x: Tensor, shape: str) -> None:
    """x must have that many dimensions and a float dtype, and be contiguous in its last one: the
    kernels read whole rows."""
    if x.dim() != len(shape.split(", ")):
        raise ValueError(f"{name} must have shape [{shape}], got {list(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}; cast it first.")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides "
            f"{list(x.stride())}; "
            "call .contiguous() first."
        )


def group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every group of channels in every frame.

    x: [B, T, Y, X, C], any float dtype, last dimension contiguous; C is a multiple of groups.
    Returns fp64 [B, T, groups, 2]. Differences from a mean nearby are summed, so that a large mean
    costs no digits; a frame's result is bitwise the same whichever frames come with it. Raises
    ValueError on other shapes and strides, TypeError on tensors that are not floats.
    """
    _check_floats("x", x, "B, T, Y, X, C")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}.")
    op = reference.group_moments if needs_reference(x) else _group_moments
    return op(x, groups)


def group_affine(
    moments: Tensor, weight: Tensor, bias: Tensor, eps: float = GROUP_NORM_EPS
) -> tuple[Tensor, Tensor]:
    """Scale and shift with GroupNorm(x) = x * scale + shift, from the moments of all frames of x.

    mean = mean_t(m_t), variance = mean_t(v_t + (m_t - mean)^2), scale = weight / sqrt(variance +
    eps), shift = bias - mean scale, in fp64.
    moments: fp64 [B, T, G, 2] from `group_moments`. weight, bias: [C] of one float dtype, C a
    multiple of G. Returns two [B, C], fp32, or fp64 for fp64 weights. Raises ValueError on other
    shapes, TypeError on tensors that are not floats.
    """
    if moments.dim() != 4 or moments.shape[-1] != 2 or not moments.shape[1]:
        raise ValueError(
            "moments must have shape [B, T, G, 2] with a frame at least, got "
            f"{list(moments.shape)}; "
            "make them with group_moments."
        )
    G = moments.shape[2]
    checks.one_place(moments=moments, weight=weight, bias=bias)
    for name, tensor in (("moments", moments), ("weight", weight), ("bias", bias)):
        checks.floats(name, tensor)
    if not G or weight.dim() != 1 or weight.shape != bias.shape or weight.shape[0] % G:
        raise ValueError(
            f"weight and bias must share one shape [C] with C a multiple of {G} "
            "groups, "
            f"got {list(weight.shape)} and {list(bias.shape)}."
        )
    means, variances = moments.double().unbind(-1)  # [B, T, G]
    mean = means.mean(1)
    variance = (variances + (means - mean[:, None]).square()).mean(1)
    scale = weight.double().view(G, -1) / (variance + eps).sqrt()[..., None]  # [B, G, C/G]
    shift = bias.double().view(G, -1) - mean[..., None] * scale
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return scale.flatten(1).to(dtype), shift.flatten(1).to(dtype)


def group_norm_silu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    front: Tensor | None = None,
    pad: bool = True,
    silu: bool = True,
) -> Tensor:
    """silu(x * scale + shift), written into the padded input of a causal 3x3x3 convolution.

    x: [B, T, Y, X, C], any float dtype, last dimension contiguous. scale, shift: [B, C], fp32 or
    x's dtype, from `group_affine`.
    pad: repeat the border pixels once along Y and X, and put two frames in front: copies of the
    first one or, to continue a piece, front [B, 2, Y + 2, X + 2, C] in x's dtype, which are the
    last two frames this function returned. silu=False: only the norm. Returns a new contiguous [B,
    T + 2, Y + 2, X + 2, C], or x's shape without pad, in x's dtype; arithmetic is fp32 (fp64 for
    fp64 inputs) and rounded once. Raises ValueError on other shapes and strides, TypeError on other
    dtypes.
    """
    _check_floats("x", x, "B, T, Y, X, C")
    B, T, Y, X, C = x.shape
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.shape != (B, C):
            raise ValueError(
                f"{name} must have shape [B, C] = {[B, C]}, got "
                f"{list(vector.shape)}; make it with group_affine."
            )
        _check_floats(name, vector, "B, C")
    if pad and not (Y and X and (T or front is not None)):
        raise ValueError(f"x must have a pixel to repeat, got {list(x.shape)}; give pad=False.")
    if front is not None:
        if not pad or front.shape != (B, 2, Y + 2, X + 2, C):
            raise ValueError(
                "front must have shape [B, 2, Y + 2, X + 2, C] = "
                f"{[B, 2, Y + 2, X + 2, C]} and come with pad, "
                f"got {list(front.shape)} and pad={pad}."
            )
        if front.dtype != x.dtype:
            raise TypeError(
                f"front must have the dtype of x {x.dtype}, got {front.dtype}; cast one of them."
            )
        _check_floats("front", front, "B, 2, Y, X, C")
    op = reference.group_norm_silu if needs_reference(x, scale, shift, front) else _group_norm_silu
    return op(x, scale, shift, front, pad, silu)


def frame_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_frame: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, where query frame t sees every token of key frames 0 to
    first_frame + t.

    query: [B, T, P, D]; key, value: [B, T', P', D] of query's dtype with T' >= first_frame + T,
    last dimension contiguous; one head. No mask is built and frames beyond a query's own are not
    read. scale: 1 / sqrt(D) by default. Returns out [B, T, P, D], contiguous, in query's dtype;
    with return_lse also the natural log-sum-exp of the logits, fp32 [B, T, P], by which results
    over several ranges of keys merge. Raises ValueError on other shapes and strides, TypeError on
    other dtypes.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_floats(name, x, "B, T, P, D")
        if x.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must share one dtype, got {query.dtype} and "
                f"{x.dtype}; cast one of them."
            )
    (B, T, _, D), frames = query.shape, key.shape[1]
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (B, D) or not key.shape[2]:
        raise ValueError(
            f"key and value must share one shape [B, T', P', D] with B = {B}, D = "
            f"{D} and P' > 0, got {list(key.shape)} and "
            f"{list(value.shape)}."
        )
    if first_frame < 0 or frames < first_frame + T:
        raise ValueError(
            "key must have the frames of query and first_frame >= 0 earlier ones, "
            f"got {frames} frames for {T} and "
            f"{first_frame}."
        )
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    op = (
        reference.frame_causal_attention
        if needs_reference(query, key, value)
        else _frame_causal_attention
    )
    out, lse = op(query, key, value, first_frame, scale)
    return (out, lse) if return_lse else out


def causal_conv3d(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """3-D convolution without padding of a channels-last input that brings its own, through
    PyTorch's cuDNN and oneDNN.

    x_padded: [B, T + kT - 1, Y + kY - 1, X + kX - 1, C], as `group_norm_silu` returns it. weight:
    [C', C, kT, kY, kX] of its dtype. Returns a contiguous [B, T', Y', X', C'] in x_padded's dtype
    with T' = (T - 1) // stride + 1 and so on. Frames go in several calls where one would have an
    operand of 2^31 elements. A Triton kernel takes cuDNN's place once `tuning.TRITON` names this
    operator. Raises ValueError on other shapes and strides, TypeError on other dtypes.
    """
    op = reference.causal_conv3d if needs_reference(x_padded, weight, bias) else _causal_conv3d
    return op(x_padded, weight, bias, list(stride))
