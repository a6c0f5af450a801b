# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo video VAE: 8x smaller in space, 4x in time, causal in time.

Module names follow the published checkpoint (248 tensors), so a state dict loads strictly. Latents here are unscaled:
whoever holds sampler latents divides them by `VAEConfig.scaling_factor` before `decode` and multiplies after `encode`.
T latent frames stand for 4 (T - 1) + 1 video frames: the first one is alone, each later one holds four.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig

POLICIES = ("global", "official")
_EPS = 1e-6
_BLOCK_LIMIT = 2**31  # elements of the widest activation of one tile, the bound of 32-bit indexing


class CausalConv3d(nn.Module):
    """3-D convolution of [B, C, T, Y, X]: borders repeat, and output frame t sees input frames <= t (times the stride) only."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)
        self.padding = (kernel // 2,) * 4 + (kernel - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")  # [B, C, T + 2, Y + 2, X + 2]
        return self.conv(x)  # [B, C', T', Y', X']


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(_norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """One head as wide as the channels over all T*Y*X tokens: a token sees every token of its own and of earlier frames.

    Frame t is one attention over the first t + 1 frames' keys, so no mask exists and later frames cost nothing.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames, area = x.shape[2], x.shape[3] * x.shape[4]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, T*Y*X, C]
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = []
        for end in range(area, frames * area + 1, area):
            q, k, v = query[:, :, end - area : end], key[:, :, :end], value[:, :, :end]
            out.append(F.scaled_dot_product_attention(q, k, v))  # [B, 1, Y*X, C]
        out = self.to_out[0](torch.cat(out, dim=2))  # [B, 1, T*Y*X, C]
        return x + out.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, C, T, Y, X]


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
    """Nearest upsampling, then a causal convolution; in time the first frame is not doubled, so T -> 2 T - 1."""

    def __init__(self, channels: int, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.factors
        if width > 1:
            x = x.repeat_interleave(width, dim=4)  # [B, C, T, Y, 2X]
        if height > 1:
            x = x.repeat_interleave(height, dim=3)  # [B, C, T, 2Y, 2X]
        if time > 1:
            x = x.repeat_interleave(time, dim=2)[:, :, time - 1 :]  # [B, C, 2T - 1, 2Y, 2X]
        return self.conv(x)


class DownBlock(nn.Module):
    """`layers` resnets, then the strided convolution if this level shrinks anything."""

    def __init__(self, channels: tuple[int, int], layers: int, groups: int, factors: tuple[int, int, int]):
        super().__init__()
        inputs = (channels[0],) + (channels[1],) * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, channels[1], groups) for c in inputs])
        self.downsamplers = nn.ModuleList([Downsample(channels[1], factors)] if max(factors) > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """`layers` resnets, then the upsampler if this level grows anything."""

    def __init__(self, channels: tuple[int, int], layers: int, groups: int, factors: tuple[int, int, int]):
        super().__init__()
        inputs = (channels[0],) + (channels[1],) * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, channels[1], groups) for c in inputs])
        self.upsamplers = nn.ModuleList([Upsample(channels[1], factors)] if max(factors) > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _level_factors(config: VAEConfig) -> list[tuple[int, int, int]]:
    """(time, height, width) factor of each level, in the order the network meets them, the same for encoder and decoder.

    Space changes in the first log2(8) levels; time in the log2(4) levels before the last.
    """
    levels = len(config.block_out_channels)
    spatial, temporal = int(math.log2(config.spatial_compression)), int(math.log2(config.temporal_compression))
    if config.temporal_compression != 4 or config.spatial_compression != 2**spatial or levels < max(spatial, temporal + 1):
        raise ValueError(
            f"the VAE needs temporal_compression 4, a power of two in space and at least {max(spatial, temporal + 1)} levels, got "
            f"{config.temporal_compression}, {config.spatial_compression} and {levels} block_out_channels: correct the VAE config"
        )
    time = [2 if levels - 1 - temporal <= i < levels - 1 else 1 for i in range(levels)]
    space = [2 if i < spatial else 1 for i in range(levels)]
    return [(t, s, s) for t, s in zip(time, space)]


class Encoder(nn.Module):
    """Video [B, 3, F, H, W] -> moments before quant_conv, [B, 2 * latent_channels, T, H/8, W/8]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        pairs = zip((widths[0], *widths), widths)
        self.conv_in = CausalConv3d(3, widths[0])
        blocks = [DownBlock(p, config.layers_per_block, groups, f) for p, f in zip(pairs, _level_factors(config))]
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(_norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents after post_quant_conv, [B, latent_channels, T, Y, X] -> video [B, 3, 4 (T - 1) + 1, 8Y, 8X]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        pairs = zip((widths[0], *widths), widths)
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        blocks = [UpBlock(p, config.layers_per_block + 1, groups, f) for p, f in zip(pairs, _level_factors(config))]
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(_norm_silu(self.conv_norm_out, x))


@dataclass(frozen=True)
class TilePlan:
    """Fixed tiles of the `official` policy, in output frames and pixels.

    Time: tiles of `frames` every `frame_stride`; each later tile drops its first frame and its next frames fade in linearly
    over the overlap (17, 8: eight frames). The last tile is cut where the video ends.
    Space: tiles of `height` x `width`, neighbours sharing `overlap` pixels that fade linearly, vertically then horizontally.
    The last tile is moved inwards to end at the border; what it then shares beyond `overlap` comes from its neighbour.
    A side no longer than its tile is one tile.
    """

    height: int
    width: int
    overlap: int = 32
    frames: int = 17
    frame_stride: int = 8

    def __post_init__(self):
        pixels = (self.height, self.width, self.overlap)
        if any(p % 8 or p < 0 for p in pixels) or min(self.height, self.width) <= self.overlap:
            raise ValueError(f"a tile needs height and width above its overlap, all multiples of 8, got {pixels}: round them to 8")
        if self.frames % 4 != 1 or self.frame_stride % 4 or not 0 < self.frame_stride < self.frames:
            raise ValueError(
                f"a tile needs 4k+1 frames and a stride that is a smaller multiple of 4, got {self.frames} and {self.frame_stride}: "
                "use for example 17 and 8"
            )

    @classmethod
    def for_frame(cls, height: int, width: int) -> "TilePlan":
        """The plan of a frame of height x width pixels, a function of the size alone (upstream also asks for free memory).

        One tile while 256 channels x 17 frames x (height + 32) x (width + 32) stay below 2^31 elements (512x768 does); else the
        smallest number n of such parts, the long side in ceil(sqrt(n r)) tiles and the short one in ceil(sqrt(n / r)), r their
        ratio. A tile is the least multiple of 8 with which that many tiles, 32 pixels shared, cover the side: upstream's
        size wherever upstream reaches the border (768x1280: 2x3 tiles of 400x448), 8 more where it does not (640x1408: 640x496).
        """
        parts = math.ceil(256 * 17 * (height + 32) * (width + 32) / _BLOCK_LIMIT)
        ratio = max(height, width) / min(height, width)
        few, many = math.ceil(math.sqrt(parts / ratio)), math.ceil(math.sqrt(parts * ratio))
        rows, columns = (few, many) if width >= height else (many, few)
        if parts == 1:
            rows = columns = 1
        tile_height, tile_width = (8 * math.ceil((size + 32 * (n - 1)) / n / 8) for size, n in ((height, rows), (width, columns)))
        return cls(height=max(tile_height, 40), width=max(tile_width, 40))


def _starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles of one axis nominally begin: every `stride`, as many as are needed to reach `size`."""
    return list(range(0, max(size - tile, 0) + stride, stride)) if size > tile else [0]


def _fade(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """`tile` with its first `extent` positions along `dim` faded in over the last `extent` of `before` (weights 0, 1/n, ...)."""
    if extent == 0:
        return tile
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent).view(shape)
    head, rest = tile.split((extent, tile.shape[dim] - extent), dim=dim)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    return torch.cat((tail * (1 - ramp) + head * ramp, rest), dim=dim)


class HunyuanVideoVAE(nn.Module):
    """Encoder, decoder and the two 1x1x1 convolutions around the latent, under the published names.

    Any float dtype; differentiable. Video is [B, 3, F, H, W] in -1..1, latents [B, latent_channels, T, H/8, W/8] unscaled,
    with F = 4 (T - 1) + 1. GroupNorm statistics span the whole tensor given, so what is computed together matters: see `decode`.
    """

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of `video` [B, 3, F, H, W]; both [B, latent_channels, T, H/8, W/8].

        The mean is the posterior's mode; `sample_posterior` draws from it. ValueError unless F = 4 (T - 1) + 1 and H, W
        are positive multiples of 8.
        """
        self._check(video, 3, "video", "[B, 3, F, H, W]")
        frames, height, width = video.shape[2:]
        side, step = self.config.spatial_compression, self.config.temporal_compression
        if frames % step != 1 or height % side or width % side:
            raise ValueError(
                f"video needs {step}k+1 frames and sides divisible by {side}, got {frames} frames of {height}x{width}: crop or resize it"
            )
        return self.quant_conv(self.encoder(video)).chunk(2, dim=1)  # 2 x [B, C, T, H/8, W/8]

    def decode(self, latents: Tensor, policy: str = "global", tiles: TilePlan | None = None) -> Tensor:
        """Video [B, 3, 4 (T - 1) + 1, 8Y, 8X] of unscaled `latents` [B, latent_channels, T, Y, X], about -1..1, not clamped.

        "global": the decoder once, over the whole latent. "official": the published pipeline's overlapping tiles, each with its
        own statistics, under `tiles` or, where that is None, `TilePlan.for_frame` of the frame; the whole frame always comes out.
        The two are different functions. ValueError for a wrong shape or policy, or tiles given to "global".
        """
        self._check(latents, self.config.latent_channels, "latents", f"[B, {self.config.latent_channels}, T, Y, X]")
        if policy not in POLICIES or (policy == "global" and tiles is not None):
            raise ValueError(
                f"decode policy must be one of {', '.join(POLICIES)}, and tiles go with official only, got {policy!r} "
                f"with tiles {'given' if tiles else 'absent'}: name one policy"
            )
        if policy == "global":
            return self._decode_whole(latents)
        side = self.config.spatial_compression
        return self._decode_tiled(latents, tiles or TilePlan.for_frame(side * latents.shape[3], side * latents.shape[4]))

    def _check(self, x: Tensor, channels: int, name: str, shape: str) -> None:
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {x.dtype}: convert it first")
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(f"{name} must be a non-empty {shape}, got {list(x.shape)}: permute or crop it to that shape")

    def _decode_whole(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))  # [B, 3, 4 (T - 1) + 1, 8Y, 8X]

    def _decode_tiled(self, latents: Tensor, plan: TilePlan) -> Tensor:
        length, stride = (plan.frames - 1) // 4, plan.frame_stride // 4
        blend = plan.frames - 1 - plan.frame_stride
        starts = _starts(latents.shape[2] - 1, length, stride)
        out, before = [], None
        for start in starts:
            tile = self._decode_frame_tiles(latents[:, :, start : start + length + 1], plan)  # [B, 3, <= frames, 8Y, 8X]
            if before is not None:
                tile = _fade(before, tile[:, :, 1:], blend, dim=2)
            keep = tile.shape[2] if start == starts[-1] else plan.frame_stride + (start == 0)
            out.append(tile[:, :, :keep])
            before = tile
        return torch.cat(out, dim=2)  # [B, 3, 4 (T - 1) + 1, 8Y, 8X]

    def _decode_frame_tiles(self, latents: Tensor, plan: TilePlan) -> Tensor:
        side, (height, width) = self.config.spatial_compression, latents.shape[3:]
        tile_size = (min(plan.height // side, height), min(plan.width // side, width))
        rows, columns = (_starts(s, t, t - plan.overlap // side) for s, t in zip((height, width), tile_size))
        out, above = [], []
        for y in rows:
            row: list[Tensor] = []
            for x in columns:
                top, left = min(y, height - tile_size[0]), min(x, width - tile_size[1])
                tile = self._decode_whole(latents[..., top : top + tile_size[0], left : left + tile_size[1]])
                tile = tile[..., side * (y - top) :, side * (x - left) :]  # the moved last tile, from its nominal start
                if above:
                    tile = _fade(above[len(row)], tile, plan.overlap, dim=3)
                if row:
                    tile = _fade(row[-1], tile, plan.overlap, dim=4)
                row.append(tile)
            steps = [side * (x2 - x1) for x1, x2 in zip(columns, columns[1:])] + [None]
            strip = torch.cat([tile[..., :step] for tile, step in zip(row, steps)], dim=4)  # [B, 3, F, <= height, 8X]
            out.append(strip if y == rows[-1] else strip[..., : plan.height - plan.overlap, :])
            above = row
        return torch.cat(out, dim=3)  # [B, 3, F, 8Y, 8X]


def sample_posterior(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """mean + exp(logvar / 2) * noise, logvar clamped to -30..20 as upstream.

    The noise is drawn in fp32 on the generator's device (the CPU without one), so a seed means the same latents on any device.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float32).to(mean)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
