# SPDX-License-Identifier: Apache-2.0
"""The decoder as a chain of streaming stages, so that a whole video decodes exactly in bounded memory.

GroupNorm with known statistics is a scale and a shift per channel, convolutions need two earlier frames, attention the keys and values
of earlier frames: given the statistics, chunks of frames can flow through any number of stages. The statistics of a stage's input need
a pass of their own, from the nearest input that is kept in memory. What is kept is the caller's choice (`memory.py`) and decides bytes
and recomputation, but not one bit of the result: chunks are cut by the latent's size alone, so every operator always sees the same
shapes, and statistics are per frame and combined in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import kandinsky_kernels as ops

from .vae_stages import Attend, Chunk, Convolve, Enlarge, Place, Stage, frames_of_chunk


def stages_of(decoder: nn.Module, post_quant: nn.Conv3d | None = None) -> list[Stage]:
    """The decoder's layers in the order in which frames meet them."""
    stages: list[Stage] = [Convolve(decoder.conv_in, before=post_quant)]

    def add(resnet: nn.Module) -> None:
        stages.append(Convolve(resnet.conv1, resnet.norm1, shortcut=resnet.conv_shortcut, detour="opens"))
        stages.append(Convolve(resnet.conv2, resnet.norm2, detour="closes"))

    middle = decoder.mid_block
    add(middle.resnets[0])
    stages.append(Attend(middle.attentions[0]))
    add(middle.resnets[1])
    for level in decoder.up_blocks:
        for resnet in level.resnets:
            add(resnet)
        stages.extend(Enlarge(upsample) for upsample in level.upsamplers)
    return [*stages, Convolve(decoder.conv_out, decoder.conv_norm_out)]


def places_of(stages: list[Stage], frames: int, height: int, width: int, channels: int) -> list[Place]:
    """What lies in front of every stage, and behind the last, for latents of this size."""
    places = [Place(frames, height, width, channels, min(frames, frames_of_chunk(height, width)))]
    for stage in stages:
        places.append(stage.after(places[-1]))
    return places


@torch.no_grad()
def stream(stages: list[Stage], latents: Tensor, kept: tuple[bool, ...], affines: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Decode `latents` [B, C, T, Y, X], yielding [B, 3, f, 8Y, 8X] in order during the last pass.

    kept: for every stage, whether its input is kept in memory. affines: scale and shift of the stages whose statistics are known
    already; those found here are added, so that another attempt need not find them again.
    """
    frames = [place.frames for place in places_of(stages, *latents.shape[2:], latents.shape[1])]

    def flow(start: int, end: int, source: Iterable[Chunk]) -> Iterator[Chunk]:
        for k in range(start, end):
            source = stages[k].flow(source, affines.get(k), frames[k])
        return source

    rows = latents.permute(0, 2, 3, 4, 1)  # [B, T, Y, X, C]
    start, source = 0, deque(Chunk(x) for x in rows.split(frames_of_chunk(*latents.shape[3:]), dim=1))
    for k, stage in enumerate(stages):
        norm = stage.norm if k not in affines else None
        if kept[k]:
            moments, source = _pass(flow(start, k, _drain(source)), norm, keep=True)
            start = k
        elif norm is not None:
            moments, _ = _pass(flow(start, k, _copy(source)), norm, keep=False)
        if norm is not None:
            affines[k] = ops.group_affine(torch.cat(moments, 1), norm.weight, norm.bias, norm.eps)
    for chunk in flow(start, len(stages), _drain(source)):
        yield chunk.take().permute(0, 4, 1, 2, 3)  # [B, 3, f, 8Y, 8X]


def _pass(stream: Iterable[Chunk], norm: nn.GroupNorm | None, keep: bool) -> tuple[list[Tensor], deque[Chunk]]:
    """Run a stream to its end: moments [B, f, G, 2] of its chunks for `norm`, and the chunks where they are to be kept."""
    moments, kept = [], deque()
    for chunk in stream:
        if norm is not None:
            moments.append(ops.group_moments(chunk.x, norm.num_groups))
        moved = chunk.move()
        if keep:
            kept.append(moved)
        del moved
    return moments, kept


def _drain(source: deque[Chunk]) -> Iterator[Chunk]:
    while source:
        yield source.popleft()


def _copy(source: Iterable[Chunk]) -> Iterator[Chunk]:
    return (Chunk(chunk.x, chunk.skip) for chunk in source)
