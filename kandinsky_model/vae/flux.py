# SPDX-License-Identifier: Apache-2.0
"""The VAE of the image checkpoints, FLUX.1's: diffusers' own, behind the interface of the video
VAE, for videos of one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .stages import pixels


class ImageVAE(nn.Module):
    """diffusers' AutoencoderKL. Latents are unscaled here; whoever scales them uses
    `config.scaling_factor` alone.

    FLUX.1 also shifts latents by 0.1159. The Kandinsky checkpoints were trained without that, both
    ways, so it is left out.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.config = SimpleNamespace(
            scaling_factor=vae.config.scaling_factor, latent_channels=vae.config.latent_channels
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, C, 1, H/8, W/8] of the latents of `video` [B, 3, 1, H, W], in
        -1..1 or uint8."""
        if video.dim() != 5 or video.shape[1:3] != (3, 1):
            raise ValueError(
                f"an image VAE encodes [B, 3, 1, H, W], got {list(video.shape)}; give it one frame"
            )
        posterior = self.vae.encode(
            pixels(video[:, :, 0], self.vae.encoder.conv_in.weight)
        ).latent_dist
        return posterior.mean[:, :, None], posterior.logvar[:, :, None]

    def decode_frames(
        self,
        latents: Tensor,
        policy: str = "global",
        tiles: None = None,
        memory_budget: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> Iterator[Tensor]:
        """The picture [B, 3, 1, 8Y, 8X] of unscaled `latents` [B, C, 1, Y, X], about -1..1; as
        `HunyuanVideoVAE.decode_frames`."""
        if policy != "global" or tiles is not None or memory_budget is not None:
            raise ValueError(
                f"pictures are decoded whole, got policy {policy!r} and budget "
                f"{memory_budget}; leave both out"
            )
        yield self.vae.decode(latents[:, :, 0]).sample[:, :, None]
