# SPDX-License-Identifier: Apache-2.0
"""Latents that are known before sampling: of a first or last frame, or of a picture to edit.

Pictures are uint8 [3, height, width]. Latents are [B, T, h, w, C]: B samples of T latent frames
with h = height / 8, w = width / 8 and C channels, scaled as the transformer reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from ..config import Preset
from ..dit.transformer import DiffusionTransformer3D
from ..media.picture import crop, read_image, resize
from ..vae.flux import ImageVAE
from ..vae.hunyuan import HunyuanVideoVAE, sample_posterior

TASKS_WITH_PICTURES = ("i2v", "i2i")
HD_AREA = 1024 * 1024  # pixels of a video from a picture; for SD it is that of the trained size
LARGEST_SD_SIDE = 512  # the shorter side of the SD sizes
# Sides of a video from a picture are rounded to these, as in the official code.
SD_STEP = 16
HD_STEP = 128

# Normalisation of the first frames: which latent frames are changed, which are the reference, and
# how far mean and standard deviation may be moved down and up.
CHANGED_FRAMES = slice(0, 4)
REFERENCE_FRAMES = slice(4, 9)
MEAN_RANGE = (0.05, 0.1)
STD_RANGE = (0.1, 0.25)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures that a request came with. first: what a video begins with, or the picture to
    edit. last: what a video ends with."""

    first: Tensor | None = None
    last: Tensor | None = None

    def __bool__(self) -> bool:
        return self.first is not None or self.last is not None

    def cropped(self, height: int, width: int) -> Pictures:
        """Their middle parts of the shape of height x width."""
        return self._each(lambda picture: crop(picture, height, width))

    def resized(self, height: int, width: int) -> Pictures:
        return self._each(lambda picture: resize(picture, height, width))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        first = None if self.first is None else change(self.first)
        last = None if self.last is None else change(self.last)
        return Pictures(first, last)


@dataclass(frozen=True, eq=False)
class Given:
    """Clean latents that are known beforehand.

    frames: latents [B or 1, 1, h, w, C] of single latent frames by their index. Image-to-video
    begins with index 0, and may end with index T - 1. They replace the noisy ones in every model
    input, where the mask channel flags them, and in the result.
    source: latents of the picture to edit, [B or 1, 1, h, w, C]. They fill the conditioning
    channels, with a mask of ones.
    """

    frames: Mapping[int, Tensor] = field(default_factory=dict)
    source: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.frames) or self.source is not None

    def to(self, device: torch.device) -> Given:
        frames = {index: frame.to(device) for index, frame in self.frames.items()}
        return Given(frames, None if self.source is None else self.source.to(device))


def read_pictures(
    preset: Preset, image, last_image, size: tuple[int | None, int | None]
) -> tuple[Pictures, tuple[int, int] | None]:
    """The pictures of a request, cut to one shape, and the (height, width) of the result.

    image, last_image: as `media.picture.read_image` takes them, arrays of numpy, or None.
    size: the height and width that were asked for. Where one is missing, the result takes its size
    from the picture, see `fitting_size`. A request without pictures returns None for the size.
    Raises ValueError where the preset's task does not go with the pictures, and what `read_image`
    raises.
    """
    _check_task(preset, image is not None, last_image is not None)
    pictures = Pictures(
        None if image is None else _read("image", image),
        None if last_image is None else _read("last_image", last_image),
    )
    leading = pictures.last if pictures.first is None else pictures.first
    if leading is None:
        return pictures, None
    height, width = size
    if height and width:
        return pictures.cropped(height, width), (height, width)
    height, width = leading.shape[1:]
    fitted = fitting_size(height, width, preset)
    if preset.task == "i2v":  # is not cut, because only the rounding of its sides deforms it
        return pictures.cropped(height, width), fitted
    return pictures.cropped(*fitted), fitted


