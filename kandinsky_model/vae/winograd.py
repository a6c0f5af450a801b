# SPDX-License-Identifier: Apache-2.0
"""Causal convolution of two frames at a time, with two thirds of the products.

This is Winograd's F(2, 3) along time (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2015). Two output frames with a window of three frames depend on four input frames d0 to
d3. Instead of six 2-D convolutions with the taps w0, w1 and w2, four give both frames, by additions
alone:

    d0 - d2 with w0,    d1 + d2 with (w0 + w1 + w2) / 2,
    d1 - d3 with w2,    d2 - d1 with (w0 - w1 + w2) / 2.

The first frame of a video, which is repeated in front, needs a single convolution. All this pays
where direct convolution is bound by arithmetic, as on CPUs. In fp32 the result is as near to fp64
as that of direct convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Products (times two) for one frame. Below, the greater number of calls costs more than a third of
# the products saves.
LEAST_FLOPS = 2**28


def suits(conv: nn.Conv3d, area: int = LEAST_FLOPS) -> bool:
    """Whether frames of `area` positions are convolved in pairs: large ones, in fp32 on a CPU.

    The meta device stands for a CPU here, because schemes are counted there.
    """
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
    ends = (w0 + w2).mul_(0.5)
    middle = w1 * 0.5
    taps = [w0, ends + middle, ends.sub_(middle), w2]
    return [tap.contiguous(memory_format=torch.channels_last) for tap in taps]


def convolve(
    padded: Tensor,
    taps: list[Tensor],
    bias: Tensor | None,
    first: bool,
) -> Tensor:
    """`causal_conv3d` of padded [B, f + 2, Y + kY - 1, X + kX - 1, C]: [B, f, Y, X, C'].

    taps: from `taps_of`. first: whether the first three frames of `padded` are the same one.
    """
    assert bias is not None  # every convolution of the VAE has one
    batch, padded_frames, padded_height, padded_width, _ = padded.shape
    channels, _, tap_height, tap_width = taps[0].shape
    frames = padded_frames - 2
    height = padded_height - tap_height + 1
    width = padded_width - tap_width + 1
    out = padded.new_empty(batch, frames, height, width, channels)
    alone = int(first)
    if first:
        half = _plane(padded[:, 2], taps[1])
        torch.add(bias, half, alpha=2, out=out[:, 0])
        del half
    for t in range(alone, frames - 1, 2):
        d0, d1, d2, d3 = padded[:, t : t + 4].unbind(1)  # [B, Y + kY - 1, X + kX - 1, C]
        one = out[:, t]  # [B, Y, X, C']
        other = out[:, t + 1]
        torch.add(bias, _plane(d1 + d2, taps[1]), out=one)
        other.copy_(one)
        difference = _plane(d2 - d1, taps[2])
        one.add_(difference)
        other.sub_(difference)
        del difference
        one.add_(_plane(d0 - d2, taps[0]))
        other.sub_(_plane(d1 - d3, taps[3]))
    if (frames - alone) % 2:  # the last frame has no partner
        last_three = padded[:, -3:].unbind(1)
        direct = (taps[0], taps[1] - taps[2], taps[3])  # w0, w1, w2
        planes = (_plane(frame, tap) for frame, tap in zip(last_three, direct, strict=True))
        last = sum(planes)
        torch.add(bias, last, out=out[:, -1])
    return out


def _plane(frame: Tensor, tap: Tensor) -> Tensor:
    """2-D convolution of [B, Y + kY - 1, X + kX - 1, C]: [B, Y, X, C']."""
    x = frame.permute(0, 3, 1, 2)
    if x.dtype == torch.float32:  # called directly, because conv2d does not always choose oneDNN
        out = torch.mkldnn_convolution(
            x, tap, bias=None, padding=[0, 0], stride=[1, 1], dilation=[1, 1], groups=1
        )
    else:
        out = torch.conv2d(x, tap)
    return out.permute(0, 2, 3, 1)


def kernel_elements(conv: nn.Conv3d) -> int:
    """Elements of the four kernels."""
    return 4 * 9 * conv.in_channels * conv.out_channels


def work_elements(
    frame: int,
    area: int,
    conv: nn.Conv3d,
) -> int:
    """Elements alive beside input and output.

    These are a sum of padded frames, of `frame` elements, and two results of `area` positions.
    """
    return frame + 2 * area * conv.out_channels
