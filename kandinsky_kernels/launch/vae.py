# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels for the VAE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tuning
from .._library import attach, on
from .card import capability


def refuse_moments(x: Tensor, groups: int) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    C = x.shape[-1]
    if not x.numel():
        return "there is nothing to compute"
    if C & (C - 1) or groups & (groups - 1):
        return f"channels and groups must be powers of two, got {C} and {groups}"
    return None if C <= tuning.SLAB_TILE else f"it holds up to {tuning.SLAB_TILE} channels, got {C}"


def launch_moments(x: Tensor, groups: int) -> Tensor:
    from ..triton import vae as kernels

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
            **tuning.SLABS.options,
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
            **tuning.LIST.options,
        )
    return moments


def trial_moments(x: Tensor, groups: int) -> tuple:
    """Two frames of three slabs, the last one with a single pixel, far from zero."""
    slab = max(1, tuning.SLAB_ELEMENTS // x.shape[-1])
    return torch.randn(
        1, 2, 1, 2 * slab + 1, x.shape[-1], dtype=x.dtype, device=x.device
    ) + 3, groups


def refuse_normed(x: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not x.numel():
        return "there is nothing to compute"
    if x.shape[-1] <= tuning.NORM_TILE:
        return None
    return f"it holds up to {tuning.NORM_TILE} channels, got {x.shape[-1]}"


def launch_normed(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> Tensor:
    from ..triton import vae as kernels

    B, T, Y, X, C = x.shape
    edge, block = 2 * pad, tuning.padded(C)
    out = x.new_empty((B, T + edge, Y + edge, X + edge, C))
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
            **tuning.NORMED.options,
        )
    return out


def trial_normed(
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


def refuse_attention(query: Tensor, *_) -> str | None:
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


def launch_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    from ..triton import vae as kernels

    B, T, P, D = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    tokens, block = key.shape[2], tuning.padded(D, 16)
    key, value = key.flatten(1, 2), value.flatten(1, 2)  # [B, T' P', D]
    tile = tuning.frame_attention(block, capability(query))
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
            **tile.launch.options,
        )
    return out, lse


def trial_attention(
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


def conv_kind(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> tuple:
    """What of a call makes another binary of the kernel."""
    return tuple(weight.shape), tuple(stride), bias is None


def refuse_conv(x: Tensor, weight: Tensor, *_) -> str | None:
    """Why PyTorch's convolution takes this call, or None."""
    if not x.numel() or not weight.numel():
        return "there is nothing to compute"
    got = str(x.dtype).removeprefix("torch.")
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"its matrix products take float16 and bfloat16, got {got}"
    if weight.dtype != x.dtype:
        got = str(weight.dtype).removeprefix("torch.")
        return f"it takes weights of the input's dtype, got {got}"
    if "causal_conv3d" not in tuning.TRITON:
        return "PyTorch's convolution runs until a GPU has found the Triton kernel faster"
    return None


def launch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    from ..triton import vae as kernels

    (B, *sizes, C), (N, _, *taps) = x.shape, weight.shape
    T, Y, X = ((n - k) // step + 1 for n, k, step in zip(sizes, taps, stride, strict=True))
    # as it lies where it is channels-last
    out, weight = x.new_empty(B, T, Y, X, N), weight.permute(0, 2, 3, 4, 1).contiguous()
    tile = tuning.convolution(C, N, capability(x))
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
            **tile.launch.options,
        )
    return out


def trial_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> tuple:
    """Two frames of 9 x 17 pixels, more than a tile, through weights like the caller's."""
    sizes = (
        (n - 1) * step + k for n, k, step in zip((2, 9, 17), weight.shape[2:], stride, strict=True)
    )
    x, weight = (
        torch.randn(1, *sizes, x.shape[-1], dtype=x.dtype, device=x.device),
        torch.randn_like(weight) / math.sqrt(weight[0].numel()),
    )
    return x, weight, None if bias is None else torch.randn_like(bias), stride


attach("group_moments", launch_moments, refuse_moments, trial_moments)
attach("group_norm_silu", launch_normed, refuse_normed, trial_normed)
attach("frame_causal_attention", launch_attention, refuse_attention, trial_attention)
attach("causal_conv3d", launch_conv, refuse_conv, trial_conv, conv_kind)
