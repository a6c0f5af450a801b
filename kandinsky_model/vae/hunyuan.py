# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo video VAE: 8x smaller in space, 4x in time, causal in time.

Module names follow the published checkpoint (248 tensors), so a state dict loads strictly. Latents
here are unscaled: who holds latents of the sampler divides them by `VAEConfig.scaling_factor`
before `decode` and multiplies after `encode`. T latent frames stand for 4 (T - 1) + 1 video frames:
the first one stands for a single frame, each later one for four.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig
from . import names
from .fallback import Streaming
from .layers import Decoder, Encoder
from .schemes import Accounting, Scheme, choose, ladder
from .stages import pixels
from .stream import Chain, check_finite, decoding, encoding
from .tiles import Tiling, tiled

POLICIES = ("global", "official", "preview")
_log = logging.getLogger(__name__)

Notify = Callable[[str], None]
_Module = TypeVar("_Module", bound=nn.Module)


class HunyuanVideoVAE(nn.Module):
    """Encoder, decoder and the two 1x1x1 convolutions around the latents, under published names.

    Works in any float dtype and is differentiable. Video is [B, 3, F, H, W] in -1..1, latents are
    [B, latent_channels, T, Y, X] with F = 4 (T - 1) + 1, H = 8 Y and W = 8 X. The statistics of a
    GroupNorm span the whole tensor that it is given, so what is computed together matters: see the
    policies of `decode_frames`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv3d(channels, channels, 1)
        # the map of `preview`, with the versions of the weights that it was fitted on
        self._colours: tuple[list, Tensor] | None = None

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
        notify: Notify | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of `video`, both [B, latent_channels, T, Y, X].

        The mean is the mode of the posterior, and `sample_posterior` draws from it. The video
        [B, 3, F, H, W] is streamed: it may lie on the CPU in any dtype, and only a few frames at a
        time go to the device and dtype of the weights. uint8 becomes x / 127.5 - 1, floats are
        taken as they are. memory_budget and notify are those of `decode_frames`; no bit of the
        result depends on them. Where autograd records, the whole encoder runs at once instead.

        ValueError unless F = 4 (T - 1) + 1 and H and W are positive multiples of 8, or for a budget
        that is too small. NotFinite, a RuntimeError, as for `decode_frames`.
        """
        _check(video, "video", 3, "3, F, H, W", torch.uint8)
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"video must have 4k+1 frames and sides divisible by 8, got {frames} frames of "
                f"{height}x{width}: crop or resize it"
            )
        if _recorded(video, self.encoder):
            moments = self.encoder(pixels(video, self.quant_conv.weight))
        else:
            streaming = Streaming(
                encoding(self.encoder),
                lambda: encoding(_in_float32(self.encoder)),
                memory_budget,
                notify or _log.debug,
            )
            moments = torch.cat(list(streaming(video)), dim=2)  # [B, 2 * latent_channels, T, Y, X]
        check_finite(moments, "encoding")
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)  # [B, latent_channels, T, Y, X]
        return mean.contiguous(), logvar.contiguous()

    def decode(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: Tiling | None = None,
        memory_budget: int | None = None,
    ) -> Tensor:
        """Video [B, 3, F, H, W] of unscaled `latents` [B, latent_channels, T, Y, X].

        Values are about -1..1, not clamped. `decode_frames` explains the arguments and gives the
        same frames piece by piece.
        """
        pieces = list(self.decode_frames(latents, policy, tiles, memory_budget))
        return torch.cat(pieces, dim=2).contiguous()

    def decode_frames(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: Tiling | None = None,
        memory_budget: int | None = None,
        notify: Notify | None = None,
    ) -> Iterator[Tensor]:
        """Consecutive pieces [B, 3, f, H, W] of the video, each as soon as it is final.

        policy: "global" runs the decoder once over all latents, streamed. "official" decodes the
        overlapping tiles of the published pipeline, each with its own statistics, and fades them
        into each other. "preview" gives colours only, see `preview`. The three are different
        functions. tiles: for "official"; by default `Tiling.for_frame` of the frame.
        memory_budget: bytes that decoding (of one tile) may use, counted as a `Scheme` counts them.
        None means the free memory of a GPU, and no limit on a CPU. Where memory runs out
        nevertheless, decoding goes on in the next smaller scheme. No bit of the result depends on
        it. notify: is told the scheme and such events. Where autograd records, the whole decoder
        runs at once instead.

        What overflows float16 is computed in float32, in twice the memory, and the log says so
        once; see `fallback`. The pieces have the dtype of the weights.

        ValueError for a wrong shape, policy or budget, for latents that are not finite, and for
        tiles given to another policy. NotFinite, a RuntimeError, where a piece would hold NaN or
        infinity: pieces before it have been given out.
        """
        _check(
            latents,
            "latents",
            self.config.latent_channels,
            f"{self.config.latent_channels}, T, Y, X",
        )
        if policy not in POLICIES or (policy != "official" and tiles is not None):
            raise ValueError(
                f"policy must be one of {', '.join(POLICIES)}, and tiles only come with official, "
                f"got {policy!r} and tiles {tiles}: change one of them"
            )
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinity: sample them again")
        if policy == "preview":
            return iter([self.preview(latents)])
        decode = self._decoding(
            memory_budget, notify or _log.debug, recorded=_recorded(latents, self.decoder)
        )
        if policy == "global":
            return decode(latents)
        height, width = latents.shape[3:]
        tiles = tiles or Tiling.for_frame(8 * height, 8 * width)
        decode(tiles.largest(latents))  # decodes nothing yet, but refuses a budget too small

        def decode_tile(tile: Tensor) -> Tensor:
            return torch.cat(list(decode(tile)), dim=2)

        return tiled(latents, tiles, decode_tile)

    def normed_values(self, latent_shape: tuple[int, ...], policy: str = "global") -> int:
        """How many values the norms read, in all, while latents of this shape [B, C, T, Y, X] are
        decoded: each once, in every scheme. So it measures how far decoding has come.

        policy: as in `decode_frames`. "preview" has no norms.
        """
        if policy == "preview":
            return 0
        batch, channels, *sizes = latent_shape
        tiles = 1
        if policy == "official":
            tiling = Tiling.for_frame(8 * sizes[1], 8 * sizes[2])
            tiles = tiling.count(*sizes)
            longest = (tiling.frames - 1) // 4 + 1
            largest = (longest, tiling.height // 8, tiling.width // 8)
            sizes = [min(pair) for pair in zip(sizes, largest, strict=True)]
        chain = decoding(self.decoder, self.post_quant_conv)
        read = 0
        for stage, shape in zip(chain.stages, chain.shapes(channels, *sizes), strict=False):
            if stage.norm is not None:
                read += shape.frames * shape.height * shape.width * shape.channels
        return batch * tiles * read

    def _decoding(
        self,
        memory_budget: int | None,
        notify: Notify,
        recorded: bool,
    ) -> Callable[[Tensor], Iterator[Tensor]]:
        """A function that decodes latents, or a tile of them, with statistics of their own."""
        if recorded:
            return self._decode_recorded
        # one for all tiles, because its chain holds the folded weights
        return Streaming(
            decoding(self.decoder, self.post_quant_conv),
            lambda: decoding(_in_float32(self.decoder), _in_float32(self.post_quant_conv)),
            memory_budget,
            notify,
        )

    def _decode_recorded(self, latents: Tensor) -> Iterator[Tensor]:
        """The video in one piece, differentiable."""
        video = self.decoder(self.post_quant_conv(latents))  # [B, 3, F, H, W]
        check_finite(video, "decoding")
        return iter([video])

    def decoding_schemes(self, latent_shape: tuple[int, ...]) -> list[Scheme]:
        """The schemes to decode latents of this shape, as `ladder` lists them."""
        return ladder(Accounting(decoding(self.decoder, self.post_quant_conv), latent_shape))

    def encoding_schemes(self, video_shape: tuple[int, ...]) -> list[Scheme]:
        """The schemes to encode a video of this shape, as `ladder` lists them."""
        return ladder(Accounting(encoding(self.encoder), video_shape))

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """A cheap picture of `latents` [B, latent_channels, T, Y, X]: a video [B, 3, F, H, W].

        A linear map gives each position its colour, which is repeated over the pixels and frames
        that the position stands for. The map is the least-squares fit to what this decoder makes of
        the first frame of random latents (of a fixed seed). It is fitted when first needed, and
        again when the weights have changed.
        """
        version = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if self._colours is None or self._colours[0] != version:
            self._colours = (version, self._fit_colours())
        colours = self._colours[1].to(latents)
        weight, bias = colours.split((self.config.latent_channels, 1))  # [C, 3], [1, 3]
        rows = latents.movedim(1, -1)  # [B, T, Y, X, C]
        small = (rows @ weight + bias).movedim(-1, 1)  # [B, 3, T, Y, X]
        wide = small.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)  # [B, 3, T, H, W]
        return wide.repeat_interleave(4, dim=2)[:, :, 3:]  # [B, 3, F, H, W]

    def _fit_colours(self) -> Tensor:
        """fp64 [latent_channels + 1, 3]: the linear map of `preview`, its bias last."""
        channels = self.config.latent_channels
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(4, channels, 8, 8, generator=generator) / self.config.scaling_factor
        latents = F.interpolate(noise, scale_factor=2).unsqueeze(2)  # [4, C, 1, 16, 16]
        latents_in_dtype = latents.to(self.post_quant_conv.weight)
        # one by one, because statistics span a batch of frames but not of samples
        decode = self._decoding(None, _log.debug, recorded=False)
        videos = []
        for one in latents_in_dtype.split(1):
            videos += list(decode(one))  # one frame each, so one piece
        video = torch.cat(videos)  # [4, 3, 1, 128, 128]
        colours = F.avg_pool2d(video[:, :, 0].cpu().double(), 8)  # [4, 3, 16, 16]
        colours = colours.movedim(1, -1).flatten(0, 2)  # [1024, 3]
        known = latents[:, :, 0].double()  # [4, C, 16, 16]
        known = known.movedim(1, -1).flatten(0, 2)  # [1024, C]
        ones = torch.ones_like(known[:, :1])
        known = torch.cat((known, ones), dim=1)  # [1024, C + 1]
        return torch.linalg.lstsq(known, colours).solution


