# SPDX-License-Identifier: Apache-2.0
"""What lives where during a run, decided before it begins: for every stage a way to work that keeps
within a budget of device memory.

A stage is offered its ways to work, fastest first, each with the bytes that it needs at its worst
moment; the first that fits is taken.
Bytes are those of tensors: a GPU's driver keeps some hundred megabytes of its own beside them,
which no program can give back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .config import DiTConfig
from .devices.offload import layout, streamed_layers, tensors_of
from .dit.geometry import Grid
from .dit.layout import Chunks
from .dit.quantized import ROWS_AT_ONCE
from .vae.hunyuan import HunyuanVideoVAE
from .vae.schemes import FREE_SHARE
from .vae.stages import POSITIONS
from .vae.tiles import TilePlan

# On a GPU, beside the tensors of a block: lists or maps of a kernel of ours (64 MiB, or those of
# one head where that is more), workspaces of cuBLAS, and what the allocator rounds up.
SCRATCH_BYTES, LIST_BYTES = 256 << 20, 2
# groups of heads, tokens
FREE_CHUNKS, SMALLEST_CHUNKS = ((1, 16384), (2, 8192), (4, 4096)), ((8, 2048), (math.inf, 1024))
PIECE_PIXELS = 8 * POSITIONS  # of the two last frames of a chunk, or of more where frames are small
# Tensors of this many channels at full size that encoding and decoding a picture as a whole holds
# at once, measured on diffusers' VAE.
PICTURE_CHANNELS, PICTURE_TENSORS = 128, (5, 6)
# bytes of latents, velocities, modulations, means and log-sum-exps: fp32 whatever the weights are
WIDE = 4


@dataclass(frozen=True)
class Weights:
    """Bytes of a network: of each of its `layers`, of what runs `once` and stays in host memory,
    and of all else. See `offload`."""

    layers: tuple[int, ...] = ()
    once: int = 0
    rest: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> Weights:
        layers, once = (list(getattr(network, name, ())) for name in ("layers", "once"))
        size = lambda modules, without=(): layout(tensors_of(modules, without))[1]  # noqa: E731
        return cls(
            tuple(size([layer], once) for layer in layers),
            size(once),
            size([network], [*layers, *once]),
        )

    @property
    def total(self) -> int:
        return sum(self.layers) + self.once + self.rest

    def on_device(self, resident: int) -> int:
        """With so many layers that stay, and two buffers through which the others go."""
        streamed = [self.layers[i] for i in streamed_layers(len(self.layers), resident)]
        return (
            self.rest
            + sum(self.layers)
            - sum(streamed)
            + max(streamed, default=0) * min(2, len(streamed))
        )


@dataclass(frozen=True)
class Stage:
    """A way to work: the bytes of weights on the device and of all else at the worst moment.

    resident: how many layers of the network stay on the device, the others being streamed. chunks:
    for the transformer. scheme_bytes: for the VAE, what its scheme may use.
    """

    weights: int
    working: int
    how: str = ""
    resident: int = 0
    chunks: Chunks = Chunks()
    scheme_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class RunPlan:
    """The chosen way of every stage. together: all networks stay on the device; else each is there
    only while its stage lasts."""

    budget: int
    stages: dict[str, Stage]
    together: bool

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages.values())

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {stage.peak_bytes / 1e9:.3g} of {self.budget / 1e9:.3g} "
            f"GB{stage.how and ': '}{stage.how}"
            for name, stage in self.stages.items()
        )


def plan_run(ways: Mapping[str, Iterable[Stage]], everything: int, budget: int) -> RunPlan:
    """The first way of each stage that fits into `budget` bytes.

    ways: by the name of the stage, fastest first. everything: bytes of all networks together; where
    they fit with the fastest way of every stage, nothing need ever move. TypeError unless the
    budget is an int; ValueError where a stage cannot fit, naming the least.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"a memory budget must be an int, of bytes, got {budget!r}: convert it")
    ways = {name: list(stages) for name, stages in ways.items()}
    if everything + max(stages[0].working for stages in ways.values()) <= budget:
        return RunPlan(
            budget,
            {
                name: replace(stages[0], weights=everything, how="all weights stay on the device")
                for name, stages in ways.items()
            },
            True,
        )
    least = {name: min(stage.peak_bytes for stage in stages) for name, stages in ways.items()}
    worst = max(least, key=least.get)
    if least[worst] > budget:
        raise ValueError(
            f"{worst} requires a memory budget of at least {least[worst]} bytes "
            f"({least[worst] / 1e9:.3g} GB), got {budget}: "
            "raise it, or ask for fewer frames or pixels"
        )
    return RunPlan(
        budget,
        {
            name: next(stage for stage in stages if stage.peak_bytes <= budget)
            for name, stages in ways.items()
        },
        False,
    )


