# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels for the VAE. Activations are [B, T, Y, X, C]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import tuning
from .._library import attach, on
from ..cards import capability
from .trials import Draw, alike, kinds


def refuse_moments(x: Tensor, groups: int) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    C = x.shape[-1]
    if not x.numel():
        return "there is nothing to compute"
    if C & (C - 1) or groups & (groups - 1):
        return f"channels and groups must be powers of two, got {C} and {groups}"
    if C <= tuning.SLAB_TILE:
        return None
    return f"it holds up to {tuning.SLAB_TILE} channels, got {C}"


def launch_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and variance of every group of channels in every frame, fp64 [B, T, groups, 2]."""
    from ..triton import vae as kernels

    B, T, Y, X, C = x.shape
    slab = max(1, tuning.SLAB_ELEMENTS // C)
    rows = max(1, tuning.SLAB_TILE // C)
    slabs = -(-Y * X // slab)
    means = x.new_empty((B, T, slabs, groups), dtype=torch.float64)
    spreads = torch.empty_like(means)
    moments = x.new_empty((B, T, groups, 2), dtype=torch.float64)
    with on(x):
        kernels.slab_moments[(slabs, T, B)](
            x,
            means,
            spreads,
            T,
            Y * X,
            X,
            slabs,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.stride(3),
            SLAB=slab,
            GROUPS=groups,
            ROWS=rows,
            BLOCK=C,
            **tuning.SLABS.options,
        )
        kernels.join_moments[(B * T,)](
            means,
            spreads,
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
    """Two frames of three slabs, the last one with a single row of pixels, far from zero; or one
    slab where the caller's have one."""
    _, T, Y, X, C = x.shape
    slab = max(1, tuning.SLAB_ELEMENTS // C)
    columns = alike(2, X)
    least = min(Y * X, 2 * slab + 1)
    wanted = kinds(Y * X, -(-Y * X // slab))
    rows = Y
    for candidate in range(-(-least // columns), 64 * slab):
        pixels = candidate * columns
        if kinds(pixels, -(-pixels // slab)) == wanted:
            rows = candidate
            break
    draw = Draw(x.device)
    small = draw.like(x, 1, alike(2, T), rows, columns, C)
    return small.add_(3), groups


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
    """silu(x * scale + shift), with `pad` in the edges of the next convolution: [B, T + 2, Y + 2,
    X + 2, C]."""
    from ..triton import vae as kernels

    B, T, Y, X, C = x.shape
    edge = 2 * pad
    block = tuning.padded(C)
    rows = max(1, tuning.NORM_TILE // block)
    out = x.new_empty((B, T + edge, Y + edge, X + edge, C))
    area = (Y + edge) * (X + edge)
    grid = (-(-area // rows), T + edge, B)
    # the kernel wants an address, which it does not read without a front
    before = x if front is None else front
    with on(x):
        kernels.group_norm_silu[grid](
            x,
            before,
            scale,
            shift,
            out,
            T,
            Y,
            X,
            C,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.stride(3),
            before.stride(0),
            before.stride(1),
            before.stride(2),
            before.stride(3),
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
    """Two frames of 3 x 5 pixels of the caller's width, or of its kinds of sizes."""
    _, T, Y, X, C = x.shape
    draw = Draw(x.device)
    T = alike(2, T)
    Y = alike(3, Y)
    X = alike(5, X)
    vectors = (draw.like(vector, 1, C) for vector in (scale, shift))
    before = None if front is None else draw.like(front, 1, 2, Y + 2, X + 2, C)
    return draw.like(x, 1, T, Y, X, C), *vectors, before, pad, silu


def refuse_attention(query: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not query.numel():
        return "there is nothing to compute"
    if query.dtype not in (torch.float16, torch.bfloat16):
        got = str(query.dtype).removeprefix("torch.")
        return f"its matrix products take float16 and bfloat16, got {got}"
    if query.shape[-1] <= 512:
        return None
    return f"it holds head dims up to 512, got {query.shape[-1]}"


def launch_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, P, D] and the natural log-sum-exp fp32 [B, T, P], of query [B, T, P, D] over keys
    and values [B, T', P', D]."""
    from ..triton import vae as kernels

    B, T, P, D = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    tokens = key.shape[2]
    block = tuning.padded(D, 16)
    key = key.flatten(1, 2)  # [B, T' P', D]
    value = value.flatten(1, 2)
    tile = tuning.frame_attention(block, capability(query))
    scale_log2 = scale / math.log(2)
    grid = (-(-P // tile.rows), T, B)
    with on(query):
        kernels.frame_causal_attention[grid](
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
            query.stride(0),
            query.stride(1),
            query.stride(2),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            scale_log2,
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
    """Two frames of 70 queries after an earlier frame, frames of 37 keys, or of the caller's kinds
    of sizes."""
    _, T, P, D = query.shape
    draw = Draw(query.device)
    T = alike(2, T)
    P = alike(70, P)
    tokens = alike(37, key.shape[2])
    return (
        draw.like(query, 1, T, P, D),
        draw.like(key, 1, T + 1, tokens, D),
        draw.like(value, 1, T + 1, tokens, D),
        1,
        scale,
    )


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


def results(sizes: Sequence[int], taps: Sequence[int], stride: Sequence[int]) -> list[int]:
    """How many frames, rows and columns a convolution without padding makes of these."""
    return [(n - k) // step + 1 for n, k, step in zip(sizes, taps, stride, strict=True)]


def launch_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    """x [B, T', Y', X', C], weight [N, C, KT, KY, KX] -> [B, T, Y, X, N]."""
    from ..triton import vae as kernels

    B, *sizes, C = x.shape
    N, _, *taps = weight.shape
    T, Y, X = results(sizes, taps, stride)
    out = x.new_empty(B, T, Y, X, N)
    # [N, KT, KY, KX, C]: no copy where the weights are channels-last
    weight = weight.permute(0, 2, 3, 4, 1).contiguous()
    tile = tuning.convolution(C, N, capability(x))
    tiles_down = -(-Y * X // tile.rows)
    tiles_across = -(-N // tile.columns)
    grid = (tiles_down * tiles_across, T, B)
    with on(x):
        kernels.causal_conv3d[grid](
            x,
            weight,
            weight if bias is None else bias,
            out,
            Y,
            X,
            C,
            N,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.stride(3),
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
    N, C, *taps = weight.shape
    T, Y, X = results(x.shape[1:4], taps, stride)
    small = (alike(2, T), alike(9, Y), alike(17, X))
    sizes = ((n - 1) * step + k for n, k, step in zip(small, taps, stride, strict=True))
    draw = Draw(x.device)
    scale = 1 / math.sqrt(weight[0].numel())
    return (
        draw.like(x, 1, *sizes, C),
        draw.like(weight, N, C, *taps, scale=scale),
        None if bias is None else draw.like(bias, N),
        stride,
    )


attach("group_moments", launch_moments, refuse_moments, trial_moments)
attach("group_norm_silu", launch_normed, refuse_normed, trial_normed)
attach("frame_causal_attention", launch_attention, refuse_attention, trial_attention)
attach("causal_conv3d", launch_conv, refuse_conv, trial_conv)
