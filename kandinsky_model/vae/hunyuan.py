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
from .layers import Decoder, Encoder
from .schemes import Accounting, StreamPlan, choose, ladder, plans, stream_within
from .stages import pixels
from .stream import Chain, decoding, encoding
from .tiles import TilePlan, tiled

POLICIES = ("global", "official", "preview")
_log = logging.getLogger(__name__)


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
