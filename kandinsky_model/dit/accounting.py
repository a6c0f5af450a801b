# SPDX-License-Identifier: Apache-2.0
"""How many bytes sampling takes on the device: counted tensor by tensor at the worst moment of a
pass."""

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

# What a GPU needs beside the tensors of a block: lists or maps of one of our kernels (64 MiB, or
# those of one head where that is more), workspaces of cuBLAS, and what the allocator rounds up.
SCRATCH_BYTES = 256 << 20
LIST_BYTES = 2  # of such a list, for each pair of blocks

# How far to chop, as (groups of heads, tokens at a time). The first cost next to nothing. All
# tokens at once take a third of the launches, and no result is copied back to its place.
FREE_CHUNKS = ((1, 1 << 31), (1, 16384), (2, 8192), (4, 4096))
SMALLEST_CHUNKS = ((8, 2048), (math.inf, 1024))

# Bytes of one number of latents, velocities, modulations, block means and log-sum-exps, which are
# fp32 whatever dtype the weights have.
WIDE = 4


@dataclass(frozen=True)
class Job:
    """What is to be sampled, in one batch."""

    config: DiTConfig
    grid: Grid
    dtype: torch.dtype = torch.bfloat16  # of activations
    batch: int = 1
    steps: int = 50
    guided: bool = True
    nabla: bool = False
    cache: str = "none"
    text_tokens: int = 256  # of the longest prompt
    adapters: int = 0  # how many are active
    quantization: str = ""  # one of config.QUANTIZATIONS, or "" for weights in full width
    # A CPU holds the modulations of all steps, and has no budget for kernels' scratch memory.
    on_cpu: bool = False

    @property
    def stream(self) -> int:
        """Bytes of one tensor as wide as the residual stream, [B, S, C]."""
        return self.batch * self.grid.tokens * self.config.model_dim * self.dtype.itemsize


@dataclass(frozen=True)
class SamplingWay(Way):
    """A `Way` to sample, with how much of a visual block is computed at once."""

    chunks: Chunks = Chunks()


def sampling_ways(job: Job, weights: Weights) -> Iterator[SamplingWay]:
    """Ways to sample, fastest first: smaller chunks come before streamed weights, since they cost
    next to nothing, but the smallest chunks come last."""
    free = [chunks_of(job.config, *numbers) for numbers in FREE_CHUNKS]
    smallest = [chunks_of(job.config, *numbers) for numbers in SMALLEST_CHUNKS]
    count = len(weights.layers)
    ways = [(count, chunks) for chunks in free[:-1]]
    ways += [(resident, free[-1]) for resident in range(count, -1, -1)]
    ways += [(0, chunks) for chunks in smallest]
    for resident, chunks in ways:
        how = describe_layers(weights, resident)
        if chunks.heads is not None and chunks.heads < job.config.num_heads:
            groups = math.ceil(job.config.num_heads / chunks.heads)
            how += f", heads in {groups} groups, {chunks.tokens} tokens at a time"
        held = weights.on_device(resident)
        yield SamplingWay(
            held,
            sampling_bytes(job, chunks),
            how,
            resident,
            as_fast=chunks in free[:2] and resident == count,
            chunks=chunks,
        )


def chunks_of(
    config: DiTConfig,
    groups: float,
    tokens: int,
) -> Chunks:
    """Chunks with the heads in `groups` groups, or in as many as there are heads."""
    if groups == 1:
        return Chunks(None, tokens)
    return Chunks(max(1, math.ceil(config.num_heads / groups)), tokens)


