# SPDX-License-Identifier: Apache-2.0
"""What a training needs of a device, and the ways to make do with less of it: as `placement` plans
runs, so this plans a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..devices.budget import Placement, Way, Weights, choose_ways
from ..dit.accounting import LIST_BYTES, SCRATCH_BYTES, WIDE, Job
from .adapters import targeted
from .config import TrainConfig
from .network import Computation

TOKENS = (16384, 4096, 1024)  # of a block at a time, in everything but self-attention
MOMENTS = 2  # of AdamW, beside gradient and average, all of them fp32


@dataclass(frozen=True)
class Trained:
    """What is trained. numbers: how many. full: they are the network's own weights. average: one is
    kept of them. teacher: a second network, of distillation of all weights."""

    numbers: int
    full: bool = False
    average: bool = True
    teacher: bool = False

    @classmethod
    def of(cls, dit: nn.Module, config: TrainConfig) -> Trained:
        full = config.lora is None
        numbers = (
            sum(parameter.numel() for parameter in dit.parameters())
            if full
            else sum(
                config.lora.rank * (layer.in_features + layer.out_features)
                for layer in targeted(dit, config.lora.targets).values()
            )
        )
        return cls(numbers, full, config.ema > 0, full and config.distill is not None)

    @property
    def state(self) -> int:
        """Bytes of adapters, gradients, moments and average."""
        return WIDE * self.numbers * (1 + MOMENTS + self.average + (not self.full))


@dataclass(frozen=True)
class TrainingWay(Way):
    """A `Way` and the way to compute it."""

    computation: Computation = Computation()


def plan_training(job: Job, weights: Weights, trained: Trained, budget: int) -> Placement:
    """How to train within `budget` bytes of the device, as the one stage "training"; ValueError
    where that cannot be, naming the least."""
    ways = {"training": ways_to_train(job, weights, trained)}
    return choose_ways(ways, weights.total * (1 + trained.teacher), budget)


def ways_to_train(job: Job, weights: Weights, trained: Trained) -> Iterator[TrainingWay]:
    """Ways to train, fastest first: fewer tokens at a time cost next to nothing, inputs of blocks
    in host memory little, streamed weights more; weights that are trained cannot be streamed."""
    count = job.config.num_visual_blocks
    ways = [
        Computation(tokens=TOKENS[0]),
        Computation(tokens=TOKENS[1]),
        Computation(tokens=TOKENS[1], host=True),
    ]
    if not trained.full:
        ways += [
            Computation(tokens=TOKENS[1], host=True, resident=resident)
            for resident in range(count - 1, -1, -1)
        ]
    ways.append(Computation(tokens=TOKENS[2], host=True, resident=None if trained.full else 0))
    for way in ways:
        resident = count if way.resident is None else way.resident
        how = (
            f"{count - resident} of {count} blocks streamed"
            if resident < count
            else "all weights resident"
        )
        how += ", inputs of blocks in host memory" if way.host else ""
        held = weights_on_device(weights, job.config.num_text_blocks, resident) + (
            weights.total if trained.teacher else 0
        )
        # of a block, as its products read them
        narrow = max(weights.layers) * job.dtype.itemsize // WIDE if trained.full else 0
        yield TrainingWay(
            held,
            trained.state + step_bytes(job, way) + narrow,
            f"{how}, {way.tokens} tokens at a time",
            resident,
            computation=way,
        )


def weights_on_device(weights: Weights, text_blocks: int, resident: int) -> int:
    """With so many visual blocks that stay. Where some do not, there are two buffers for them, and
    what runs once is in host memory."""
    stay, blocks = weights.layers[:text_blocks], weights.layers[text_blocks:]
    if resident >= len(blocks):
        return weights.total
    return Weights(blocks, 0, weights.rest + sum(stay)).on_device(resident)


def step_bytes(job: Job, way: Computation) -> int:
    """Bytes at the worst moment of a step, without weights and what is trained: in the backward of
    the last visual block.

    With t for one tensor of the residual stream's size, and c for one of a part of its tokens,
    there are then

    - the inputs of all blocks, t each, or with `host` this block's alone, and the gradient of its
      output, t;
    - of its self-attention the norm, queries, keys and values, queries and keys normalised, and the
      result, 7 t;
    - the gradients of the result and of the input, 2 t;

    and then either the gradients of queries, keys and values, 3 t, with what a kernel for dense
    attention adds up in, in fp32; or, of a part, ten tensors around cross-attention, and in the
    feed-forward layers the wide ones before and after GELU, their gradients, and what an adapter's
    sum passes through.
    """
    config, size, batch = job.config, job.dtype.itemsize, job.batch
    tokens, t = batch * job.grid.tokens, job.stream
    part = min(tokens, max(1, way.tokens // batch) * batch)
    held = (
        (1 if way.host else config.num_visual_blocks) + 1 + 7 + 2
    ) * t + WIDE * tokens * config.num_heads
    attention = 3 * t + (0 if job.nabla or job.on_cpu else WIDE * tokens * config.model_dim)
    if job.nabla:
        blocks = batch * job.grid.blocks
        attention += (
            2 * WIDE * blocks * config.model_dim
            + 2 * blocks * config.num_heads * WIDE * math.ceil(job.grid.blocks / 32)
        )
    rest = part * size * (10 * config.model_dim + 4 * config.ff_dim)
    scratch = 0 if job.on_cpu else max(SCRATCH_BYTES, LIST_BYTES * job.grid.blocks**2)
    return held + max(attention, rest) + _small_bytes(job) + scratch


def _small_bytes(job: Job) -> int:
    """Latents and velocities, the plan, texts with all that their blocks keep, and modulations."""
    config, size = job.config, job.dtype.itemsize
    latents = math.prod(config.patch_size) * (7 * config.in_visual_dim + config.in_channels) * WIDE
    kept = (
        config.num_text_blocks * (12 * config.model_dim + 2 * config.ff_dim)
        + 4 * config.model_dim
        + config.in_text_dim
    )
    vectors = (
        (6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2)
        * config.model_dim
        * WIDE
        * job.batch
    )
    return (
        job.batch * (job.grid.tokens * latents + job.text_tokens * kept * size)
        + 28 * job.grid.tokens
        + 3 * vectors
    )
