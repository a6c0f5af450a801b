# SPDX-License-Identifier: Apache-2.0
"""The device memory that a training step needs, and the ways to make do with less of it."""

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
from .optimizers import moment_bytes

TOKENS = (16384, 4096, 1024)  # that are computed at a time, in everything but self-attention


@dataclass(frozen=True)
class Trained:
    """The parameters in training.

    numbers: how many there are. moments: bytes that the optimiser keeps of them. full: they are the
    network's own weights. average: a moving average is kept. teacher: a second network is kept,
    which distillation of all weights learns from.
    """

    numbers: int
    moments: int
    full: bool = False
    average: bool = True
    teacher: bool = False

    @classmethod
    def of(cls, dit: nn.Module, config: TrainConfig) -> Trained:
        """The parameters that `config` trains of `dit`, which may be on the meta device."""
        lora = config.lora
        full = lora is None
        if lora is None:
            sizes = [parameter.numel() for parameter in dit.parameters()]
        else:
            layers = targeted(dit, lora.targets).values()
            sides = [side for one in layers for side in (one.in_features, one.out_features)]
            sizes = [lora.rank * side for side in sides]
        return cls(
            numbers=sum(sizes),
            moments=moment_bytes(sizes, config.optimizer),
            full=full,
            average=config.ema > 0,
            teacher=full and config.distill is not None,
        )

    @property
    def state(self) -> int:
        """Bytes of gradients, moments and average, and of an adapter's parameters, in fp32 but for
        moments of 8 bits.

        The network's own weights are counted with the network.
        """
        tensors = 1 + self.average + (not self.full)
        return WIDE * self.numbers * tensors + self.moments


@dataclass(frozen=True)
class TrainingWay(Way):
    """A `Way` of a training step, with the computation it stands for."""

    computation: Computation = Computation()


def plan_training(
    job: Job,
    weights: Weights,
    trained: Trained,
    budget: int,
) -> Placement:
    """The fastest way to train within `budget` bytes of the device, as the one stage "training".

    ValueError, naming the least that is needed, where no way fits.
    """
    networks = 1 + trained.teacher
    ways = {"training": ways_to_train(job, weights, trained)}
    return choose_ways(ways, weights.total * networks, budget)


def ways_to_train(
    job: Job,
    weights: Weights,
    trained: Trained,
) -> Iterator[TrainingWay]:
    """The ways to train, fastest first.

    Fewer tokens at a time cost next to nothing, inputs of blocks in host memory cost little, and
    streamed weights cost more. Weights that are trained cannot be streamed.
    """
    blocks = job.config.num_visual_blocks
    teacher = weights.total if trained.teacher else 0
    # each product of trained weights reads them in the dtype of its activations
    narrow = max(weights.layers) * job.dtype.itemsize // WIDE if trained.full else 0
    for computation in _computations(blocks, trained.full):
        resident = blocks if computation.resident is None else computation.resident
        held = weights_on_device(weights, job.config.num_text_blocks, resident)
        streamed = f"{blocks - resident} of {blocks} blocks streamed"
        how = [
            streamed if resident < blocks else "all weights resident",
            *(["inputs of blocks in host memory"] if computation.host else []),
            f"{computation.tokens} tokens at a time",
        ]
        yield TrainingWay(
            weights=held + teacher,
            working=trained.state + step_bytes(job, computation) + narrow,
            how=", ".join(how),
            resident=resident,
            computation=computation,
        )


def _computations(blocks: int, full: bool) -> Iterator[Computation]:
    yield Computation(tokens=TOKENS[0])
    yield Computation(tokens=TOKENS[1])
    yield Computation(tokens=TOKENS[1], host=True)
    if not full:
        for resident in range(blocks - 1, -1, -1):
            yield Computation(tokens=TOKENS[1], host=True, resident=resident)
    yield Computation(tokens=TOKENS[2], host=True, resident=None if full else 0)


def weights_on_device(
    weights: Weights,
    text_blocks: int,
    resident: int,
) -> int:
    """Bytes of the network's weights on the device while `resident` visual blocks stay there.

    Where some are streamed, there are two buffers for them, and the modulations, which run once a
    pass, are in host memory. The layers of `weights` are text blocks, then visual blocks.
    """
    text = weights.layers[:text_blocks]
    visual = weights.layers[text_blocks:]
    if resident >= len(visual):
        return weights.total
    return Weights(visual, 0, weights.rest + sum(text)).on_device(resident)


def step_bytes(job: Job, computation: Computation) -> int:
    """Bytes of tensors at the worst moment of a step, without weights and `Trained.state`: in the
    backward pass of the last visual block.

    With t for one tensor of the residual stream's size, there are then

    - the inputs of all blocks, t each, or with `host` of this block alone, and the gradient of its
      output, t;
    - of its self-attention the norm, queries, keys and values, queries and keys normalised, and the
      result, 7 t, and the log-sum-exp of every row;
    - the gradients of the result and of the input, 2 t;

    and then either the gradients of queries, keys and values, 3 t, with the fp32 sums of a kernel
    for dense attention; or, of the tokens that are computed at a time, ten tensors around
    cross-attention, and in the feed-forward layers the wide ones before and after GELU, their
    gradients, and what the sum with an adapter's output passes through.
    """
    config = job.config
    t = job.stream
    tokens = job.batch * job.grid.tokens
    inputs = 1 if computation.host else config.num_visual_blocks
    row_sums = WIDE * tokens * config.num_heads
    held = (inputs + 1 + 7 + 2) * t + row_sums
    attention = 3 * t
    if job.nabla:
        attention += _nabla_bytes(job)
    elif not job.on_cpu:
        attention += WIDE * tokens * config.model_dim
    part = min(tokens, max(1, computation.tokens // job.batch) * job.batch)
    rest = part * job.dtype.itemsize * (10 * config.model_dim + 4 * config.ff_dim)
    scratch = 0 if job.on_cpu else max(SCRATCH_BYTES, LIST_BYTES * job.grid.blocks**2)
    return held + max(attention, rest) + _small_bytes(job) + scratch


def _nabla_bytes(job: Job) -> int:
    """Bytes of the block means of queries and keys, and of the selection and its transpose, which
    have a bit for every pair of blocks."""
    config = job.config
    blocks = job.batch * job.grid.blocks
    means = 2 * WIDE * blocks * config.model_dim
    words = math.ceil(job.grid.blocks / 32)
    return means + 2 * blocks * config.num_heads * WIDE * words


def _small_bytes(job: Job) -> int:
    """Bytes of latents and velocities, of the layout, of texts with all that their blocks keep, and
    of modulations."""
    config = job.config
    # per token: seven tensors of latents' size and one model input, fp32
    latents = math.prod(config.patch_size) * (7 * config.in_visual_dim + config.in_channels) * WIDE
    per_text_block = 12 * config.model_dim + 2 * config.ff_dim
    text = config.num_text_blocks * per_text_block + 4 * config.model_dim + config.in_text_dim
    per_sample = job.grid.tokens * latents + job.text_tokens * text * job.dtype.itemsize
    vectors = 6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2
    modulations = vectors * config.model_dim * WIDE * job.batch
    layout = 28 * job.grid.tokens  # order, its inverse and angles
    return job.batch * per_sample + layout + 3 * modulations
