# SPDX-License-Identifier: Apache-2.0
"""A picture given by the user, read in any mode and cut or resized to the shape a checkpoint was
trained for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 2**27  # of a file: more is a decompression bomb or a mistake
SHORTEST_SIDE = 16
LONGEST_RATIO = 8.0


def read_image(source: str | Path | Tensor | Image) -> Tensor:
    """uint8 [3, H, W] from a file's path, a PIL image or a uint8 tensor [H, W, 3].

    Palettes, grey, CMYK and 16-bit pictures become RGB; what is transparent becomes white; a
    photograph is turned as its EXIF data say. Raises FileNotFoundError, TypeError for other objects
    and dtypes, ValueError for pictures that cannot be read, are smaller than 16 pixels or longer
    than 8 times their width.
    """
    if isinstance(source, Tensor):
        pixels = _checked(source).permute(2, 0, 1)  # [3, H, W]
    else:
        pixels = _from_pil(_open(source) if isinstance(source, (str, Path)) else source)
    height, width = pixels.shape[1:]
    shorter, longer = sorted((height, width))
    if shorter < SHORTEST_SIDE or longer > LONGEST_RATIO * shorter:
        raise ValueError(
            "an image must have sides of at least 16 pixels, one at most 8 times "
            f"the other, got {width}x{height}; crop or enlarge it"
        )
    return pixels.contiguous()


def _checked(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[-1] != 3:
        raise TypeError(
            f"an image tensor must be uint8 [H, W, 3], got {image.dtype} "
            f"{list(image.shape)}; convert it first"
        )
    return image


def _open(path: str | Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    if os.path.exists(path):
        check_regular(Path(path))
    try:
        image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(
                f"an image must have at most {MOST_PIXELS:,} pixels, {path} has "
                f"{image.width}x{image.height}; make it smaller"
            )
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the image must exist, but {path} does not; check the path"
        ) from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the image must be one that Pillow can read, but {path} is not "
            f"({error}); save it as png or jpg"
        ) from None
    return image


def _from_pil(image: Image) -> Tensor:
    """uint8 [3, H, W] of a PIL image in any mode; TypeError for another object."""
    import numpy
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise TypeError(
            "an image must be a path, a PIL image or a uint8 tensor [H, W, 3], got "
            f"{type(image).__name__}"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion cuts these values off at 255 instead of scaling them.
        values = numpy.asarray(image, dtype=numpy.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-12)
        levels = (values / top * 255).round().clip(0, 255)
        image = Image.fromarray(levels.astype(numpy.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    pixels = torch.from_numpy(numpy.array(image.convert("RGB")))  # [H, W, 3]
    return pixels.permute(2, 0, 1)  # [3, H, W]


def crop(
    image: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """The largest middle part of uint8 [3, H, W] that has the aspect ratio of height x width."""
    full_height, full_width = image.shape[1:]
    kept_height = min(full_height, round(full_width * height / width))
    kept_width = min(full_width, round(full_height * width / height))
    top = (full_height - kept_height) // 2
    left = (full_width - kept_width) // 2
    return image[:, top : top + kept_height, left : left + kept_width]


def resize(
    image: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """uint8 [3, height, width] of uint8 [3, h, w], on the CPU: bilinear, antialiased, with the
    8-bit arithmetic of picture libraries."""
    batch = image.cpu()[None]  # [1, 3, h, w]
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