def _read(name: str, image) -> Tensor:
    """`read_image`, which also takes arrays of numpy, and names the argument where it is a list or
    an address."""
    if isinstance(image, numpy.ndarray):
        image = torch.from_numpy(numpy.ascontiguousarray(image))
    if isinstance(image, (list, tuple)):
        raise TypeError(
            f"{name} must be one picture, which all prompts share, got a {type(image).__name__} "
            f"of {len(image)}; call generate once for each"
        )
    if isinstance(image, str) and image.partition("://")[0] in ("http", "https"):
        raise ValueError(
            f"{name} must be a file on this machine, got the address {image:.80}; download it, or "
            "pass a PIL image"
        )
    return read_image(image)


def _check_task(preset: Preset, has_first: bool, has_last: bool) -> None:
    """Raise ValueError where the preset takes no pictures but got some, or the reverse."""
    wanted = preset.task in TASKS_WITH_PICTURES
    given = has_first or has_last
    if given and not wanted:
        raise ValueError(f"{preset.name} takes no image, got one; use an i2v or i2i preset")
    if wanted and not given:
        raise ValueError(f"{preset.name} begins with an image, got none; pass image")
    if has_last and preset.task != "i2v":
        raise ValueError(
            f"{preset.name} makes no videos, so it takes no last image; use an i2v preset"
        )


def fitting_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """The (height, width) of the result that is made from a picture of this shape.

    An edited picture takes the trained size whose shape is nearest. A video keeps the shape and
    takes the area that the checkpoint was trained for: both sides are multiplied by
    sqrt(area / (height * width)) and rounded.
    """
    if preset.task == "i2i":
        return min(preset.sizes, key=lambda size: abs(size[0] / size[1] - height / width))
    trained_height, trained_width = preset.sizes[0]
    hd = min(trained_height, trained_width) > LARGEST_SD_SIDE
    area = HD_AREA if hd else trained_height * trained_width
    step = HD_STEP if hd else SD_STEP
    factor = math.sqrt(area / (height * width)) / step
    return max(1, round(height * factor)) * step, max(1, round(width * factor)) * step


def latent_of(
    image: Tensor, vae: HunyuanVideoVAE | ImageVAE, seed: int, memory_budget: int | None = None
) -> Tensor:
    """The scaled latent fp32 [1, 1, h, w, C] of a picture uint8 [3, H, W].

    It is drawn from the VAE's posterior with `seed`. It serves for any latent frame: although later
    ones hold four frames each, the VAE repeats borders in time, so that all latents of a still
    video are equal. memory_budget: bytes for the video VAE; the image VAE takes none.
    """
    pixels = image[None, :, None]  # [1, 3, 1, H, W]
    if isinstance(vae, ImageVAE):
        mean, logvar = vae.encode(pixels)  # each [1, C, 1, h, w]
    else:
        mean, logvar = vae.encode(pixels, memory_budget=memory_budget)
    generator = torch.Generator().manual_seed(seed)
    latent = sample_posterior(mean.float(), logvar.float(), generator)  # [1, C, 1, h, w]
    return latent.permute(0, 2, 3, 4, 1) * vae.config.scaling_factor  # [1, 1, h, w, C]


def encode_pictures(
    pictures: Pictures,
    vae: HunyuanVideoVAE | ImageVAE,
    seeds: list[int],
    latent_frames: int,
    memory_budget: int | None = None,
) -> Given:
    """The pictures as latents, with one draw from the posterior for each of the B seeds.

    latent_frames: T of a video, whose last frame has index T - 1; 0 for a picture to edit.
    """
    first, last = (
        None
        if picture is None
        else torch.cat([latent_of(picture, vae, seed, memory_budget) for seed in seeds])
        for picture in (pictures.first, pictures.last)
    )  # each [B, 1, h, w, C]
    if not latent_frames:
        return Given(source=first)
    frames = {0: first, latent_frames - 1: last}
    return Given({index: frame for index, frame in frames.items() if frame is not None})


