# SPDX-License-Identifier: Apache-2.0
"""What a causal video VAE consists of, for videos of any length in pieces of any length.

Activations are channels-last: [B, T, Y, X, C], contiguous in C, which is the channels_last_3d
memory of [B, C, T, Y, X]. Statistics of a group norm span the whole video. So the norm has two
steps: `group_moments` of every frame as it comes, `group_affine` once all of them are known, and
then `group_norm_silu` of any piece. A frame's results never depend on the frames that are computed
with it. Sizes: B samples, T frames of Y x X pixels or P tokens, C channels in G groups, D numbers
of the attention's only head.
"""

import math

import torch
from torch import Tensor

from . import checks, reference
from ._library import declare
from ._memory import explained

GROUP_NORM_EPS = 1e-6


def _empty_moments(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((*x.shape[:2], groups, 2), dtype=torch.float64)


def _empty_normed(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> Tensor:
    B, T, Y, X, C = x.shape
    edge = 2 if pad else 0
    return x.new_empty((B, T + edge, Y + edge, X + edge, C))


def _empty_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype)
    return out, lse


def _empty_convolved(
    x_padded: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]
) -> Tensor:
    B, *sizes, _ = x_padded.shape
    out_channels, _, *taps = weight.shape
    counts = [
        (size - width) // step + 1 for size, width, step in zip(sizes, taps, stride, strict=True)
    ]  # T', Y', X'
    return x_padded.new_empty((B, *counts, out_channels))


_group_moments = declare(
    "group_moments(Tensor x, int groups) -> Tensor", reference.group_moments, _empty_moments
)
_group_norm_silu = declare(
    "group_norm_silu(Tensor x, Tensor scale, Tensor shift, Tensor? front, bool pad, bool silu)"
    " -> Tensor",
    reference.group_norm_silu,
    _empty_normed,
)
_frame_causal_attention = declare(
    "frame_causal_attention(Tensor query, Tensor key, Tensor value, int first_frame, float scale)"
    " -> (Tensor, Tensor)",
    reference.frame_causal_attention,
    _empty_attention,
)
_causal_conv3d = declare(
    "causal_conv3d(Tensor x_padded, Tensor weight, Tensor? bias, int[] stride) -> Tensor",
    reference.causal_conv3d,
    _empty_convolved,
)


def group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every group of channels in every frame.

    What is summed are differences from a number near the mean, so that a large mean costs no
    digits. A frame has the same bits whichever frames come with it.

    Args:
        x: [B, T, Y, X, C], any float dtype, last dimension contiguous.
        groups: G, which divides C.

    Returns:
        fp64 [B, T, G, 2]: mean and variance.

    Raises:
        ValueError: on other shapes and strides.
        TypeError: on tensors that are not floats.
    """
    return _group_moments(x, groups)


@explained("group_affine")
def group_affine(
    moments: Tensor, weight: Tensor, bias: Tensor, eps: float = GROUP_NORM_EPS
) -> tuple[Tensor, Tensor]:
    """The scale and shift with GroupNorm(x) = x * scale + shift, from the moments of all frames.

    With the moments m_t and v_t of T frames: mean = mean_t(m_t),
    variance = mean_t(v_t + (m_t - mean)^2), scale = weight / sqrt(variance + eps) and
    shift = bias - mean * scale, all in fp64.

    Args:
        moments: [B, T, G, 2] from `group_moments`.
        weight, bias: [C] of a float dtype, where G divides C.
        eps: added to the variance.

    Returns:
        (scale, shift), each [B, C] in fp32, or in fp64 for an fp64 weight.

    Raises:
        ValueError: on other shapes, and on an eps that is negative or not finite.
        TypeError: on tensors that are not floats.
    """
    checks.group_affine(moments, weight, bias, eps)
    G = moments.shape[2]
    means, variances = reference.double(moments).unbind(-1)  # [B, T, G] each
    mean = means.mean(1)  # [B, G]
    apart = means - mean[:, None]  # [B, T, G]
    variance = (variances + apart.square()).mean(1)  # [B, G]
    deviation = (variance + eps).sqrt()
    weight_of_groups = reference.double(weight).view(G, -1)  # [G, C / G]
    bias_of_groups = reference.double(bias).view(G, -1)  # [G, C / G]
    scale = weight_of_groups / deviation[..., None]  # [B, G, C / G]
    shift = bias_of_groups - mean[..., None] * scale  # [B, G, C / G]
    scale = scale.flatten(1)  # [B, C]
    shift = shift.flatten(1)  # [B, C]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return scale.to(weight.device, dtype), shift.to(weight.device, dtype)


def group_norm_silu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    front: Tensor | None = None,
    pad: bool = True,
    silu: bool = True,
) -> Tensor:
    """silu(x * scale + shift), written into the padded input of a causal 3 x 3 x 3 convolution.

    Args:
        x: [B, T, Y, X, C], any float dtype, last dimension contiguous.
        scale, shift: [B, C], fp32 or x's dtype, from `group_affine`.
        front: the last two frames that this function returned for the piece before,
            [B, 2, Y + 2, X + 2, C] in x's dtype. Without it, copies of the first frame.
        pad: whether to repeat the border pixels once along Y and X, and to put two frames in front.
        silu: whether to apply SiLU, or the norm alone.

    Returns:
        [B, T + 2, Y + 2, X + 2, C], or x's shape without pad, in x's dtype and contiguous. The
        arithmetic is fp32 (fp64 for fp64 inputs), and the result is rounded once.

    Raises:
        ValueError: on other shapes and strides.
        TypeError: on other dtypes.
    """
    return _group_norm_silu(x, scale, shift, front, pad, silu)


def frame_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_frame: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, where a frame of queries sees no later frame of keys.

    Frame t of the queries sees every token of the key frames from 0 to first_frame + t. No mask is
    built, and later frames are not read.

    Args:
        query: [B, T, P, D], one head, last dimension contiguous.
        key, value: [B, T', P', D] of query's dtype, with T' >= first_frame + T and P' > 0.
        first_frame: the number of key frames that come before the first frame of queries.
        scale: of the logits; 1 / sqrt(D) by default.
        return_lse: whether to return the log-sum-exp too.

    Returns:
        out [B, T, P, D] in query's dtype, contiguous. With return_lse also the natural log-sum-exp
        of the logits, [B, T, P] in fp32, or in fp64 for fp64 inputs, by which results over several
        ranges of keys merge.

    Raises:
        ValueError: on other shapes and strides.
        TypeError: on other dtypes.
    """
    if scale is None:
        checks.dimensions("query", query, "B, T, P, D")
        scale = 1.0 / math.sqrt(query.shape[-1] or 1)
    out, lse = _frame_causal_attention(query, key, value, first_frame, scale)
    return (out, lse) if return_lse else out


def causal_conv3d(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """3-D convolution of a channels-last video that brings its padding, by cuDNN or oneDNN.

    Frames go through in several calls where a single one would have an operand of 2^31 elements.
    A Triton kernel takes cuDNN's place once `tuning.TRITON` names this operator.

    Args:
        x_padded: [B, T + kT - 1, Y + kY - 1, X + kX - 1, C], as `group_norm_silu` returns it.
        weight: [C', C, kT, kY, kX] of x_padded's dtype.
        bias: [C'], or None.
        stride: along T, Y and X.

    Returns:
        [B, T', Y', X', C'] in x_padded's dtype, contiguous, with T' = (T - 1) // stride[0] + 1 and
        so on.

    Raises:
        ValueError: on other shapes and strides.
        TypeError: on tensors that are not floats.
    """
    return _causal_conv3d(x_padded, weight, bias, list(stride))
