# SPDX-License-Identifier: Apache-2.0
"""Causal convolution two frames at a time, with two thirds of the products: Winograd's F(2, 3)
along time.

Two output frames of a window of three see four input frames d0 .. d3. Instead of six 2-D
convolutions with the taps w0, w1, w2, four of d0 - d2, d1 + d2, d2 - d1 and d1 - d3 with w0, (w0 +
w1 + w2) / 2, (w0 - w1 + w2) / 2 and w2 give both, by additions alone. The first frame of a video,
in front of which it is repeated, needs a single one. Worth it where direct convolution is bound by
arithmetic, as it is on CPUs; in fp32 the result is as near to fp64 as the direct one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# of a frame: below it, more calls cost more than a third of the products (benchmarks/NOTES.md)
LEAST_FLOPS = 2**28


def suits(conv: nn.Conv3d, area: int = LEAST_FLOPS) -> bool:
    """Whether a convolution of frames of `area` positions is done in pairs; a meta tensor stands
    for one on the CPU."""
    weight = conv.weight
    on_cpu = (
        weight.dtype == torch.float32
        and weight.device.type in ("cpu", "meta")
        and torch.backends.mkldnn.is_available()
    )
    return on_cpu and 2 * weight.numel() * area >= LEAST_FLOPS


def taps_of(weight: Tensor) -> list[Tensor]:
    """The four 2-D kernels [C', C, kY, kX] of a weight [C', C, 3, kY, kX]."""
    w0, w1, w2 = weight.unbind(2)
    ends, middle = (w0 + w2).mul_(0.5), w1 * 0.5
    taps = [w0, ends + middle, ends.sub_(middle), w2]
    return [tap.contiguous(memory_format=torch.channels_last) for tap in taps]


def convolve(padded: Tensor, taps: list[Tensor], bias: Tensor, first: bool) -> Tensor:
    """What `causal_conv3d` gives for `padded` [B, f + 2, Y + kY - 1, X + kX - 1, C]; first: its
    first three frames are the same one."""
    (batch, frames, height, width, _), (channels, _, rows, columns) = padded.shape, taps[0].shape
    out = padded.new_empty(batch, frames - 2, height - rows + 1, width - columns + 1, channels)
    alone = int(first)
    if first:
        torch.add(bias, _plane(padded[:, 2], taps[1]), alpha=2, out=out[:, 0])
    for t in range(alone, frames - 3, 2):
        d0, d1, d2, d3 = padded[:, t : t + 4].unbind(1)  # [B, Y + kY - 1, X + kX - 1, C]
        one, other = out[:, t], out[:, t + 1]
        torch.add(bias, _plane(d1 + d2, taps[1]), out=one)
        other.copy_(one)
        part = _plane(d2 - d1, taps[2])
        one.add_(part)
        other.sub_(part)
        del part
        one.add_(_plane(d0 - d2, taps[0]))
        other.sub_(_plane(d1 - d3, taps[3]))
    if (frames - 2 - alone) % 2:  # the last frame has no partner
        last = sum(
            _plane(frame, tap)
            for frame, tap in zip(
                padded[:, -3:].unbind(1), (taps[0], taps[1] - taps[2], taps[3]), strict=True
            )
        )
        torch.add(bias, last, out=out[:, -1])
    return out


def _plane(frame: Tensor, tap: Tensor) -> Tensor:
    """2-D convolution of [B, Y + kY - 1, X + kX - 1, C]: [B, Y, X, C']."""
    x = frame.permute(0, 3, 1, 2)
    if x.dtype == torch.float32:  # asked directly, because conv2d would not always
        return torch.mkldnn_convolution(x, tap, None, [0, 0], [1, 1], [1, 1], 1).permute(0, 2, 3, 1)
    return torch.conv2d(x, tap).permute(0, 2, 3, 1)


def kernel_elements(conv: nn.Conv3d) -> int:
    """What the four kernels take."""
    return 4 * 9 * conv.in_channels * conv.out_channels


def work_elements(frame: int, area: int, conv: nn.Conv3d) -> int:
    """What it holds beside input and output: a sum of padded frames of `frame` elements, and
    results of `area` positions."""
    return frame + 2 * area * conv.out_channels
