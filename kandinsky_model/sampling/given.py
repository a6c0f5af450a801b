# SPDX-License-Identifier: Apache-2.0
"""What a run is given beside its prompt: first and last frames, and pictures to edit, as latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import Preset
from ..dit.transformer import DiffusionTransformer3D
from ..vae.flux import ImageVAE
from ..vae.hunyuan import HunyuanVideoVAE, sample_posterior

# pixels that a side is rounded to: with dense attention and with NABLA, as the official code does
STEP = {False: 16, True: 128}


def fitting_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """The size (height, width) of what is made from a picture of this shape.

    Videos have the area the checkpoint was trained for, sides rounded: sqrt(area / (height *
    width)) scales both; the area is 512 x 768 or, for HD, 1024 x 1024. Pictures have the trained
    size whose shape is nearest.
    """
    if preset.task == "i2i":
        return min(preset.sizes, key=lambda size: abs(size[0] / size[1] - height / width))
    hd = min(preset.sizes[0]) > 512
    area = 1024 * 1024 if hd else preset.sizes[0][0] * preset.sizes[0][1]
    step = STEP[hd]
    factor = math.sqrt(area / (height * width)) / step
    return max(1, round(height * factor)) * step, max(1, round(width * factor)) * step


def latent_of(
    image: Tensor, vae: HunyuanVideoVAE | ImageVAE, seed: int, memory_budget: int | None = None
) -> Tensor:
    """The scaled latent [1, 1, H/8, W/8, C] of uint8 [3, H, W], sampled from its posterior by
    `seed`.

    It serves for any frame: a later latent holds four frames, but borders in time repeat, so all
    latents of a still video are equal.
    """
    # an image VAE knows none
    limits = {} if memory_budget is None else {"memory_budget": memory_budget}
    mean, logvar = vae.encode(image[None, :, None], **limits)  # [1, 3, 1, H, W]
    latent = sample_posterior(mean.float(), logvar.float(), torch.Generator().manual_seed(seed))
    return latent.permute(0, 2, 3, 4, 1) * vae.config.scaling_factor


# First-frame normalisation: how far mean and standard deviation of an early frame may be moved
# (down, up).
SOURCE_FRAMES, REFERENCE_FRAMES = slice(0, 4), slice(4, 9)


MEAN_RANGE, STD_RANGE = (0.05, 0.1), (0.1, 0.25)


@dataclass(frozen=True, eq=False)
class Given:
    """Clean latents that are known beforehand.

    frames: of single latent frames [B or 1, 1, 2Y, 2X, C] by index; 0 is what image-to-video begins
    with, T - 1 what it is to end with. They stand in every model input, flagged by the mask
    channel, and in the result. source: of the picture that is edited, of the shape of the latents
    or with batch 1; it fills the conditioning channels, with a mask of ones.
    """

    frames: Mapping[int, Tensor] = field(default_factory=dict)
    source: Tensor | None = None


def normalize_first_frame(latents: Tensor) -> Tensor:
    """Pull mean and spread of the first 4 latent frames of [B, T, h, w, C] towards those of the
    next up to 5.

    A given first frame is cleaner than the generated ones; uncorrected, the clip starts with a
    visible jump. Each of the first frames has its own mean and (unbiased) standard deviation over
    (h, w, C); the target is the joint statistics of frames 4..8, clamped to -0.05..+0.1 around the
    frame's mean and -0.1..+0.25 around its deviation. With 4 frames or fewer nothing is there to
    compare with and the latents come back unchanged.
    """
    source, reference = latents[:, SOURCE_FRAMES].float(), latents[:, REFERENCE_FRAMES].float()
    if reference.shape[1] == 0:
        return latents
    # [B, 4, 1, 1, 1]
    mean, std = source.mean((2, 3, 4), keepdim=True), source.std((2, 3, 4), keepdim=True)
    # [B, 1, 1, 1, 1]
    target_mean, target_std = (
        reference.mean((1, 2, 3, 4), keepdim=True),
        reference.std((1, 2, 3, 4), keepdim=True),
    )
    target_mean = target_mean.clamp(mean - MEAN_RANGE[0], mean + MEAN_RANGE[1])
    target_std = target_std.clamp(std - STD_RANGE[0], std + STD_RANGE[1])
    matched = (source - mean) / std * target_std + target_mean
    return torch.cat([matched.to(latents.dtype), latents[:, SOURCE_FRAMES.stop :]], dim=1)


def finish(x: Tensor, frames: Mapping[int, Tensor]) -> Tensor:
    """The given frames back in place of what the last Euler step made of them, then, behind a first
    frame, `normalize_first_frame`."""
    x = with_frames(x, frames)
    return normalize_first_frame(x) if 0 in frames else x


def with_frames(x: Tensor, frames: Mapping[int, Tensor]) -> Tensor:
    """x [B, T, 2Y, 2X, C] with latent frames replaced."""
    if frames:
        x = x.clone()
        for index, frame in frames.items():
            x[:, index] = frame[:, 0].to(x)
    return x


def model_input(dit: DiffusionTransformer3D, x: Tensor, given: Given) -> Tensor:
    """[latents | condition | mask] where the model has conditioning channels.

    Given frames are in the latents, where the mask is 1, and their condition stays zero; an edited
    picture is the condition.
    """
    extra = dit.config.in_channels - x.shape[-1]
    if extra == 0:
        return x
    condition = x.new_zeros(*x.shape[:-1], extra)
    for index in given.frames:
        condition[:, index, ..., -1] = 1.0
    if given.source is not None:
        condition[..., :-1], condition[..., -1] = given.source.to(x), 1.0
    return torch.cat([x, condition], dim=-1)  # [B, T, 2Y, 2X, in_channels]


def check_given(name: str, latent: Tensor, wanted: list[int]) -> None:
    if list(latent.shape) not in (wanted, [1, *wanted[1:]]):
        raise ValueError(
            f"{name} must have latents of shape {wanted} or batch 1, got "
            f"{list(latent.shape)}; encode it at the result's size"
        )
