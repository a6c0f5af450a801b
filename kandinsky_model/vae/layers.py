# SPDX-License-Identifier: Apache-2.0
"""The layers of the HunyuanVideo VAE, under the names of the published checkpoint.

These modules hold the weights and define the network for autograd. Without gradients `stream` runs
the same weights over chunks of frames.
"""

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig

_EPS = 1e-6  # of every GroupNorm
_Layer = TypeVar("_Layer", bound=nn.Module)


def _list(layers: Sequence[_Layer]) -> Sequence[_Layer]:
    """A ModuleList of `layers`, whose items a type checker knows."""
    return cast(Sequence[_Layer], nn.ModuleList(layers))


class CausalConv3d(nn.Module):
    """3-D convolution of [B, C, T, Y, X] that is causal in time.

    Borders are padded by repeating them, and time is padded in front only, so that output frame t
    depends on the input frames up to stride * t.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)
        self.padding = (kernel // 2,) * 4 + (kernel - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")  # [B, C, T + 2, Y + 2, X + 2]
        return self.conv(x)  # [B, C', T', Y', X']


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    Where the channels change, x is first given a 1x1x1 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut: CausalConv3d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [B, C', T, Y, X]
        h = self.conv2(F.silu(self.norm2(h)))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """Attention with one head, as wide as the channels, over all T * Y * X positions.

    A position attends to every position of its own and of earlier frames. Frame t is therefore one
    attention over the keys of the first t + 1 frames, which needs no mask and computes nothing for
    later frames.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = _list([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        area = height * width
        tokens = self.group_norm(x.contiguous()).flatten(2).transpose(1, 2)  # [B, T*Y*X, C]
        tokens = tokens.unsqueeze(1)  # [B, 1, T*Y*X, C]
        query = self.to_q(tokens)
        key = self.to_k(tokens)
        value = self.to_v(tokens)
        attended = []
        for end in range(area, frames * area + 1, area):
            q = query[:, :, end - area : end]  # [B, 1, Y*X, C]
            k = key[:, :, :end]
            v = value[:, :, :end]
            attended.append(F.scaled_dot_product_attention(q, k, v))  # [B, 1, Y*X, C]
        out = torch.cat(attended, dim=2).squeeze(1)  # [B, T*Y*X, C]
        out = self.to_out[0](out)
        out = out.unflatten(1, (frames, height, width))  # [B, T, Y, X, C]
        return x + out.permute(0, 4, 1, 2, 3)  # [B, C, T, Y, X]


class MidBlock(nn.Module):
    """Resnet, frame-causal attention, resnet: all at the size of the latents."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = _list([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = _list([FrameCausalAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Causal convolution whose strides are `factors` (time, height, width).

    Stride 2 in time makes (T - 1) // 2 + 1 frames of T.
    """

    def __init__(
        self,
        channels: int,
        factors: tuple[int, int, int],
    ):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # [B, C, T', Y', X']


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by `factors`, then a causal convolution.

    Time is doubled except for the first frame, so T frames become 2 T - 1. Along a doubled axis two
    of the three taps of a window meet the same input. Each phase of the output (its even and its
    odd positions) is therefore a convolution of the small input with two taps: w0 and w1 + w2, or
    w0 + w1 and w2. With all three axes doubled that is 8 products instead of 27, and the upsampled
    tensor never exists. The result is exact, at borders and in the first frame too.
    """

    def __init__(
        self,
        channels: int,
        factors: tuple[int, int, int],
    ):
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def folded(self) -> dict[tuple[int, ...], Tensor]:
        """The weights of the convolution for every phase of the output, see `fold`."""
        return fold(self.conv.conv.weight, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        time, down, across = self.factors
        frames, height, width = x.shape[2:]
        padding = (1, 1, 1, 1, 3 - time, 0)
        padded = F.pad(x, padding, mode="replicate")  # [B, C, T + 3 - time, Y + 2, X + 2]
        size = (time * (frames - 1) + 1, down * height, across * width)
        out = x.new_empty(*x.shape[:2], *size).to(memory_format=torch.channels_last_3d)
        for (t, y, z), weight in self.folded().items():
            if t >= frames:  # a single frame is the first one, which is not doubled
                continue
            rows = slice(y, y + height + 3 - down)
            columns = slice(z, z + width + 3 - across)
            window = padded[:, :, t:, rows, columns]
            phase = out[:, :, t::time, y::down, z::across]
            phase.copy_(F.conv3d(window, weight, self.conv.conv.bias))
        return out  # [B, C, time * (T - 1) + 1, down * Y, across * X]


def fold(
    weight: Tensor,
    factors: tuple[int, int, int],
) -> dict[tuple[int, ...], Tensor]:
    """The convolutions that replace upsampling by `factors` and convolution with `weight`.

    weight: [C', C, 3, 3, 3]. The result holds one kernel [C', C, 2 or 3, 2 or 3, 2 or 3] for every
    phase of the output, keyed by the phase's offset along each axis. Taps that meet the same input
    are added in fp32 or wider and rounded once.
    """
    kernels: dict[tuple[int, ...], Tensor] = {
        (): weight.to(torch.promote_types(weight.dtype, torch.float32))
    }
    for dim, factor in enumerate(factors, start=2):
        kernels = {
            (*phase, offset): part
            for phase, kernel in kernels.items()
            for offset, part in enumerate(_fold_axis(kernel, dim, factor))
        }
    return {
        phase: kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        for phase, kernel in kernels.items()
    }


def _fold_axis(
    kernel: Tensor,
    dim: int,
    factor: int,
) -> list[Tensor]:
    """The taps of `kernel` along `dim` for each phase of an axis that is enlarged by `factor`."""
    if factor == 1:
        return [kernel]
    w0, w1, w2 = kernel.split(1, dim)
    even = (w0, w1 + w2)
    odd = (w0 + w1, w2)
    return [torch.cat(even, dim), torch.cat(odd, dim)]


def _resnets(
    config: VAEConfig,
    layers: int,
    channels: tuple[int, int],
) -> Sequence[ResnetBlock]:
    """The resnets of one level, of which the first changes the channels from one to the other."""
    inputs = (channels[0],) + (channels[1],) * (layers - 1)
    return _list([ResnetBlock(c, channels[1], config.norm_num_groups) for c in inputs])


class DownLevel(nn.Module):
    """The resnets at one size, then the layer that makes the video smaller, if any."""

    def __init__(
        self,
        config: VAEConfig,
        channels: tuple[int, int],
        factors: tuple[int, int, int],
    ):
        super().__init__()
        resizes = max(factors) > 1
        # made first, because the order decides which random weights a seed gives
        downsamplers = _list([Downsample(channels[1], factors)] if resizes else [])
        self.resnets = _resnets(config, config.layers_per_block, channels)
        self.downsamplers = downsamplers

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpLevel(nn.Module):
    """The resnets at one size, then the layer that makes the video larger, if any."""

    def __init__(
        self,
        config: VAEConfig,
        channels: tuple[int, int],
        factors: tuple[int, int, int],
    ):
        super().__init__()
        resizes = max(factors) > 1
        # made first, as in `DownLevel`
        upsamplers = _list([Upsample(channels[1], factors)] if resizes else [])
        self.resnets = _resnets(config, config.layers_per_block + 1, channels)
        self.upsamplers = upsamplers

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _level_factors(config: VAEConfig) -> list[tuple[int, int, int]]:
    """By how much (time, height, width) change in each level, in the order of the network.

    The list is the same for encoder and decoder: space changes in the first three levels, time in
    the two before the last. ValueError where a config asks for factors that these cannot give.
    """
    count = len(config.block_out_channels)
    factors = (config.temporal_compression, config.spatial_compression)
    if count < 3 or factors != (4, 8):
        raise ValueError(
            "a VAE must have 3 or more block_out_channels and compress time by 4 and space by 8, "
            f"got {count} and {factors}: correct its config"
        )
    times = [2 if count - 3 <= level < count - 1 else 1 for level in range(count)]
    spaces = [2 if level < 3 else 1 for level in range(count)]
    return [(time, space, space) for time, space in zip(times, spaces, strict=True)]


def _levels(
    config: VAEConfig,
    widths: tuple[int, ...],
    kind: type[_Layer],
) -> Sequence[_Layer]:
    """The levels, of class `kind`, of a network whose levels have `widths` channels."""
    inputs = (widths[0], *widths[:-1])
    channels = zip(inputs, widths, strict=True)
    levels = zip(channels, _level_factors(config), strict=True)
    return _list([kind(config, pair, factors) for pair, factors in levels])


class Encoder(nn.Module):
    """Video [B, 3, F, H, W] to moments before quant_conv, [B, 2 * latent_channels, T, Y, X]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = _levels(config, widths, DownLevel)
        self.mid_block = MidBlock(widths[-1], config.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # [B, C, F, H, W]
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)  # [B, C, T, Y, X]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents after post_quant_conv, [B, latent_channels, T, Y, X], to video [B, 3, F, H, W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config.norm_num_groups)
        self.up_blocks = _levels(config, widths, UpLevel)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))  # [B, C, T, Y, X]
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # [B, 3, F, H, W]