def sampling_bytes(job: Job, chunks: Chunks) -> int:
    """Bytes at the worst moment of sampling, without the networks' weights.

    That moment lies in a visual block. With t for one tensor of the residual stream's size there
    are, all through the pass,

    - latents: the noise, the current ones, the network's input, and with guidance the velocity of
      the first pass;
    - the layout's positions, orders and angles, the prompts, the text in the pass and its keys and
      values, and the modulations of the pass (on a CPU those of all passes, and while they are made
      once more those of one prompt);
    - what a cache keeps: per branch t (mag) or 2 t (first-block, and t once more while the first
      block runs);
    - the residual stream and its norm, 2 t, and where the blocks take all tokens at once also the
      stream that the blocks began with, which the caller holds, t;

    and then the larger of `_attention_bytes` and `_rest_bytes`. Only where the video is smaller
    than its text does the moment lie in a text block, which is computed at once.
    """
    part = max(1, chunks.tokens // job.batch) * job.batch  # tokens at a time, of all samples
    tokens = job.batch * job.grid.tokens
    streams = 2
    if part >= tokens:
        streams += 2 if job.cache == "first-block" else 1
    held = streams * job.stream + _cache_bytes(job) + _pass_bytes(job)
    attention = _attention_bytes(job, chunks)
    rest = _rest_bytes(job, min(part, tokens))
    text = _text_bytes(job)
    scratch = 0 if job.on_cpu else max(SCRATCH_BYTES, LIST_BYTES * job.grid.blocks**2)
    running = held + max(attention, rest, text) + scratch
    preparing = _table_bytes(job, making=True)
    return math.ceil(max(running, preparing))


def _attention_bytes(job: Job, chunks: Chunks) -> float:
    """What self-attention needs beside the stream and its norm.

    All heads at once: queries, keys and values as one product, queries and keys normalised, and the
    result, 6 t. Some heads at a time: the result of all, and four tensors of a group's,
    t + 4 t * heads / all. For the heads at once there are also a log-sum-exp per token and, with
    NABLA, two block means and the bits of the selection. While a group is projected, its linear
    layers may need more: see `_product_bytes`.
    """
    config = job.config
    all_heads = chunks.heads is None
    heads = min(chunks.heads or config.num_heads, config.num_heads)
    share = heads / config.num_heads
    tokens = job.batch * job.grid.tokens
    attending = (6 if all_heads else 1 + 4 * share) * job.stream
    attending += WIDE * tokens * heads  # log-sum-exps
    if job.nabla:
        blocks = job.batch * job.grid.blocks
        attending += 2 * WIDE * blocks * config.model_dim * share  # means
        attending += blocks * heads * WIDE * math.ceil(job.grid.blocks / 32)  # selection
    projecting = (3 if all_heads else 1 + 3 * share) * job.stream
    products = 3 if all_heads and not job.adapters else share  # in one, or one after another
    projecting += _product_bytes(
        job,
        tokens,
        config.model_dim,
        config.model_dim * products,
    )
    return max(attending, projecting)


def _rest_bytes(job: Job, rows: int) -> float:
    """What comes after self-attention needs: its result, t, and for each of the `rows` tokens at a
    time the stream and its norm, and either the wide activation, or a branch and the next stream
    and norm."""
    branches = 5 * job.config.model_dim * job.dtype.itemsize * rows
    return job.stream + max(branches, _feed_forward_bytes(job, rows))


def _text_bytes(job: Job) -> float:
    """What a text block needs."""
    rows = job.batch * job.text_tokens
    attention = 6 * job.config.model_dim * job.dtype.itemsize * rows
    return attention + _feed_forward_bytes(job, rows)


def _feed_forward_bytes(job: Job, rows: int) -> float:
    """The stream, its norm, the wide activation, which GELU overwrites, and the output, with what
    the two products need."""
    width = job.config.model_dim
    wide = job.config.ff_dim
    size = job.dtype.itemsize
    always = rows * (2 * width + wide) * size
    first = _product_bytes(
        job,
        rows,
        width,
        wide,
    )
    second = rows * width * size + _product_bytes(
        job,
        rows,
        wide,
        width,
    )
    return always + max(first, second)


def _product_bytes(
    job: Job,
    rows: int,
    inner: int,
    outer: float,
) -> float:
    """What a linear layer [outer, inner] needs for `rows` tokens beside its input and output.

    With adapters that is its output twice, with two of them three times; for a quantised weight,
    the weight in full width; for products in 8 bits, of `ROWS_AT_ONCE` tokens the input in fp32 and
    in 8 bits and the sums twice.
    """
    size = job.dtype.itemsize
    needs: float = 0
    if job.adapters:
        needs = (1 + min(job.adapters, 2)) * rows * outer * size
    if job.quantization:
        needs = max(needs, inner * outer * size)
    if job.quantization.endswith("-dynamic"):
        products = min(rows, ROWS_AT_ONCE) * (5 * inner + 8 * outer)
        if job.on_cpu:
            products += WIDE * inner * outer
        needs = max(needs, products)
    return needs


def _cache_bytes(job: Job) -> int:
    """What a cache of earlier steps keeps."""
    branches = 1 + job.guided
    streams = {
        "none": 0,
        "mag": branches,
        "first-block": 2 * branches + 1,
    }
    return streams[job.cache] * job.stream


def _pass_bytes(job: Job) -> int:
    """Latents, layout, texts and modulations."""
    config = job.config
    size = job.dtype.itemsize
    texts = 1 + job.guided
    channels = config.in_visual_dim * (2 + job.guided) + config.in_channels
    latents = math.prod(config.patch_size) * channels * WIDE  # of one token
    layout = 4 * 3 + (2 * 8 if job.nabla else 0)  # of one token: int32 positions, int64 orders
    longest = max(job.grid.T, job.grid.Y, job.grid.X)
    rotary = WIDE * config.head_dim * (longest + texts * job.text_tokens)
    text = (texts * config.in_text_dim + 4 * config.model_dim) * size  # of one token
    prompts = texts * (config.in_text_dim2 * size + WIDE * job.steps)
    modulations = _table_bytes(job) if job.on_cpu else _vectors_bytes(job)
    video = job.grid.tokens * (job.batch * latents + layout)
    return video + job.batch * (job.text_tokens * text + prompts) + rotary + modulations


def _vectors_bytes(job: Job) -> int:
    """The modulation vectors of one pass."""
    config = job.config
    vectors = 6 * config.num_text_blocks + 9 * config.num_visual_blocks + 2
    return vectors * config.model_dim * WIDE * job.batch


def _table_bytes(job: Job, making: bool = False) -> int:
    """The modulations of all passes where they lie on the device, which is then a CPU. While those
    of one prompt are made, they are there twice."""
    if not job.on_cpu:
        return 0
    return (1 + job.guided + making) * job.steps * _vectors_bytes(job)