def from_weights(
    state: Mapping[str, Tensor],
    config: VAEConfig | None = None,
    dtype: torch.dtype | None = None,
) -> HunyuanVideoVAE:
    """The video VAE of a single file's tensors, in either layout that `names` knows.

    config: None takes sizes from the shapes. dtype: None keeps that of the tensors. ValueError for
    tensors that are missing, unexpected or of another shape, of which the first is named.
    """
    weights = names.converted(state)
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    with torch.device("meta"):
        vae = HunyuanVideoVAE(config or names.video_config(shapes))
    wanted = {name: tuple(x.shape) for name, x in vae.state_dict().items()}
    names.check_complete(wanted, shapes)
    vae.load_state_dict(weights, strict=True, assign=True)
    # convolutions of channels-last activations would bring other weights into this order each time
    vae.to(dtype=dtype)
    vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload] # torch's stub
    return vae.eval().requires_grad_(False)


def decoding_scheme(
    config: VAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_budget: int | None = None,
) -> Scheme:
    """The fastest scheme to decode latents [B, C, T, Y, X] within `memory_budget` bytes.

    Needs no weights. ValueError where no scheme fits.
    """
    with torch.device("meta"):
        chain = decoding(Decoder(config).to(dtype))
    return _fastest(chain, latent_shape, memory_budget)


