# SPDX-License-Identifier: Apache-2.0
"""How many bytes decoding a clip and encoding a picture take, for every way to do them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..devices.available import FREE_SHARE
from ..devices.budget import Stage, Weights
from ..dit.accounting import WIDE, Job
from .hunyuan import HunyuanVideoVAE
from .stages import POSITIONS
from .tiles import TilePlan

PIECE_PIXELS = 8 * POSITIONS  # of the two last frames of a chunk, or of more where frames are small


# Tensors of this many channels at full size that encoding and decoding a picture as a whole holds
# at once, measured on diffusers' VAE.
PICTURE_CHANNELS, PICTURE_TENSORS = 128, (5, 6)


def decoding_ways(
    weights: Weights, vae: HunyuanVideoVAE | None, job: Job, policy: str
) -> Iterator[Stage]:
    """Ways to decode one video, with room for the workspaces of convolutions, the latents and the
    frames given out. vae: None for one of pictures, which works as a whole.

    Frames are counted as pixels of three channels. A piece of them is there twice, and 2.5 times in
    fp32 on its way to 8 bits; under "official" a tile, of full size, is there five times while its
    pieces are joined, faded and kept for the next. A "preview" is four videos in fp32, and what its
    map is fitted on.
    """
    grid, size, area = job.grid, job.dtype.itemsize, 256 * job.grid.Y * job.grid.X
    if vae is None:
        yield Stage(
            weights.total,
            math.ceil(PICTURE_TENSORS[1] * PICTURE_CHANNELS * area * size / FREE_SHARE),
            "as a whole",
        )
        return
    if policy == "preview":
        fit = vae.decode_plans((1, vae.config.latent_channels, 1, 16, 16))[0].predicted_peak_bytes
        yield Stage(weights.total, fit + 4 * (4 * grid.T - 3) * 3 * area * WIDE, "preview")
        return
    latents, tiles = (
        (1, vae.config.latent_channels, grid.T, 2 * grid.Y, 2 * grid.X),
        TilePlan.for_frame(16 * grid.Y, 16 * grid.X),
    )
    beside, shape = 3 * max(2 * area, PIECE_PIXELS) * (2 * size + 10), latents
    if policy == "official":
        beside = 3 * min(tiles.frames, 4 * grid.T - 3) * area * 5 * size
        shape = tiles.largest(torch.empty(latents, device="meta")).shape
    for plan in vae.decode_plans(shape):
        working = (
            math.ceil(plan.predicted_peak_bytes / FREE_SHARE)
            + beside
            + 3 * WIDE * math.prod(latents)
        )
        yield Stage(
            weights.total,
            working,
            f"scheme {plan.scheme}" + (" for each tile" if policy == "official" else ""),
            scheme_bytes=plan.predicted_peak_bytes,
        )


def picture_ways(weights: Weights, vae: HunyuanVideoVAE | None, job: Job) -> Iterator[Stage]:
    """Ways to encode one picture; None as above."""
    height, width = 16 * job.grid.Y, 16 * job.grid.X
    if vae is None:
        yield Stage(
            weights.total,
            math.ceil(
                PICTURE_TENSORS[0]
                * PICTURE_CHANNELS
                * height
                * width
                * job.dtype.itemsize
                / FREE_SHARE
            ),
        )
        return
    for plan in vae.encode_plans((1, 3, 1, height, width)):
        working = math.ceil(plan.predicted_peak_bytes / FREE_SHARE) + 3 * height * width * WIDE
        yield Stage(
            weights.total, working, f"scheme {plan.scheme}", scheme_bytes=plan.predicted_peak_bytes
        )
