# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder as chains of streaming stages: a whole video, exactly, in bounded memory.

Given its statistics, a GroupNorm is a scale and a shift per channel. A convolution needs two
earlier frames, the attention the keys and values of earlier frames. Chunks of frames can therefore
flow through any number of stages, once the statistics of every stage's input are known. These take
a pass of their own, from the nearest input that is kept in memory. Which inputs are kept is the
caller's choice (see `schemes`). It decides bytes and recomputation but not one bit of the result:
chunks are cut by the size of the video alone, so every operator sees the same shapes, and
statistics are taken per frame and combined in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import kandinsky_kernels as ops

from .layers import Decoder, Encoder, MidBlock, ResnetBlock
from .stages import (
    Affine,
    Attend,
    Chunk,
    Convolve,
    Enlarge,
    Shrink,
    Stage,
    StreamShape,
    enlarging_lengths,
    pixels,
    pointwise,
    shrinking_lengths,
)


class NotFinite(RuntimeError):
    """A network made NaN or infinity of finite input: its dtype is too narrow, or its weights are
    broken."""


def check_finite(x: Tensor, doing: str) -> None:
    """Raise NotFinite where x holds NaN or infinity. doing: "encoding" or "decoding"."""
    if x.numel() and not _finite(*x.detach().aminmax()):  # both are NaN where x holds one
        raise _not_finite(doing, x.dtype)


def _finite(one: Tensor, other: Tensor) -> bool:
    """Whether all values of two tensors of one shape are finite; the meta device holds none."""
    return one.is_meta or bool(torch.stack((one, other)).isfinite().all())


def _not_finite(doing: str, dtype: torch.dtype) -> NotFinite:
    """The error to raise for values of `dtype`."""
    remedy = "verify the weights of the VAE, and leave autocast where it is on"
    if dtype == torch.float16:
        remedy = "load the VAE in bfloat16 or float32"
    return NotFinite(f"{doing} must give finite values, got NaN or infinity in {dtype}: {remedy}")


@dataclass(frozen=True)
class Chain:
    """The stages of a network, in the order in which frames meet them.

    doing: "encoding" or "decoding". lengths: gives the lengths of the chunks that an input is cut
    into, for its number of frames, height and width.
    """

    doing: str
    stages: list[Stage]
    lengths: Callable[[int, int, int], list[int]]

    @property
    def weight(self) -> Tensor:
        """One of the weights, for their dtype and device."""
        first = self.stages[0]
        assert isinstance(first, Convolve)
        return first.conv.weight

    def shapes(
        self,
        channels: int,
        frames: int,
        height: int,
        width: int,
    ) -> list[StreamShape]:
        """The shape of the stream in front of every stage, and behind the last."""
        chunk = max(self.lengths(frames, height, width))
        shapes = [StreamShape(frames, height, width, channels, chunk)]
        for stage in self.stages:
            shapes.append(stage.after(shapes[-1]))
        return shapes


def decoding(decoder: Decoder, post_quant: nn.Conv3d | None = None) -> Chain:
    """The chain from latents (before `post_quant`, where it is given) to video."""
    before = None if post_quant is None else partial(pointwise, conv=post_quant)
    stages: list[Stage] = [Convolve(decoder.conv_in, before=before)]
    stages += _middle(decoder.mid_block)
    for level in decoder.up_blocks:
        for resnet in level.resnets:
            stages += _resnet(resnet)
        stages += [Enlarge(step) for step in level.upsamplers]
    stages.append(Convolve(decoder.conv_out, decoder.conv_norm_out))
    return Chain("decoding", stages, enlarging_lengths)


def encoding(encoder: Encoder) -> Chain:
    """The chain from video, as `pixels` takes it, to moments before quant_conv."""
    convert = partial(pixels, like=encoder.conv_in.conv.weight)
    stages: list[Stage] = [Convolve(encoder.conv_in, before=convert)]
    for level in encoder.down_blocks:
        for resnet in level.resnets:
            stages += _resnet(resnet)
        stages += [Shrink(step) for step in level.downsamplers]
    stages += _middle(encoder.mid_block)
    stages.append(Convolve(encoder.conv_out, encoder.conv_norm_out))
    return Chain("encoding", stages, shrinking_lengths)