def text_ways(weights: Weights) -> Iterator[Stage]:
    """Ways to run a text encoder: all its layers resident, or as many as there is room for.

    Its tensors are taken to need as much as its largest layer: those of a prompt's 400 tokens are
    an eighth of one of Qwen2.5-VL-7B.
    """
    working = max(weights.layers, default=weights.rest)
    for resident in range(len(weights.layers), -1, -1):
        yield Stage(weights.on_device(resident), working, _layers(weights, resident), resident)


def _layers(weights: Weights, resident: int) -> str:
    count = len(weights.layers)
    return (
        "all weights resident"
        if resident == count
        else (f"{count - resident} of {count} layers streamed")
    )


@dataclass(frozen=True)
class Job:
    """What is to be sampled, in one batch. dtype: of activations. text_tokens: of the longest
    prompt. adapters: how many are active.
    quantization: the mode, or "". on_cpu: where modulations are on the device, and kernels' scratch
    memory is nobody's business."""

    config: DiTConfig
    grid: Grid
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    steps: int = 50
    guided: bool = True
    nabla: bool = False
    cache: str = "none"
    text_tokens: int = 256
    adapters: int = 0
    quantization: str = ""
    on_cpu: bool = False

    @property
    def stream(self) -> int:
        """Bytes of one tensor as wide as the residual stream."""
        return self.batch * self.grid.tokens * self.config.model_dim * self.dtype.itemsize


def sampling_ways(job: Job, weights: Weights) -> Iterator[Stage]:
    """Ways to sample: smaller chunks before streamed weights, as they cost next to nothing, but the
    smallest chunks last."""
    chunks = [chunks_of(job.config, *numbers) for numbers in (*FREE_CHUNKS, *SMALLEST_CHUNKS)]
    last, count = len(FREE_CHUNKS) - 1, len(weights.layers)
    ways = [(count, one) for one in chunks[:last]] + [
        (resident, chunks[last]) for resident in range(count, -1, -1)
    ]
    for resident, one in ways + [(0, one) for one in chunks[last + 1 :]]:
        groups = 1 if one.heads is None else math.ceil(job.config.num_heads / one.heads)
        how = _layers(weights, resident) + (
            f", heads in {groups} groups, {one.tokens} tokens at a time" if groups > 1 else ""
        )
        yield Stage(weights.on_device(resident), sampling_bytes(job, one), how, resident, one)


def chunks_of(config: DiTConfig, groups: float, tokens: int) -> Chunks:
    return Chunks(None if groups == 1 else max(1, math.ceil(config.num_heads / groups)), tokens)


