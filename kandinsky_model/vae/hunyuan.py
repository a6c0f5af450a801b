# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo video VAE: 8x smaller in space, 4x in time, causal in time.

Module names follow the published checkpoint (248 tensors), so a state dict loads strictly. Latents
here are unscaled: whoever holds sampler latents divides them by `VAEConfig.scaling_factor` before
`decode` and multiplies after `encode`. T latent frames stand for 4 (T - 1) + 1 video frames: the
first one is alone, each later one holds four.
"""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig
from .schemes import Accounting, StreamPlan, choose, ladder, plans, stream_within
from .stages import pixels
from .stream import Chain, decoding, encoding
from .tiles import TilePlan, tiled

POLICIES = ("global", "official", "preview")
_EPS = 1e-6
_log = logging.getLogger(__name__)


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


class HunyuanVideoVAE(nn.Module):
    """Encoder, decoder and the two 1x1x1 convolutions around the latent, under the published names.

    Any float dtype; differentiable. Video is [B, 3, F, H, W] in -1..1, latents [B, latent_channels,
    T, H/8, W/8] unscaled, with F = 4 (T - 1) + 1. GroupNorm statistics span the whole tensor given,
    so what is computed together matters: see `decode`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self._colours: tuple | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    def encode(
        self,
        video: Tensor,
        memory_budget: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of `video` [B, 3, F, H, W]; both [B,
        latent_channels, T, H/8, W/8].

        The mean is the posterior's mode; `sample_posterior` draws from it. The video is streamed:
        it may lie on the CPU in any dtype, and only a few frames at a time go to the weights'
        device and dtype. uint8 is scaled, x / 127.5 - 1; floats are taken as they are.
        memory_budget, notify: as for `decode_frames`; no bit of the result depends on them. Where
        gradients are recorded, the whole encoder runs at once instead. ValueError unless F = 4 (T -
        1) + 1 and H, W are positive multiples of 8, or for a budget too small.
        """
        _check(video, "video", "3, F, H, W", torch.uint8)
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"video must have 4k+1 frames and sides divisible by 8, got {frames} frames of "
                f"{height}x{width}: crop or resize it"
            )
        if _recorded(video, self.encoder):
            moments = self.encoder(pixels(video, self.quant_conv.weight))
        else:
            chain = encoding(self.encoder)
            schemes = plans(chain, video.shape, memory_budget)
            moments = torch.cat(
                list(stream_within(chain, video, schemes, notify or _log.debug)), dim=2
            )
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)  # [B, C, T, H/8, W/8]
        return mean.contiguous(), logvar.contiguous()

    def decode(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: TilePlan | None = None,
        memory_budget: int | None = None,
    ) -> Tensor:
        """Video [B, 3, 4 (T - 1) + 1, 8Y, 8X] of unscaled `latents` [B, latent_channels, T, Y, X];
        about -1..1, not clamped.

        `decode_frames` says what the arguments mean; it gives the same frames piece by piece.
        """
        return torch.cat(
            list(self.decode_frames(latents, policy, tiles, memory_budget)), dim=2
        ).contiguous()

    def decode_frames(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: TilePlan | None = None,
        memory_budget: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> Iterator[Tensor]:
        """Consecutive pieces [B, 3, f, 8Y, 8X] of the video, each as soon as it is final.

        "global": the decoder once, over the whole latent, streamed. "official": the published
        pipeline's overlapping tiles, each with its own statistics, under `tiles` or, without,
        `TilePlan.for_frame` of the frame; the whole frame always comes out. "preview": colours
        only, see `preview`. The three are different functions; none depends on the budget.
        memory_budget: bytes that decoding (of one tile) may use, counted as `StreamPlan` does;
        None: a GPU's free memory, on the CPU no limit. Out of memory nevertheless, it goes on in
        the next smaller scheme. notify: is told the scheme and such events. Where gradients are
        recorded, the whole decoder runs at once instead. ValueError for a wrong shape, policy or
        budget, for latents that are not finite, or for tiles given to another policy.
        """
        _check(latents, "latents", f"{self.config.latent_channels}, T, Y, X")
        if policy not in POLICIES or (policy != "official" and tiles is not None):
            raise ValueError(
                f"policy must be one of {', '.join(POLICIES)}, and tiles only come with official, "
                f"got {policy!r} and tiles {tiles}: "
                "change one of them"
            )
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinity: sample them again")
        if policy == "preview":
            return iter([self.preview(latents)])
        decode = self._decoding(
            memory_budget, notify or _log.debug, _recorded(latents, self.decoder)
        )
        if policy == "global":
            return decode(latents)
        tiles = tiles or TilePlan.for_frame(8 * latents.shape[3], 8 * latents.shape[4])
        decode(tiles.largest(latents))  # begins nothing, but refuses a budget that is too small
        return tiled(latents, tiles, lambda tile: torch.cat(list(decode(tile)), dim=2))

    def _decoding(
        self, memory_budget: int | None, notify: Callable[[str], None], plain: bool
    ) -> Callable[[Tensor], Iterator[Tensor]]:
        """What decodes latents, or a tile of them, in one go."""
        if plain:
            return lambda latents: iter([self.decoder(self.post_quant_conv(latents))])
        chain = decoding(self.decoder, self.post_quant_conv)  # once, as it holds folded weights
        return lambda latents: stream_within(
            chain, latents, plans(chain, latents.shape, memory_budget), notify
        )

    def decode_plans(self, latent_shape: tuple[int, ...]) -> list[StreamPlan]:
        """The ways to decode latents of this shape, fastest first, each needing less memory than
        all before it."""
        return ladder(Accounting(decoding(self.decoder, self.post_quant_conv), latent_shape))

    def encode_plans(self, video_shape: tuple[int, ...]) -> list[StreamPlan]:
        """The ways to encode a video of this shape, as above."""
        return ladder(Accounting(encoding(self.encoder), video_shape))

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """A cheap picture of `latents`: each position's colour by a linear map, repeated over the
        pixels and frames it stands for.

        The map is the least-squares fit of what this decoder makes of patches of random latents (a
        fixed seed) on their first frame; it is found when first needed, and again when the weights
        have changed.
        """
        version = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if self._colours is None or self._colours[0] != version:
            self._colours = version, self._fit_colours()
        # [C, 3], [1, 3]
        weight, bias = self._colours[1].to(latents).split((self.config.latent_channels, 1))
        colours = (latents.movedim(1, -1) @ weight + bias).movedim(-1, 1)  # [B, 3, T, Y, X]
        wide = colours.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        return wide.repeat_interleave(4, dim=2)[:, :, 3:]  # [B, 3, 4 (T - 1) + 1, 8Y, 8X]

    def _fit_colours(self) -> Tensor:
        channels, weight = self.config.latent_channels, self.post_quant_conv.weight
        noise = (
            torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
            / self.config.scaling_factor
        )
        latents = F.interpolate(noise, scale_factor=2).unsqueeze(2)  # [4, C, 1, 16, 16]
        # one by one, as statistics are
        video = torch.cat([self.decode(one.to(weight)) for one in latents.split(1)])
        colours = F.avg_pool2d(video[:, :, 0].double().cpu(), 8)  # [4, 3, 16, 16]
        known = latents[:, :, 0].double().movedim(1, -1).flatten(0, 2)  # [1024, C]
        known = torch.cat((known, torch.ones_like(known[:, :1])), dim=1)
        # [C + 1, 3]
        return torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, 2)).solution


def decode_plan(
    config: VAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_budget: int | None = None,
) -> StreamPlan:
    """How latents [B, C, T, Y, X] of this shape would be decoded within `memory_budget` bytes;
    ValueError where they cannot be."""
    return _plan(decoding, Decoder, config, latent_shape, dtype, memory_budget)


def encode_plan(
    config: VAEConfig,
    video_shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_budget: int | None = None,
) -> StreamPlan:
    """How a video [B, 3, F, H, W] of this shape would be encoded within `memory_budget` bytes;
    ValueError where it cannot be."""
    return _plan(encoding, Encoder, config, video_shape, dtype, memory_budget)


def _plan(
    chain: Callable[[nn.Module], Chain],
    network: type,
    config: VAEConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_budget: int | None,
) -> StreamPlan:
    with torch.device("meta"):
        return choose(ladder(Accounting(chain(network(config).to(dtype)), shape)), memory_budget)[0]


def _recorded(x: Tensor, network: nn.Module) -> bool:
    """Whether autograd would record what `network` makes of `x`."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in network.parameters())
    )


def _check(x: Tensor, name: str, shape: str, *others: torch.dtype) -> None:
    if not x.is_floating_point() and x.dtype not in others:
        raise TypeError(
            f"{name} must have {' or '.join(('a float dtype', *map(str, others)))}, "
            f"got {x.dtype}: convert it first"
        )
    if x.ndim != 5 or str(x.shape[1]) != shape.split(",")[0] or 0 in x.shape:
        raise ValueError(
            f"{name} must be a non-empty [B, {shape}], got {list(x.shape)}: permute "
            "or crop it to that shape"
        )


def sample_posterior(
    mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """mean + exp(logvar / 2) * noise, logvar clamped to -30..20 as upstream.

    The noise is drawn in fp32 on the generator's device (the CPU without one), so a seed means the
    same latents on any device.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float32).to(
        mean
    )
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
