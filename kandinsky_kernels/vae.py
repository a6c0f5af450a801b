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
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import _guard, checks, reference, tuning
from ._library import attach, declare, derives, needs_reference, on, triton_absence
from ._precision import full_precision

GROUP_NORM_EPS = 1e-6
INDEXABLE = 2**31 - 1  # elements of one operand of a convolution: cuDNN counts them in 32 bits


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
    _check_floats("x_padded", x_padded, "B, T, Y, X, C")
    checks.one_place({"bias": bias}, x_padded=x_padded, weight=weight)
    taps, sizes = weight.shape[2:], x_padded.shape[1:4]
    if (
        weight.dim() != 5
        or weight.shape[1] != x_padded.shape[-1]
        or not all(1 <= k <= n for n, k in zip(sizes, taps, strict=True))
    ):
        raise ValueError(
            "weight must have shape [C', C, kT, kY, kX] with C = "
            f"{x_padded.shape[-1]} and fit into x_padded, "
            f"got {list(weight.shape)} for {list(x_padded.shape)}."
        )
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride must be three numbers from 1 on, got {stride}.")
    checks.floats("weight", weight)
    if bias is not None:
        checks.shape("bias", bias, weight.shape[0])
        checks.floats("bias", bias)
    with full_precision(x_padded.device, convolutions=True):
        op = _launch_conv if _chosen_conv(x_padded, weight, bias, stride) else _convolve
        return op(x_padded, weight, bias, stride)


def _convolve(
    x_padded: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]
) -> Tensor:
    """`causal_conv3d` by PyTorch, its meaning: in fp64 where the inputs are."""
    # [B, C, T + 2, Y + 2, X + 2]
    x, step, B, taps = (
        x_padded.permute(0, 4, 1, 2, 3),
        stride[0],
        x_padded.shape[0],
        weight.shape[2:],
    )
    frames = (x.shape[2] - taps[0]) // step + 1
    rows, columns = ((x.shape[axis] - taps[axis - 2]) // stride[axis - 2] + 1 for axis in (3, 4))
    inputs = INDEXABLE // max(1, B * math.prod(x_padded.shape[2:]))  # frames that one call may read
    most = max(
        1,
        min(
            INDEXABLE // max(1, B * weight.shape[0] * rows * columns),
            (inputs - taps[0]) // step + 1,
        ),
    )
    # without units for them oneDNN is 100 times slower
    narrow = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if narrow else x.dtype
    weight, bias, pieces = weight.to(dtype), None if bias is None else bias.to(dtype), []
    for t in range(0, frames, most):
        piece = x[:, :, step * t : step * (min(t + most, frames) - 1) + taps[0]].to(dtype)
        pieces.append(_conv3d(piece, weight, bias, stride).to(x.dtype))  # [B, C', <= most, Y', X']
    return (
        (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2))
        .permute(0, 2, 3, 4, 1)
        .contiguous()
    )


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    """F.conv3d, but always through oneDNN where it can be: PyTorch's choice for small inputs is up
    to seven times slower.

    Under torch.compile and of fake tensors, for which there is no call to oneDNN to trace, the
    choice is PyTorch's.
    """
    other = (
        derives(x, weight, bias)
        or torch.compiler.is_compiling()
        or is_fake(x)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
    )
    if other or not torch.backends.mkldnn.is_available():
        return F.conv3d(x, weight, bias, stride)
    return torch.mkldnn_convolution(x, weight, bias, [0, 0, 0], stride, [1, 1, 1], 1)


# ---- on GPUs


def _refuse_moments(x: Tensor, groups: int) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    C = x.shape[-1]
    if not x.numel():
        return "there is nothing to compute"
    if C & (C - 1) or groups & (groups - 1):
        return f"channels and groups must be powers of two, got {C} and {groups}"
    return None if C <= tuning.SLAB_TILE else f"it holds up to {tuning.SLAB_TILE} channels, got {C}"


