# SPDX-License-Identifier: Apache-2.0
"""How many bytes sampling takes: counted tensor by tensor at the worst moment of a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import DiTConfig
from ..devices.budget import Way, Weights, describe_layers
from .geometry import Grid
from .layout import Chunks
from .quantized import ROWS_AT_ONCE

# On a GPU, beside the tensors of a block: lists or maps of a kernel of ours (64 MiB, or those of
# one head where that is more), workspaces of cuBLAS, and what the allocator rounds up.
SCRATCH_BYTES, LIST_BYTES = 256 << 20, 2


# groups of heads, tokens
FREE_CHUNKS, SMALLEST_CHUNKS = ((1, 16384), (2, 8192), (4, 4096)), ((8, 2048), (math.inf, 1024))


# bytes of latents, velocities, modulations, means and log-sum-exps: fp32 whatever the weights are
WIDE = 4


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


@dataclass(frozen=True)
class SamplingWay(Way):
    """A `Way` to sample, with how much of a visual block is computed at once."""

    chunks: Chunks = Chunks()


def sampling_ways(job: Job, weights: Weights) -> Iterator[SamplingWay]:
    """Ways to sample: smaller chunks before streamed weights, as they cost next to nothing, but the
    smallest chunks last."""
    chunks = [chunks_of(job.config, *numbers) for numbers in (*FREE_CHUNKS, *SMALLEST_CHUNKS)]
    last, count = len(FREE_CHUNKS) - 1, len(weights.layers)
    ways = [(count, one) for one in chunks[:last]] + [
        (resident, chunks[last]) for resident in range(count, -1, -1)
    ]
    for resident, one in ways + [(0, one) for one in chunks[last + 1 :]]:
        groups = 1 if one.heads is None else math.ceil(job.config.num_heads / one.heads)
        how = describe_layers(weights, resident) + (
            f", heads in {groups} groups, {one.tokens} tokens at a time" if groups > 1 else ""
        )
        yield SamplingWay(weights.on_device(resident), sampling_bytes(job, one), how, resident, one)


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
