# SPDX-License-Identifier: Apache-2.0
"""How many bytes decoding a clip and encoding a picture take, for every way to do them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..devices.available import FREE_SHARE
from ..devices.budget import Way, Weights
from .hunyuan import HunyuanVideoVAE
from .stages import POSITIONS
from .tiles import TilePlan

WIDE = 4  # bytes of an element of latents and previews, which are fp32
PIECE_PIXELS = 8 * POSITIONS  # of the two last frames of a chunk, or of more where frames are small


# Tensors of this many channels at full size that encoding and decoding a picture as a whole holds
# at once, measured on diffusers' VAE.
PICTURE_CHANNELS, PICTURE_TENSORS = 128, (5, 6)


@dataclass(frozen=True)
class DecodingWay(Way):
    """A `Way` to decode or encode. scheme_bytes: what the VAE's streaming scheme may use."""

    scheme_bytes: int | None = None


def decoding_ways(
    weights: Weights,
    vae: HunyuanVideoVAE | None,
    latents: tuple[int, int, int],
    dtype: torch.dtype,
    policy: str,
) -> Iterator[DecodingWay]:
    """Ways to decode one video, with room for the workspaces of convolutions, the latents and the
    frames given out. vae: None for one of pictures, which works as a whole.

    Frames are counted as pixels of three channels. A piece of them is there twice, and 2.5 times in
    fp32 on its way to 8 bits; under "official" a tile, of full size, is there five times while its
    pieces are joined, faded and kept for the next. A "preview" is four videos in fp32, and what its
    map is fitted on. latents: (T, H / 8, W / 8) of the video. dtype: of activations.
    """
    (T, rows, columns), size = latents, dtype.itemsize
    height, width = 8 * rows, 8 * columns
    area, frames = height * width, 4 * T - 3
    if vae is None:
        yield DecodingWay(
            weights.total,
            math.ceil(PICTURE_TENSORS[1] * PICTURE_CHANNELS * area * size / FREE_SHARE),
            "as a whole",
        )
        return
    if policy == "preview":
        fit = vae.decode_plans((1, vae.config.latent_channels, 1, 16, 16))[0].predicted_peak_bytes
        yield DecodingWay(weights.total, fit + 4 * frames * 3 * area * WIDE, "preview")
        return
    shape = whole = (1, vae.config.latent_channels, T, rows, columns)
    tiles = TilePlan.for_frame(height, width)
    beside = 3 * max(2 * area, PIECE_PIXELS) * (2 * size + 10)
    if policy == "official":
        beside = 3 * min(tiles.frames, frames) * area * 5 * size
        shape = tiles.largest(torch.empty(whole, device="meta")).shape
    for plan in vae.decode_plans(shape):
        working = (
            math.ceil(plan.predicted_peak_bytes / FREE_SHARE) + beside + 3 * WIDE * math.prod(whole)
        )
        yield DecodingWay(
            weights.total,
            working,
            f"scheme {plan.scheme}" + (" for each tile" if policy == "official" else ""),
            scheme_bytes=plan.predicted_peak_bytes,
        )


def picture_ways(
    weights: Weights, vae: HunyuanVideoVAE | None, size: tuple[int, int], dtype: torch.dtype
) -> Iterator[DecodingWay]:
    """Ways to encode one picture of `size` (height, width) pixels; vae: None as above."""
    height, width = size
    if vae is None:
        yield DecodingWay(
            weights.total,
            math.ceil(
                PICTURE_TENSORS[0] * PICTURE_CHANNELS * height * width * dtype.itemsize / FREE_SHARE
            ),
        )
        return
    for plan in vae.encode_plans((1, 3, 1, height, width)):
        working = math.ceil(plan.predicted_peak_bytes / FREE_SHARE) + 3 * height * width * WIDE
        yield DecodingWay(
            weights.total, working, f"scheme {plan.scheme}", scheme_bytes=plan.predicted_peak_bytes
        )