def _launch_moments(x: Tensor, groups: int) -> Tensor:
    from .triton import vae as kernels

    B, T, Y, X, C = x.shape
    slab, rows = max(1, tuning.SLAB_ELEMENTS // C), max(1, tuning.SLAB_TILE // C)
    slabs = -(-Y * X // slab)
    parts = x.new_empty((2, B, T, slabs, groups), dtype=torch.float64)
    moments = x.new_empty((B, T, groups, 2), dtype=torch.float64)
    with on(x):
        kernels.slab_moments[(slabs, T, B)](
            x,
            parts[0],
            parts[1],
            T,
            Y * X,
            X,
            slabs,
            *x.stride()[:4],
            SLAB=slab,
            GROUPS=groups,
            ROWS=rows,
            BLOCK=C,
            num_warps=tuning.SLABS.num_warps,
            num_stages=tuning.SLABS.num_stages,
        )
        kernels.join_moments[(B * T,)](
            parts[0],
            parts[1],
            moments,
            Y * X,
            slabs,
            C // groups,
            SLAB=slab,
            GROUPS=groups,
            MANY=tuning.JOINED,
            num_warps=tuning.LIST.num_warps,
        )
    return moments


def _trial_moments(x: Tensor, groups: int) -> tuple:
    """Two frames of three slabs, the last one with a single pixel, far from zero."""
    slab = max(1, tuning.SLAB_ELEMENTS // x.shape[-1])
    return torch.randn(
        1, 2, 1, 2 * slab + 1, x.shape[-1], dtype=x.dtype, device=x.device
    ) + 3, groups


def _refuse_normed(x: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not x.numel():
        return "there is nothing to compute"
    return (
        None
        if x.shape[-1] <= tuning.NORM_TILE
        else (f"it holds up to {tuning.NORM_TILE} channels, got {x.shape[-1]}")
    )


def _launch_normed(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> Tensor:
    from .triton import vae as kernels

    B, T, Y, X, C = x.shape
    out, block = _empty_normed(x, scale, shift, front, pad, silu), tuning.padded(C)
    rows, before = max(1, tuning.NORM_TILE // block), x if front is None else front
    with on(x):
        kernels.group_norm_silu[(-(-out.shape[2] * out.shape[3] // rows), out.shape[1], B)](
            x,
            before,
            scale,
            shift,
            out,
            T,
            Y,
            X,
            C,
            *x.stride()[:4],
            *before.stride()[:4],
            scale.stride(0),
            shift.stride(0),
            FRONT=front is not None,
            PAD=int(pad),
            SILU=silu,
            ROWS=rows,
            BLOCK=block,
            num_warps=tuning.NORMED.num_warps,
            num_stages=tuning.NORMED.num_stages,
        )
    return out


def _trial_normed(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> tuple:
    """Two frames of 3 x 5 pixels of the caller's width."""
    C, like = x.shape[-1], {"dtype": x.dtype, "device": x.device}
    vectors = (torch.randn(1, C, dtype=v.dtype, device=x.device) for v in (scale, shift))
    return (
        torch.randn(1, 2, 3, 5, C, **like),
        *vectors,
        None if front is None else torch.randn(1, 2, 5, 7, C, **like),
        pad,
        silu,
    )


def _refuse_attention(query: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not query.numel():
        return "there is nothing to compute"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return (
            "its matrix products take float16 and bfloat16, got "
            f"{str(query.dtype).removeprefix('torch.')}"
        )
    return (
        None if query.shape[-1] <= 512 else (f"it holds head dims up to 512, got {query.shape[-1]}")
    )


def _launch_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    from .triton import vae as kernels

    B, T, P, D = query.shape
    out, lse = _empty_attention(query)
    tokens, block = key.shape[2], tuning.padded(D, 16)
    key, value = key.flatten(1, 2), value.flatten(1, 2)  # [B, T' P', D]
    tile = tuning.frame_attention(
        block, torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    )
    with on(query):
        kernels.frame_causal_attention[(-(-P // tile.rows), T, B)](
            query,
            key,
            value,
            out,
            lse,
            T,
            P,
            tokens,
            first_frame,
            D,
            *query.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            scale / math.log(2),
            PRECISION="ieee",
            WHOLE=block == D,
            ROWS=tile.rows,
            KEYS=tile.keys,
            DEPTH=tile.depth,
            BLOCK=block,
            num_warps=tile.launch.num_warps,
            num_stages=tile.launch.num_stages,
        )
    return out, lse


def _trial_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, scale: float
) -> tuple:
    """Two frames of 70 queries after an earlier frame, frames of 37 keys."""
    D, like = query.shape[-1], {"dtype": query.dtype, "device": query.device}
    return (
        torch.randn(1, 2, 70, D, **like),
        torch.randn(1, 3, 37, D, **like),
        torch.randn(1, 3, 37, D, **like),
        1,
        scale,
    )


def _chosen_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]
) -> bool:
    """Whether the Triton kernel takes this call: opt-in, because PyTorch's is the one to beat."""
    if (
        "causal_conv3d" not in tuning.TRITON
        or not x.is_cuda
        or triton_absence()
        or torch.compiler.is_compiling()
    ):
        return False
    args = x, weight, bias, stride
    return (
        not derives(x, weight, bias)
        and _refuse_conv(*args) is None
        and _guard.trusted(
            "causal_conv3d",
            _launch_conv,
            _convolve,
            _trial_conv,
            args,
            (tuple(weight.shape), tuple(stride), bias is None),
        )
    )


def _refuse_conv(x: Tensor, weight: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not x.numel() or not weight.numel():
        return "there is nothing to compute"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return (
            "its matrix products take float16 and bfloat16, got "
            f"{str(x.dtype).removeprefix('torch.')}"
        )
    return (
        None
        if weight.dtype == x.dtype
        else (
            f"it takes weights of the input's dtype, got {str(weight.dtype).removeprefix('torch.')}"
        )
    )


def _launch_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]
) -> Tensor:
    from .triton import vae as kernels

    (B, *sizes, C), (N, _, *taps) = x.shape, weight.shape
    T, Y, X = ((n - k) // step + 1 for n, k, step in zip(sizes, taps, stride, strict=True))
    # as it lies where it is channels-last
    out, weight = x.new_empty(B, T, Y, X, N), weight.permute(0, 2, 3, 4, 1).contiguous()
    tile = tuning.convolution(
        C, N, torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    )
    with on(x):
        kernels.causal_conv3d[(-(-Y * X // tile.rows) * -(-N // tile.columns), T, B)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            Y,
            X,
            C,
            N,
            *x.stride()[:4],
            PRECISION="ieee",
            BIAS=bias is not None,
            WHOLE=C % tile.depth == 0 and N % tile.columns == 0,
            KT=taps[0],
            KY=taps[1],
            KX=taps[2],
            ST=stride[0],
            SY=stride[1],
            SX=stride[2],
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.launch.num_warps,
            num_stages=tile.launch.num_stages,
        )
    return out


def _trial_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]
) -> tuple:
    """Two frames of 9 x 17 pixels, more than a tile, through weights like the caller's."""
    sizes = (
        (n - 1) * step + k for n, k, step in zip((2, 9, 17), weight.shape[2:], stride, strict=True)
    )
    x, weight = (
        torch.randn(1, *sizes, x.shape[-1], dtype=x.dtype, device=x.device),
        torch.randn_like(weight) / math.sqrt(weight[0].numel()),
    )
    return x, weight, None if bias is None else torch.randn_like(bias), stride


attach("group_moments", _launch_moments, _refuse_moments, _trial_moments)
attach("group_norm_silu", _launch_normed, _refuse_normed, _trial_normed)
attach("frame_causal_attention", _launch_attention, _refuse_attention, _trial_attention)
