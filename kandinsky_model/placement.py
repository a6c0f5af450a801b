# SPDX-License-Identifier: Apache-2.0
"""What lives where during a run, decided before it begins: for every stage a way to work that keeps
within a budget of device memory.

A stage is offered its ways to work, fastest first, each with the bytes that it needs at its worst
moment; the first that fits is taken.
Bytes are those of tensors: a GPU's driver keeps some hundred megabytes of its own beside them,
which no program can give back.
"""

from __future__ import annotations

from collections.abc import Mapping

from .devices.budget import Way, Weights, text_ways
from .dit.accounting import Job, sampling_ways
from .vae.accounting import decoding_ways, picture_ways
from .vae.hunyuan import HunyuanVideoVAE


def ways_to_run(
    weights: Mapping[str, Weights],
    job: Job,
    vae: HunyuanVideoVAE | None,
    policy: str,
    pictures: bool = False,
) -> dict[str, list[Way]]:
    """Ways for every stage, in order, of which the networks are there. weights: of text, dit and
    vae. vae: None for one of pictures."""
    grid, ways = job.grid, {}
    latents = grid.T, 2 * grid.Y, 2 * grid.X
    if "text" in weights:
        ways["text"] = text_ways(weights["text"])
    if "vae" in weights and pictures:
        ways["pictures"] = picture_ways(weights["vae"], vae, (16 * grid.Y, 16 * grid.X), job.dtype)
    if "dit" in weights:
        ways["sampling"] = sampling_ways(job, weights["dit"])
    if "vae" in weights:
        ways["decoding"] = decoding_ways(weights["vae"], vae, latents, job.dtype, policy)
    return {name: list(stages) for name, stages in ways.items()}
