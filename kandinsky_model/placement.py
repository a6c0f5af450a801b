# SPDX-License-Identifier: Apache-2.0
"""What lives where during a run, decided before it begins: for every stage a way to work that keeps within a budget of device memory.

A stage is offered its ways to work, fastest first, each with the bytes that it needs at its worst moment; the first that fits is taken.
Bytes are those of tensors: a GPU's driver keeps some hundred megabytes of its own beside them, which no program can give back.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .config import DiTConfig
from .geometry import Grid
from .memory import FREE_SHARE, DecodePlan
from .offload import layout, streamed_layers, tensors_of
from .plan import Chunks

# On a GPU, beside the tensors of a block: lists or maps of a kernel of ours (64 MiB, or those of one head where that is more),
# workspaces of cuBLAS, and what the allocator rounds up.
SCRATCH_BYTES, LIST_BYTES = 256 << 20, 2
FREE_CHUNKS, SMALLEST_CHUNKS = ((1, 16384), (2, 8192), (4, 4096)), ((8, 2048), (math.inf, 1024))  # groups of heads, tokens
WIDE = 4  # bytes of latents, velocities, modulations, means and log-sum-exps: fp32 whatever the weights are


@dataclass(frozen=True)
class Weights:
    """Bytes of a network: of each of its `layers`, of what runs `once` and stays in host memory, and of all else. See `offload`."""

    layers: tuple[int, ...] = ()
    once: int = 0
    rest: int = 0

    @classmethod
    def of(cls, network: nn.Module | None) -> Weights:
        if network is None:
            return cls()
        layers, once = (list(getattr(network, name, ())) for name in ("layers", "once"))
        size = lambda modules, without=(): layout(tensors_of(modules, without))[1]  # noqa: E731
        return cls(tuple(size([layer], once) for layer in layers), size(once), size([network], [*layers, *once]))

    @property
    def total(self) -> int:
        return sum(self.layers) + self.once + self.rest

    def on_device(self, resident: int) -> int:
        """With so many layers that stay, and two buffers through which the others go."""
        streamed = [self.layers[i] for i in streamed_layers(len(self.layers), resident)]
        return self.rest + sum(self.layers) - sum(streamed) + max(streamed, default=0) * min(2, len(streamed))


@dataclass(frozen=True)
class Stage:
    """A way to work: the bytes of weights on the device and of all else at the worst moment.

    resident: how many layers of the network stay on the device, the others being streamed. chunks: for the transformer.
    """

    weights: int
    working: int
    how: str = ""
    resident: int = 0
    chunks: Chunks = Chunks()

    @property
    def peak_bytes(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class RunPlan:
    """The chosen way of every stage. together: all networks stay on the device; else each is there only while its stage lasts."""

    budget: int
    stages: dict[str, Stage]
    together: bool

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages.values())

    def __str__(self) -> str:
        return "\n".join(f"{name}: {stage.peak_bytes / 1e9:.2f} of {self.budget / 1e9:.2f} GB{stage.how and ': '}{stage.how}"
                         for name, stage in self.stages.items())


def plan_run(ways: Mapping[str, Iterable[Stage]], everything: int, budget: int) -> RunPlan:
    """The first way of each stage that fits into `budget` bytes.

    ways: by the name of the stage, fastest first and thriftiest last. everything: bytes of all networks together; where they fit with
    the fastest way of every stage, nothing need ever move. ValueError where a stage cannot fit, naming the least budget.
    """
    ways = {name: list(stages) for name, stages in ways.items()}
    most = everything + max(stages[0].working for stages in ways.values())
    if most <= budget:
        stages = {name: Stage(everything, stages[0].working, "all weights stay on the device", stages[0].resident, stages[0].chunks)
                  for name, stages in ways.items()}
        return RunPlan(budget, stages, True)
    least = {name: min(stage.peak_bytes for stage in stages) for name, stages in ways.items()}
    worst = max(least, key=least.get)
    if least[worst] > budget:
        raise ValueError(f"this run requires a memory budget of at least {least[worst] / 1e9:.3g} GB ({least[worst]} bytes), for {worst}, "
                         f"got {budget / 1e9:.3g} GB; raise it, or ask for fewer frames or pixels")
    return RunPlan(budget, {name: next(stage for stage in stages if stage.peak_bytes <= budget) for name, stages in ways.items()}, False)


def layered(weights: Weights, working: int) -> Iterator[Stage]:
    """Ways to run a network: all its layers resident, or as many as there is room for."""
    for resident in range(len(weights.layers), -1, -1):
        yield Stage(weights.on_device(resident), working, _layers(weights, resident), resident)


def _layers(weights: Weights, resident: int) -> str:
    count = len(weights.layers)
    return "all weights resident" if resident == count else f"{count - resident} of {count} layers streamed"


@dataclass(frozen=True)
class Job:
    """What is to be sampled, in one batch. dtype: of activations. text_tokens: of the longest prompt."""

    config: DiTConfig
    grid: Grid
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    steps: int = 50
    guided: bool = True
    nabla: bool = False
    cache: str = "none"
    text_tokens: int = 256
    on_cpu: bool = False  # where the table of modulations is on the device, and kernels' scratch memory is nobody's business

    @property
    def stream(self) -> int:
        """Bytes of one tensor as wide as the residual stream."""
        return self.batch * self.grid.tokens * self.config.model_dim * self.dtype.itemsize


def sampling_ways(job: Job, weights: Weights) -> Iterator[Stage]:
    """Ways to sample: smaller chunks before streamed weights, as they cost next to nothing, but the smallest chunks last."""
    chunks = [chunks_of(job.config, *numbers) for numbers in (*FREE_CHUNKS, *SMALLEST_CHUNKS)]
    last, count = len(FREE_CHUNKS) - 1, len(weights.layers)
    ways = [(count, one) for one in chunks[:last]] + [(resident, chunks[last]) for resident in range(count, -1, -1)]
    for resident, one in ways + [(0, one) for one in chunks[last + 1 :]]:
        how = _layers(weights, resident) + (f", {one.heads} heads and {one.tokens} tokens at a time" if one.heads else "")
        yield Stage(weights.on_device(resident), sampling_bytes(job, one), how, resident, one)


def chunks_of(config: DiTConfig, groups: float, tokens: int) -> Chunks:
    return Chunks(None if groups == 1 else max(1, math.ceil(config.num_heads / groups)), tokens)


def sampling_bytes(job: Job, chunks: Chunks) -> int:
    """Bytes at the worst moment of sampling, without the networks' weights.

    That moment lies in a visual block. With t for one tensor of the residual stream's size there are, all through the pass,

    - latents: the noise, the current ones, the model's input, and per branch the velocity of this step or the last;
    - the plan's positions and orders, the prompts, the text in the pass and its keys and values, and the modulations of the pass (on a
      CPU those of all passes, and while they are made once more those of one prompt);
    - what a cache keeps: per branch t (mag) or 2 t (first-block, and t once more while the first block runs);
    - the residual stream and its norm, 2 t, and where the blocks take all tokens at once its beginning, which the caller holds, t;

    and then the larger of

    - self-attention: queries, keys and values as one product, queries and keys normalised, and the result: 6 t, or the result of all
      heads and four tensors of a group's: t + 4 t * heads / all. With NABLA also two fp32 means per block and the bits of the
      selection, and always a log-sum-exp per token, each for the heads at once;
    - the rest: what self-attention gave, t, and for each token of a part its stream and norm and either the wide activation before and
      after GELU, or a branch and the next stream and norm.
    """
    config, size, batch = job.config, job.dtype.itemsize, job.batch
    tokens, t = batch * job.grid.tokens, job.stream
    channel, heads = config.model_dim * size, min(chunks.heads or config.num_heads, config.num_heads)
    part = max(1, chunks.tokens // batch) * batch
    whole = part >= tokens
    share, blocks = heads / config.num_heads, batch * job.grid.blocks
    attention = (6 if chunks.heads is None else 1 + 4 * share) * t + WIDE * tokens * heads
    if job.nabla:
        bits = blocks * heads * WIDE * math.ceil(job.grid.blocks / 32)
        attention += 2 * WIDE * blocks * config.model_dim * share + bits
    rest = t + min(part, tokens) * max(5 * channel, 2 * channel + 2 * config.ff_dim * size)
    held = (2 + (whole and (2 if job.cache == "first-block" else 1))) * t + _cache_bytes(job) + _pass_bytes(job)
    scratch = 0 if job.on_cpu else max(SCRATCH_BYTES, LIST_BYTES * job.grid.blocks**2)
    return math.ceil(max(held + max(attention, rest) + scratch, _table_bytes(job, making=True)))


def _cache_bytes(job: Job) -> int:
    branches = 1 + job.guided
    return {"none": 0, "mag": branches, "first-block": 2 * branches + 1}[job.cache] * job.stream


def _pass_bytes(job: Job) -> int:
    """Latents, plan, texts and modulations."""
    config, size = job.config, job.dtype.itemsize
    latents = math.prod(config.patch_size) * (config.in_visual_dim * (3 + job.guided) + config.in_channels) * WIDE
    plan = 4 * 3 + (2 * 8 if job.nabla else 0)
    texts = ((1 + job.guided) * config.in_text_dim + 4 * config.model_dim) * size
    table = _table_bytes(job) if job.on_cpu else _vectors_bytes(job)
    return job.grid.tokens * (job.batch * latents + plan) + job.batch * job.text_tokens * texts + table


def _vectors_bytes(job: Job) -> int:
    """Of the modulations of one pass."""
    config = job.config
    return (6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2) * config.model_dim * WIDE * job.batch


def _table_bytes(job: Job, making: bool = False) -> int:
    return (1 + job.guided + making) * job.steps * _vectors_bytes(job) if job.on_cpu else 0


def decoding_ways(weights: Weights, schemes: Iterable[DecodePlan], beside: int) -> Iterator[Stage]:
    """Ways to decode, with room for the workspaces of convolutions. beside: bytes of latents and of the frames given out."""
    for scheme in schemes:
        yield Stage(weights.total, math.ceil(scheme.predicted_peak_bytes / FREE_SHARE) + beside, f"scheme {scheme.scheme}")


def free_bytes(device: torch.device, own: int = 0) -> int | None:
    """What a run may use unless it is told: a share of what is free on a GPU, `own` bytes of ours there included; None on a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + reserved + own))