def sampling_bytes(job: Job, chunks: Chunks) -> int:
    """Bytes at the worst moment of sampling, without the networks' weights.

    That moment lies in a visual block. With t for one tensor of the residual stream's size there
    are, all through the pass,

    - latents: the noise, the current ones, the model's input, and with guidance the velocity of the
      first pass;
    - the plan's positions, orders and angles, the prompts, the text in the pass and its keys and
      values, and the modulations of the pass (on a CPU those of all passes, and while they are made
      once more those of one prompt);
    - what a cache keeps: per branch t (mag) or 2 t (first-block, and t once more while the first
      block runs);
    - the residual stream and its norm, 2 t, and where the blocks take all tokens at once its
      beginning, which the caller holds, t;

    and then the larger of

    - self-attention: queries, keys and values as one product, queries and keys normalised, and the
        result: 6 t, or the result of all heads and four tensors of a group's: t + 4 t * heads /
        all. With NABLA also two fp32 means per block and the bits of the selection, and always a
        log-sum-exp per token, each for the heads at once;
      - the rest: what self-attention gave, t, and for each token of a part its stream and norm and
        either the wide activation before and after GELU, or a branch and the next stream and norm.

    Linear layers may need more for a moment, beside what is there then: see `_product_bytes`. Only
    where the video is smaller than its text does the moment lie in a text block, which is computed
    at once.
    """
    config, size, batch = job.config, job.dtype.itemsize, job.batch
    tokens, t = batch * job.grid.tokens, job.stream
    channel, heads = (
        config.model_dim * size,
        min(chunks.heads or config.num_heads, config.num_heads),
    )
    part = max(1, chunks.tokens // batch) * batch
    whole = part >= tokens
    share, blocks = heads / config.num_heads, batch * job.grid.blocks
    attention = (6 if chunks.heads is None else 1 + 4 * share) * t + WIDE * tokens * heads
    if job.nabla:
        bits = blocks * heads * WIDE * math.ceil(job.grid.blocks / 32)
        attention += 2 * WIDE * blocks * config.model_dim * share + bits
    joint = chunks.heads is None and not job.adapters
    projected = (3 if chunks.heads is None else 1 + 3 * share) * t
    attention = max(
        attention,
        projected
        + _product_bytes(job, tokens, config.model_dim, config.model_dim * (3 if joint else share)),
    )
    rest = t + max(5 * channel * min(part, tokens), _feed_forward_bytes(job, min(part, tokens)))
    text = 6 * channel * batch * job.text_tokens + _feed_forward_bytes(job, batch * job.text_tokens)
    held = (
        (2 + (whole and (2 if job.cache == "first-block" else 1))) * t
        + _cache_bytes(job)
        + _pass_bytes(job)
    )
    scratch = 0 if job.on_cpu else max(SCRATCH_BYTES, LIST_BYTES * job.grid.blocks**2)
    return math.ceil(
        max(held + max(attention, rest, text) + scratch, _table_bytes(job, making=True))
    )


def _feed_forward_bytes(job: Job, rows: int) -> int:
    """Stream, norm, the wide activation before and after GELU, or it and the output, with what the
    two products need."""
    width, wide, size = job.config.model_dim, job.config.ff_dim, job.dtype.itemsize
    first = max(rows * wide * size, _product_bytes(job, rows, width, wide))
    return rows * (2 * width + wide) * size + max(
        first, rows * width * size + _product_bytes(job, rows, wide, width)
    )


def _product_bytes(job: Job, rows: int, inner: int, outer: float) -> float:
    """What a linear layer needs beside its input and output: with adapters its output twice, with
    two of them three times; a quantised weight in full width, and for products in 8 bits the input
    in fp32 and in 8 bits and the sums twice, of `ROWS_AT_ONCE`."""
    needs = (1 + min(job.adapters, 2)) * rows * outer * job.dtype.itemsize if job.adapters else 0
    if job.quantization:
        needs = max(needs, inner * outer * job.dtype.itemsize)
    if job.quantization.endswith("-dynamic"):
        needs = max(
            needs,
            min(rows, ROWS_AT_ONCE) * (5 * inner + 8 * outer)
            + (WIDE * inner * outer if job.on_cpu else 0),
        )
    return needs


def _cache_bytes(job: Job) -> int:
    branches = 1 + job.guided
    return {"none": 0, "mag": branches, "first-block": 2 * branches + 1}[job.cache] * job.stream


def _pass_bytes(job: Job) -> int:
    """Latents, plan, texts and modulations."""
    config, size = job.config, job.dtype.itemsize
    latents = (
        math.prod(config.patch_size)
        * (config.in_visual_dim * (2 + job.guided) + config.in_channels)
        * WIDE
    )
    plan = 4 * 3 + (2 * 8 if job.nabla else 0)
    texts = ((1 + job.guided) * config.in_text_dim + 4 * config.model_dim) * size
    rotary = (
        WIDE
        * config.head_dim
        * (max(job.grid.T, job.grid.Y, job.grid.X) + (1 + job.guided) * job.text_tokens)
    )
    prompts = (1 + job.guided) * (config.in_text_dim2 * size + WIDE * job.steps)
    table = _table_bytes(job) if job.on_cpu else _vectors_bytes(job)
    return (
        job.grid.tokens * (job.batch * latents + plan)
        + job.batch * (job.text_tokens * texts + prompts)
        + rotary
        + table
    )


def _vectors_bytes(job: Job) -> int:
    """Of the modulations of one pass."""
    config = job.config
    return (
        (6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2)
        * config.model_dim
        * WIDE
        * job.batch
    )


def _table_bytes(job: Job, making: bool = False) -> int:
    return (1 + job.guided + making) * job.steps * _vectors_bytes(job) if job.on_cpu else 0


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


def ways_to_run(
    weights: Mapping[str, Weights],
    job: Job,
    vae: HunyuanVideoVAE | None,
    policy: str,
    pictures: bool = False,
) -> dict[str, list[Stage]]:
    """Ways for every stage, in order, of which the networks are there. weights: of text, dit and
    vae. vae: None for one of pictures."""
    ways = {}
    if "text" in weights:
        ways["text"] = text_ways(weights["text"])
    if "vae" in weights and pictures:
        ways["pictures"] = picture_ways(weights["vae"], vae, job)
    if "dit" in weights:
        ways["sampling"] = sampling_ways(job, weights["dit"])
    if "vae" in weights:
        ways["decoding"] = decoding_ways(weights["vae"], vae, job, policy)
    return {name: list(stages) for name, stages in ways.items()}


def free_bytes(device: torch.device, own: int = 0) -> int | None:
    """What a run may use unless it is told: a share of what is free on a GPU, `own` bytes of ours
    there included; None on a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + reserved + own))
