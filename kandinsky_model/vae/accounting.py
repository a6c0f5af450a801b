# SPDX-License-Identifier: Apache-2.0
"""How many bytes decoding a video and encoding a picture take, for every way to do them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..devices.available import FREE_SHARE
from ..devices.budget import Way, Weights
from .hunyuan import HunyuanVideoVAE
from .stages import POSITIONS
from .tiles import Tiling

WIDE = 4  # bytes of an element of latents and previews, which are fp32
RGB = 3
# Pixels of a piece of video that is given out: the two last frames of a chunk, or more where frames
# are small.
PIECE_PIXELS = 8 * POSITIONS

# The image VAE works on a picture as a whole. At the worst moment it holds so many tensors of so
# many channels at full size, measured on diffusers' class.
PICTURE_CHANNELS = 128
ENCODING_TENSORS = 5
DECODING_TENSORS = 6


@dataclass(frozen=True)
class DecodingWay(Way):
    """A `Way` to decode or encode. scheme_bytes: the memory budget for the VAE's scheme."""

    scheme_bytes: int | None = None


def decoding_ways(
    weights: Weights,
    vae: HunyuanVideoVAE | None,
    latents: tuple[int, int, int],
    dtype: torch.dtype,
    policy: str,
) -> Iterator[DecodingWay]:
    """The ways to decode one video: fastest first, each needing less memory.

    vae: None for the image VAE, which works on the whole picture. latents: (T, Y, X). dtype: of
    activations. Beside the scheme, each way leaves room for the workspaces of convolution
    libraries, the latents, and the frames that are given out. A piece of frames is there twice, and
    2.5 times in fp32 on its way to 8 bits. Under "official" a tile, at full size, is there five
    times while its pieces are joined, faded and kept for the next. A "preview" takes four videos in
    fp32, and the decoding that its map is fitted on.
    """
    T, Y, X = latents
    height = 8 * Y
    width = 8 * X
    area = height * width
    frames = 4 * T - 3
    if vae is None:
        working = DECODING_TENSORS * PICTURE_CHANNELS * area * dtype.itemsize
        yield DecodingWay(weights.total, math.ceil(working / FREE_SHARE), "as a whole")
        return
    channels = vae.config.latent_channels
    if policy == "preview":
        fitting = vae.decoding_schemes((1, channels, 1, 16, 16))[0].predicted_peak_bytes
        working = fitting + 4 * frames * RGB * area * WIDE
        yield DecodingWay(weights.total, working, "preview")
        return
    whole = (1, channels, T, Y, X)
    shape: tuple[int, ...] = whole
    beside = RGB * max(2 * area, PIECE_PIXELS) * (2 * dtype.itemsize + 10)
    suffix = ""
    if policy == "official":
        tiling = Tiling.for_frame(height, width)
        shape = tuple(tiling.largest(torch.empty(whole, device="meta")).shape)
        beside = RGB * min(tiling.frames, frames) * area * 5 * dtype.itemsize
        suffix = " for each tile"
    for scheme in vae.decoding_schemes(shape):
        streaming = math.ceil(scheme.predicted_peak_bytes / FREE_SHARE)
        # latents as sampled, scaled and in the dtype of the VAE
        working = streaming + beside + 3 * WIDE * math.prod(whole)
        yield DecodingWay(
            weights.total,
            working,
            f"scheme {scheme.name}{suffix}",
            scheme_bytes=scheme.predicted_peak_bytes,
        )


def picture_ways(
    weights: Weights,
    vae: HunyuanVideoVAE | None,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Iterator[DecodingWay]:
    """The ways to encode one picture of `size` (height, width) pixels, as `decoding_ways`."""
    height, width = size
    if vae is None:
        working = ENCODING_TENSORS * PICTURE_CHANNELS * height * width * dtype.itemsize
        yield DecodingWay(weights.total, math.ceil(working / FREE_SHARE))
        return
    for scheme in vae.encoding_schemes((1, RGB, 1, height, width)):
        streaming = math.ceil(scheme.predicted_peak_bytes / FREE_SHARE)
        working = streaming + RGB * height * width * WIDE
        yield DecodingWay(
            weights.total,
            working,
            f"scheme {scheme.name}",
            scheme_bytes=scheme.predicted_peak_bytes,
        )