def _middle(block: MidBlock) -> list[Stage]:
    first, last = block.resnets
    return [*_resnet(first), Attend(block.attentions[0]), *_resnet(last)]


def _resnet(resnet: ResnetBlock) -> list[Stage]:
    return [
        Convolve(resnet.conv1, resnet.norm1, shortcut=resnet.conv_shortcut, detour="opens"),
        Convolve(resnet.conv2, resnet.norm2, detour="closes"),
    ]


@torch.no_grad()
def stream(
    chain: Chain,
    x: Tensor,
    kept: tuple[bool, ...],
    affines: dict[int, Affine],
) -> Iterator[Tensor]:
    """What the chain makes of x [B, C, T, Y, X]: consecutive pieces [B, C', f, Y', X'].

    The pieces are given out while the last pass goes on. kept: for every stage, whether its input
    stays in memory. affines: scale and shift of the stages whose statistics are known. Those found
    here are added, so that another attempt need not find them again. NotFinite as soon as
    statistics are not finite, because then nothing behind them is.
    """
    stages = chain.stages
    frames = [shape.frames for shape in chain.shapes(*x.shape[1:])]

    def flow(
        start: int,
        end: int,
        source: Iterable[Chunk],
    ) -> Iterator[Chunk]:
        for k in range(start, end):
            source = stages[k].flow(source, affines.get(k), frames[k])
        return iter(source)

    rows = x.permute(0, 2, 3, 4, 1)  # [B, T, Y, X, C]
    lengths = chain.lengths(*x.shape[2:])
    source = deque(Chunk(piece) for piece in rows.split(lengths, dim=1))
    start = 0  # the stage in front of which `source` lies
    for k, stage in enumerate(stages):
        norm = stage.norm if k not in affines else None
        if kept[k]:
            moments, source = _pass(flow(start, k, _drain(source)), norm, keep=True)
            start = k
        elif norm is not None:
            moments, _ = _pass(flow(start, k, _copy(source)), norm, keep=False)
        if norm is not None:
            affines[k] = _affine(norm, torch.cat(moments, 1))
            if not _finite(*affines[k]):
                raise _not_finite(chain.doing, chain.weight.dtype)
    for chunk in flow(start, len(stages), _drain(source)):
        yield chunk.take().permute(0, 4, 1, 2, 3)  # [B, C', f, Y', X']


def _affine(norm: nn.GroupNorm, moments: Tensor) -> Affine:
    """`norm` as scale and shift [B, C], from the moments [B, T, G, 2] of all frames."""
    scale, shift = ops.group_affine(moments, norm.weight, norm.bias, norm.eps)
    return scale, shift


def _pass(
    stream: Iterable[Chunk],
    norm: nn.GroupNorm | None,
    keep: bool,
) -> tuple[list[Tensor], deque[Chunk]]:
    """Run a stream to its end.

    Returns the moments [B, f, G, 2] of each chunk for `norm`, and with `keep` the chunks.
    """
    moments = []
    kept: deque[Chunk] = deque()
    for chunk in stream:
        if norm is not None:
            moments.append(ops.group_moments(chunk.x, norm.num_groups))
        moved = chunk.move()
        if keep:
            kept.append(moved)
        del moved
    return moments, kept


def _drain(source: deque[Chunk]) -> Iterator[Chunk]:
    """The chunks of `source`, each leaving it as it is given out."""
    while source:
        yield source.popleft()


def _copy(source: Iterable[Chunk]) -> Iterator[Chunk]:
    """New chunks with the same tensors, so that `source` outlives the pass."""
    return (Chunk(chunk.x, chunk.skip) for chunk in source)
