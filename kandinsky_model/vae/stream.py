# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder as chains of streaming stages, so that a whole video passes exactly in
bounded memory.

GroupNorm with known statistics is a scale and a shift per channel, convolutions need two earlier
frames, attention the keys and values of earlier frames: given the statistics, chunks of frames can
flow through any number of stages. The statistics of a stage's input need a pass of their own, from
the nearest input that is kept in memory. What is kept is the caller's choice (`memory.py`) and
decides bytes and recomputation, but not one bit of the result: chunks are cut by the video's size
alone, so every operator always sees the same shapes, and statistics are per frame and combined in
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import kandinsky_kernels as ops

from .stages import (
    Attend,
    Chunk,
    Convolve,
    Enlarge,
    Place,
    Shrink,
    Stage,
    enlarging_lengths,
    pixels,
    pointwise,
    shrinking_lengths,
)


@dataclass(frozen=True)
class Chain:
    """A network's layers in the order in which frames meet them.

    doing: "encoding" or "decoding". lengths: of the chunks that frames (their number, height and
    width) are cut into at the beginning.
    """

    doing: str
    stages: list[Stage]
    lengths: Callable[[int, int, int], list[int]]

    @property
    def weight(self) -> Tensor:
        """One of the weights, for their dtype and device."""
        return self.stages[0].conv.weight

    def places(self, channels: int, frames: int, height: int, width: int) -> list[Place]:
        """What lies in front of every stage, and behind the last."""
        places = [Place(frames, height, width, channels, max(self.lengths(frames, height, width)))]
        for stage in self.stages:
            places.append(stage.after(places[-1]))
        return places


def decoding(decoder: nn.Module, post_quant: nn.Conv3d | None = None) -> Chain:
    """From latents to video."""
    before = None if post_quant is None else partial(pointwise, conv=post_quant)
    stages: list[Stage] = [Convolve(decoder.conv_in, before=before), *_middle(decoder.mid_block)]
    for level in decoder.up_blocks:
        stages += [stage for resnet in level.resnets for stage in _resnet(resnet)] + [
            Enlarge(step) for step in level.upsamplers
        ]
    return Chain(
        "decoding", [*stages, Convolve(decoder.conv_out, decoder.conv_norm_out)], enlarging_lengths
    )


def encoding(encoder: nn.Module) -> Chain:
    """From video, anywhere and of any dtype that `pixels` takes, to moments before quant_conv."""
    stages: list[Stage] = [
        Convolve(encoder.conv_in, before=partial(pixels, like=encoder.conv_in.conv.weight))
    ]
    for level in encoder.down_blocks:
        stages += [stage for resnet in level.resnets for stage in _resnet(resnet)] + [
            Shrink(step) for step in level.downsamplers
        ]
    stages += [*_middle(encoder.mid_block), Convolve(encoder.conv_out, encoder.conv_norm_out)]
    return Chain("encoding", stages, shrinking_lengths)


def _middle(block: nn.Module) -> list[Stage]:
    first, last = block.resnets
    return [*_resnet(first), Attend(block.attentions[0]), *_resnet(last)]


def _resnet(resnet: nn.Module) -> list[Stage]:
    return [
        Convolve(resnet.conv1, resnet.norm1, shortcut=resnet.conv_shortcut, detour="opens"),
        Convolve(resnet.conv2, resnet.norm2, detour="closes"),
    ]


@torch.no_grad()
def stream(
    chain: Chain, x: Tensor, kept: tuple[bool, ...], affines: dict[int, tuple[Tensor, Tensor]]
) -> Iterator[Tensor]:
    """What the chain makes of `x` [B, C, T, Y, X], in consecutive pieces [B, C', f, Y', X'] as the
    last pass goes on.

    kept: for every stage, whether its input is kept in memory. affines: scale and shift of the
    stages whose statistics are known already; those found here are added, so that another attempt
    need not find them again.
    """
    stages, frames = chain.stages, [place.frames for place in chain.places(*x.shape[1:])]

    def flow(start: int, end: int, source: Iterable[Chunk]) -> Iterator[Chunk]:
        for k in range(start, end):
            source = stages[k].flow(source, affines.get(k), frames[k])
        return source

    rows = x.permute(0, 2, 3, 4, 1)  # [B, T, Y, X, C]
    start, source = (
        0,
        deque(Chunk(piece) for piece in rows.split(chain.lengths(*x.shape[2:]), dim=1)),
    )
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
        yield chunk.take().permute(0, 4, 1, 2, 3)  # [B, C', f, Y', X']


def _pass(
    stream: Iterable[Chunk], norm: nn.GroupNorm | None, keep: bool
) -> tuple[list[Tensor], deque[Chunk]]:
    """Run a stream to its end: moments [B, f, G, 2] of its chunks for `norm`, and the chunks where
    they are to be kept."""
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