def encoding_scheme(
    config: VAEConfig,
    video_shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_budget: int | None = None,
) -> Scheme:
    """The fastest scheme to encode a video [B, 3, F, H, W] within `memory_budget` bytes.

    Needs no weights. ValueError where no scheme fits.
    """
    with torch.device("meta"):
        chain = encoding(Encoder(config).to(dtype))
    return _fastest(chain, video_shape, memory_budget)


def _fastest(
    chain: Chain,
    shape: tuple[int, ...],
    memory_budget: int | None,
) -> Scheme:
    return choose(ladder(Accounting(chain, shape)), memory_budget)[0]


def _in_float32(module: _Module) -> _Module:
    """A copy of `module` whose weights are float32."""
    return copy.deepcopy(module).float()


def _recorded(x: Tensor, network: nn.Module) -> bool:
    """Whether autograd records what `network` makes of `x`."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for parameter in network.parameters())


def _check(x: Tensor, name: str, channels: int, shape: str, *others: torch.dtype) -> None:
    """Raise unless x is a non-empty float tensor [B, channels, ...] of five dimensions.

    name, shape: how to name `x` and its shape. others: dtypes that are taken beside floats.
    """
    if not x.is_floating_point() and x.dtype not in others:
        allowed = " or ".join(("a float dtype", *map(str, others)))
        raise TypeError(f"{name} must have {allowed}, got {x.dtype}: convert it first")
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(
            f"{name} must be a non-empty [B, {shape}], got {list(x.shape)}: permute "
            "or crop it to that shape"
        )


def sample_posterior(
    mean: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents drawn from the posterior: mean + exp(logvar / 2) * noise, all of one shape.

    logvar is clamped to -30..20, as the published code does. The noise is drawn in fp32 on the
    generator's device (without one, the CPU), so that a seed means the same latents on any device.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float32)
    deviation = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return mean + deviation * noise.to(mean)