def normalize_first_frame(latents: Tensor) -> Tensor:
    """Pull mean and deviation of the first 4 latent frames towards those of the next up to 5.

    A given first frame is cleaner than the generated ones; uncorrected, the clip starts with a
    visible jump. Each of the first frames has its own mean and (unbiased) standard deviation over
    (h, w, C). The target is the joint statistics of frames 4 to 8, clamped to -0.05..+0.1 around
    the frame's mean and -0.1..+0.25 around its deviation. With 4 latent frames or fewer there is
    nothing to compare with, and the latents [B, T, h, w, C] come back unchanged.
    """
    changed = latents[:, CHANGED_FRAMES].float()  # [B, 4, h, w, C]
    reference = latents[:, REFERENCE_FRAMES].float()  # [B, up to 5, h, w, C]
    if reference.shape[1] == 0:
        return latents
    mean = changed.mean((2, 3, 4), keepdim=True)  # [B, 4, 1, 1, 1]
    std = changed.std((2, 3, 4), keepdim=True)  # [B, 4, 1, 1, 1]
    target_mean = reference.mean((1, 2, 3, 4), keepdim=True)  # [B, 1, 1, 1, 1]
    target_std = reference.std((1, 2, 3, 4), keepdim=True)  # [B, 1, 1, 1, 1]
    target_mean = target_mean.clamp(mean - MEAN_RANGE[0], mean + MEAN_RANGE[1])
    target_std = target_std.clamp(std - STD_RANGE[0], std + STD_RANGE[1])
    matched = (changed - mean) / std * target_std + target_mean
    return torch.cat([matched.to(latents.dtype), latents[:, CHANGED_FRAMES.stop :]], dim=1)


def finish(x: Tensor, frames: Mapping[int, Tensor]) -> Tensor:
    """The result of the last Euler step with the given frames put back, and the first frames
    normalised where the first one was given."""
    x = with_frames(x, frames)
    return normalize_first_frame(x) if 0 in frames else x


def with_frames(x: Tensor, frames: Mapping[int, Tensor]) -> Tensor:
    """x [B, T, h, w, C] with some latent frames replaced."""
    if frames:
        x = x.clone()
        for index, frame in frames.items():
            x[:, index] = frame[:, 0].to(x)
    return x


def model_input(dit: DiffusionTransformer3D, x: Tensor, given: Given) -> Tensor:
    """What the network reads: x, and where it has conditioning channels [x | condition | mask].

    Given frames are part of x already. Their mask is 1, and their condition stays zero. A picture
    to edit is the condition, with a mask of ones.
    """
    extra = dit.config.in_channels - x.shape[-1]
    if extra == 0:
        return x
    condition = x.new_zeros(*x.shape[:-1], extra)  # [B, T, h, w, C + 1], the mask last
    for index in given.frames:
        condition[:, index, ..., -1] = 1.0
    if given.source is not None:
        condition[..., :-1] = given.source.to(x)
        condition[..., -1] = 1.0
    return torch.cat([x, condition], dim=-1)  # [B, T, h, w, in_channels]


def check_given(given: Given, shape: Sequence[int]) -> None:
    """Raise ValueError unless the given latents go with latents of `shape` [B, T, h, w, C]."""
    B, T, *picture = shape
    for index, frame in given.frames.items():
        if not 0 <= index < T:
            raise ValueError(
                f"a given frame must be one of the {T} latent frames, got number {index}; "
                "count from 0"
            )
        _check_latent(f"given frame {index}", frame, [B, 1, *picture])
    if given.source is not None:
        _check_latent("the picture to edit", given.source, list(shape))


def _check_latent(name: str, latent: Tensor, wanted: list[int]) -> None:
    if list(latent.shape) not in (wanted, [1, *wanted[1:]]):
        raise ValueError(
            f"{name} must have latents of shape {wanted} or batch 1, got {list(latent.shape)}; "
            "encode it at the result's size"
        )
