# SPDX-License-Identifier: Apache-2.0
"""The VAE of the image checkpoints, which is FLUX.1's: diffusers' own class, behind the interface
of the video VAE, for videos of one frame."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import names
from .stages import pixels
from .stream import NotFinite, check_finite

_log = logging.getLogger(__name__)


class ImageVAE(nn.Module):
    """diffusers' AutoencoderKL. Latents are unscaled here, and `config.scaling_factor` alone scales
    them.

    FLUX.1 also shifts latents by 0.1159. The Kandinsky checkpoints were trained without the shift,
    in both directions, so it is left out.
    """

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        self.config = SimpleNamespace(
            scaling_factor=vae.config.scaling_factor,
            latent_channels=vae.config.latent_channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, both [B, C, 1, Y, X].

        video: [B, 3, 1, H, W], floats in -1..1 or uint8. What overflows float16 is computed in
        float32, and the log says so; NotFinite where a value is not finite nevertheless.
        """
        if video.dim() != 5 or video.shape[1:3] != (3, 1):
            raise ValueError(
                f"an image VAE encodes [B, 3, 1, H, W], got {list(video.shape)}; give it one frame"
            )

        def encode(vae: Any) -> Tensor:
            picture = pixels(video[:, :, 0], vae.encoder.conv_in.weight)  # [B, 3, H, W]
            posterior = vae.encode(picture).latent_dist
            return torch.cat((posterior.mean, posterior.logvar), dim=1)  # [B, 2 C, Y, X]

        moments = self._finite(encode, "encoding")[:, :, None]  # [B, 2 C, 1, Y, X]
        mean, logvar = moments.chunk(2, dim=1)  # [B, C, 1, Y, X]
        return mean, logvar

    def decode_frames(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: None = None,
        memory_budget: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> Iterator[Tensor]:
        """The picture [B, 3, 1, H, W] of unscaled `latents` [B, C, 1, Y, X], about -1..1.

        The arguments are those of `HunyuanVideoVAE.decode_frames`; pictures know only the policy
        "global", without tiles and budget. NotFinite as for `encode`.
        """
        if policy != "global" or tiles is not None or memory_budget is not None:
            raise ValueError(
                f"pictures are decoded whole, got policy {policy!r} and budget "
                f"{memory_budget}; leave both out"
            )
        if not latents.isfinite().all():
            raise ValueError("latents must be finite, got NaN or infinity: sample them again")

        def decode(vae: Any) -> Tensor:
            return vae.decode(latents[:, :, 0].to(vae.dtype)).sample  # [B, 3, H, W]

        yield self._finite(decode, "decoding")[:, :, None]  # [B, 3, 1, H, W]

    def _finite(
        self,
        call: Callable[[Any], Tensor],
        doing: str,
    ) -> Tensor:
        """call(vae), by a copy of the VAE in float32 where float16 overflows.

        NotFinite where the result holds NaN or infinity nevertheless.
        """
        out = call(self.vae)
        try:
            check_finite(out, doing)
            return out
        except NotFinite:
            if self.dtype != torch.float16:
                raise
        _log.warning("%s overflows float16; it is done again in float32", doing)
        out = call(copy.deepcopy(self.vae).float()).to(self.dtype)
        check_finite(out, doing)
        return out


def from_weights(
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> ImageVAE:
    """The picture VAE of a single file's tensors, in either layout that `names` knows.

    dtype: None keeps that of the tensors. RuntimeError without diffusers. ValueError for tensors
    that are missing, unexpected or of another shape, of which the first is named.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise RuntimeError(
            f"picture VAEs require diffusers, which cannot be imported ({error}); "
            "pip install 'kandinsky-kernels[text]'"
        ) from error
    weights = names.converted(state)
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    config = names.picture_config(shapes)
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**config)
    wanted = {name: tuple(x.shape) for name, x in vae.state_dict().items()}
    names.check_complete(wanted, shapes)
    vae.load_state_dict(weights, strict=True, assign=True)
    return ImageVAE(vae.to(dtype or vae.dtype).eval().requires_grad_(False))
