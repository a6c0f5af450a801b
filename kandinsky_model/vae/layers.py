# SPDX-License-Identifier: Apache-2.0
"""The layers of the HunyuanVideo VAE, under the names of the published checkpoint."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig

_EPS = 1e-6


class CausalConv3d(nn.Module):
    """3-D convolution of [B, C, T, Y, X]: borders repeat, and output frame t sees input frames <= t
    (times the stride) only."""

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
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1x1 convolution on x where the
    channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """One head as wide as the channels over all T*Y*X tokens: a token sees every token of its own
    and of earlier frames.

    Frame t is one attention over the first t + 1 frames' keys, so no mask exists and later frames
    cost nothing.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        area = height * width
        # [B, 1, T*Y*X, C]
        tokens = self.group_norm(x.contiguous()).flatten(2).transpose(1, 2).unsqueeze(1)
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = []
        for end in range(area, frames * area + 1, area):
            q, k, v = query[:, :, end - area : end], key[:, :, :end], value[:, :, :end]
            out.append(F.scaled_dot_product_attention(q, k, v))  # [B, 1, Y*X, C]
        out = self.to_out[0](torch.cat(out, dim=2)).squeeze(1)  # [B, T*Y*X, C]
        # [B, C, T, Y, X]
        return x + out.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)


class MidBlock(nn.Module):
    """Resnet, frame-causal attention, resnet, all at the latent's size."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Causal convolution with stride; T -> (T - 1) // 2 + 1 when it strides in time."""

    def __init__(self, channels: int, factors: tuple[int, int, int]):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest upsampling, then a causal convolution; in time the first frame is not doubled, so T
    -> 2 T - 1.

    Along a doubled axis two of a window's three taps meet the same input, so each phase of the
    output is a convolution with two taps, w0 and w1 + w2 or w0 + w1 and w2: 8 products for 27, and
    the upsampled tensor never exists. Exact, borders and first frame included.
    """

    def __init__(self, channels: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def folded(self) -> dict[tuple[int, int, int], Tensor]:
        """The convolution's weights for every phase of the output."""
        return fold(self.conv.conv.weight, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        (time, up, across), (frames, height, width) = self.factors, x.shape[2:]
        # [B, C, T + 3 - f, Y + 2, X + 2]
        padded = F.pad(x, (1, 1, 1, 1, 3 - time, 0), mode="replicate")
        out = x.new_empty(*x.shape[:2], time * (frames - 1) + 1, up * height, across * width).to(
            memory_format=torch.channels_last_3d
        )
        for (t, y, z), weight in self.folded().items():
            if frames > t:  # a single frame has no doubled one
                window = padded[:, :, t:, y : y + height + 3 - up, z : z + width + 3 - across]
                out[:, :, t::time, y::up, z::across] = F.conv3d(window, weight, self.conv.conv.bias)
        return out  # [B, C, f (T - 1) + 1, 2Y, 2X]


def fold(weight: Tensor, factors: tuple[int, int, int]) -> dict[tuple[int, int, int], Tensor]:
    """The kernels [C', C, ...] of 2 or 3 taps that `weight` becomes for every phase of an output
    enlarged by `factors`.

    Taps that meet the same input are added, in fp32 or better, and rounded once.
    """
    result = {(): weight.to(torch.promote_types(weight.dtype, torch.float32))}
    for dim, factor in enumerate(factors, start=2):
        result = {
            (*phase, i): part
            for phase, wide in result.items()
            for i, part in enumerate(_fold(wide, dim, factor))
        }
    return {
        phase: wide.to(weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        for phase, wide in result.items()
    }


def _fold(weight: Tensor, dim: int, factor: int) -> list[Tensor]:
    """The taps along `dim` for each phase of an axis enlarged by `factor`: those that meet the same
    input, added."""
    if factor == 1:
        return [weight]
    w0, w1, w2 = weight.split(1, dim)
    return [torch.cat((w0, w1 + w2), dim), torch.cat((w0 + w1, w2), dim)]


class Level(nn.Module):
    """`layers` resnets, then what resizes the level, under its published name (`downsamplers` or
    `upsamplers`)."""

    def __init__(
        self,
        channels: tuple[int, int],
        layers: int,
        groups: int,
        name: str,
        resize: nn.Module | None,
    ):
        super().__init__()
        inputs = (channels[0],) + (channels[1],) * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, channels[1], groups) for c in inputs])
        self.add_module(name, nn.ModuleList([resize] if resize is not None else []))

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.children():
            for layer in layers:
                x = layer(x)
        return x


def _level_factors(config: VAEConfig) -> list[tuple[int, int, int]]:
    """(time, height, width) factor of each level in the order a network meets them, the same for
    encoder and decoder.

    Space changes in the first three levels, time in the two before the last. ValueError for what
    these cannot add up to.
    """
    count, factors = (
        len(config.block_out_channels),
        (config.temporal_compression, config.spatial_compression),
    )
    if count < 3 or factors != (4, 8):
        raise ValueError(
            "a VAE must have 3 or more block_out_channels and compress time by 4 and space by 8, "
            f"got {count} and {factors}: "
            "correct its config"
        )
    return [
        (2 if count - 3 <= i < count - 1 else 1, *(2 if i < 3 else 1,) * 2) for i in range(count)
    ]


def _levels(
    config: VAEConfig, widths: tuple[int, ...], layers: int, name: str, resize: type
) -> nn.ModuleList:
    levels = []
    for i, (factors, width) in enumerate(zip(_level_factors(config), widths, strict=True)):
        step = resize(width, factors) if max(factors) > 1 else None
        levels.append(
            Level((widths[max(i - 1, 0)], width), layers, config.norm_num_groups, name, step)
        )
    return nn.ModuleList(levels)


class Encoder(nn.Module):
    """Video [B, 3, F, H, W] -> moments before quant_conv, [B, 2 * latent_channels, T, H/8, W/8]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = _levels(
            config, widths, config.layers_per_block, "downsamplers", Downsample
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents after post_quant_conv, [B, latent_channels, T, Y, X] -> video [B, 3, 4 (T - 1) + 1,
    8Y, 8X]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = _levels(
            config, widths, config.layers_per_block + 1, "upsamplers", Upsample
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
