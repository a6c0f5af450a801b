# SPDX-License-Identifier: Apache-2.0
"""The streaming stages of the VAE: what each does to a stream of chunks of frames, and its
arithmetic in elements and FLOPs.

All tensors are channels-last, [B, frames, Y, X, C]. `vae_stream.py` joins stages to chains and
walks them, `memory.py` plans the walk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kandinsky_kernels as ops

from . import winograd as vae_pairs

# A chunk has as many frames as it takes to reach this many positions: below it convolutions repack
# their weights for too little work.
POSITIONS = 4096


class Chunk:
    """Consecutive frames on their way: `x` [B, f, Y, X, C], and inside a resnet the `skip` that
    will be added to it.

    Stages take tensors out and put others in; nobody else holds them, so a tensor is freed the
    moment it has served.
    """

    __slots__ = ("x", "skip")

    def __init__(self, x: Tensor, skip: Tensor | None = None):
        self.x, self.skip = x, skip

    def take(self) -> Tensor:
        x, self.x = self.x, None
        return x

    def move(self) -> Chunk:
        """The same tensors in a new chunk, and none left in this one."""
        moved = Chunk(self.x, self.skip)
        self.x = self.skip = None
        return moved


@dataclass(frozen=True)
class Place:
    """What lies in front of a stage: all frames, and the longest chunk they come in. Sizes below
    are elements per sample."""

    frames: int
    height: int
    width: int
    channels: int
    chunk: int
    skip: int = 0  # channels

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def chunk_size(self) -> int:
        return self.chunk * self.area * (self.channels + self.skip)

    @property
    def size(self) -> int:
        return self.frames * self.area * (self.channels + self.skip)

    def padded(self, frames: int) -> int:
        return frames * (self.height + 2) * (self.width + 2) * self.channels


class Stage(ABC):
    """One step of the chain. `flow` transforms a stream of chunks; the rest is its arithmetic, in
    elements per sample and FLOPs.

    norm: the GroupNorm whose statistics over all frames `flow` needs, as `affine`. resizes: what
    follows is another level.
    """

    norm: nn.GroupNorm | None = None
    resizes = False

    @abstractmethod
    def flow(
        self, stream: Iterable[Chunk], affine: tuple[Tensor, Tensor] | None, frames: int
    ) -> Iterator[Chunk]:
        """The stream behind this stage, whose input has `frames` frames in all."""

    def after(self, place: Place) -> Place:
        """What lies behind this stage when `place` lies in front of it."""
        return place

    @abstractmethod
    def cache(self, place: Place) -> int:
        """What it keeps from chunk to chunk."""

    @abstractmethod
    def work(self, place: Place) -> int:
        """The most it holds of one chunk beside its cache, input and output included."""

    def held(self, place: Place) -> int:
        """What it holds of a chunk while later stages work."""
        return 0

    def weights(self) -> int:
        """What it adds to the model's own weights."""
        return 0

    @abstractmethod
    def flops(self, place: Place) -> int:
        """Its arithmetic on the whole video."""


class Convolve(Stage):
    """[Whatever is to be done `before`,] [norm, SiLU,] 3x3x3 convolution; `opens` or `closes` a
    resnet's detour."""

    def __init__(
        self,
        conv: nn.Module,
        norm: nn.GroupNorm | None = None,
        before: Callable[[Tensor], Tensor] | None = None,
        shortcut: nn.Module | None = None,
        detour: str = "",
    ):
        self.conv, self.norm, self.before, self.detour = conv.conv, norm, before, detour
        self.shortcut = None if shortcut is None else shortcut.conv

    def flow(
        self, stream: Iterable[Chunk], affine: tuple[Tensor, Tensor] | None, frames: int
    ) -> Iterator[Chunk]:
        front, taps = None, None
        for chunk in stream:
            x = chunk.take() if self.before is None else self.before(chunk.take())
            if front is None and vae_pairs.suits(self.conv, x.shape[2] * x.shape[3]):
                taps = vae_pairs.taps_of(self.conv.weight)
            padded = ops.group_norm_silu(x, *affine, front) if affine else pad(x, front, 2)
            if self.detour == "opens":
                chunk.skip = x if self.shortcut is None else pointwise(x, self.shortcut)
            del x
            first, front = front is None, _keep(front, padded, 2)
            if taps is None:
                # [B, f, Y, X, C']
                chunk.x = ops.causal_conv3d(padded, self.conv.weight, self.conv.bias)
            else:
                chunk.x = vae_pairs.convolve(padded, taps, self.conv.bias, first)
            del padded
            if self.detour == "closes":
                chunk.x.add_(chunk.skip)
                chunk.skip = None
            yield chunk

    def after(self, place: Place) -> Place:
        return replace(
            place,
            channels=self.conv.out_channels,
            skip=self.conv.out_channels if self.detour == "opens" else 0,
        )

    def cache(self, place: Place) -> int:
        return place.padded(2) + (
            vae_pairs.kernel_elements(self.conv) if vae_pairs.suits(self.conv, place.area) else 0
        )

    def work(self, place: Place) -> int:
        # while it normalises (and crosses the shortcut), or while it convolves
        padded, out = (
            place.padded(place.chunk + 2),
            place.chunk * place.area * self.conv.out_channels,
        )
        crossing = out if self.shortcut is not None else 0
        skip = out if self.detour == "opens" else place.chunk * place.area * place.skip
        pairs = vae_pairs.suits(self.conv, place.area)
        extra = vae_pairs.work_elements(place.padded(1), place.area, self.conv) if pairs else 0
        return padded + max(place.chunk_size + crossing, out + skip + extra)

    def flops(self, place: Place) -> int:
        taps = 27 if self.shortcut is None else 28
        return 2 * place.frames * place.area * self.conv.out_channels * self.conv.in_channels * taps


class Attend(Stage):
    """The frame-causal attention of the middle, whose keys and values are kept for all frames."""

    def __init__(self, attention: nn.Module):
        self.attention, self.norm = attention, attention.group_norm

    def flow(
        self, stream: Iterable[Chunk], affine: tuple[Tensor, Tensor] | None, frames: int
    ) -> Iterator[Chunk]:
        layer, keys, first = self.attention, None, 0
        scale, shift = (v[:, None, None] for v in affine)  # [B, 1, 1, C]
        for chunk in stream:
            x = chunk.take()
            batch, channels, last = x.shape[0], x.shape[-1], first + x.shape[1]
            tokens = torch.addcmul(shift, x.flatten(2, 3), scale).to(x.dtype)  # [B, f, P, C]
            if keys is None:
                keys, values = (
                    tokens.new_empty(batch, frames, tokens.shape[2], channels) for _ in range(2)
                )
            keys[:, first:last], values[:, first:last] = layer.to_k(tokens), layer.to_v(tokens)
            # autocast gives queries of another dtype than the keys that are kept
            # [B, f, P, C]
            out = ops.frame_causal_attention(
                layer.to_q(tokens).to(keys.dtype), keys[:, :last], values[:, :last], first
            )
            chunk.x = layer.to_out[0](out).view_as(x).add_(x)
            first = last
            del x, tokens, out
            yield chunk

    def cache(self, place: Place) -> int:
        return 2 * place.size

    def work(self, place: Place) -> int:
        return 4 * place.chunk_size

    def flops(self, place: Place) -> int:
        pairs = place.area**2 * place.frames * (place.frames + 1) // 2
        return 4 * pairs * place.channels + 8 * place.frames * place.area * place.channels**2


class Enlarge(Stage):
    """The folded upsampling convolution: phase by phase, a short run of frames at a time."""

    resizes = True

    def __init__(self, upsample: nn.Module):
        self.upsample, self.front, self._folded = upsample, 3 - upsample.factors[0], None
        self.pairs = self.front == 2 and vae_pairs.suits(upsample.conv.conv)  # three taps in time

    def flow(
        self, stream: Iterable[Chunk], affine: tuple[Tensor, Tensor] | None, frames: int
    ) -> Iterator[Chunk]:
        if self._folded is None:
            self._folded = self.upsample.folded()
            if self.pairs:
                self._folded = {
                    phase: vae_pairs.taps_of(weight) for phase, weight in self._folded.items()
                }
        front = None
        for chunk in stream:
            for x in chunk.x.split(frames_of_chunk(*chunk.x.shape[2:4]), dim=1):
                padded = pad(x, front, self.front)
                piece = Chunk(self._phases(padded, first=front is None))
                front = _keep(front, padded, self.front)
                del padded
                yield piece
            x = chunk.x = None

    def _phases(self, padded: Tensor, first: bool) -> Tensor:
        """[B, f, 2Y, 2X, C] of padded frames; a later frame becomes two, of which the first looks
        further back."""
        (time, up, across), (batch, frames, height, width, channels) = (
            self.upsample.factors,
            padded.shape,
        )
        count, single = frames - self.front, int(first and time == 2)
        height, width = height - 2, width - 2
        out = padded.new_empty(batch, time * count - single, up * height, across * width, channels)
        for (t, y, z), weight in self._folded.items():
            if single and t and count == 1:  # a single frame has no doubled one
                continue
            window = padded[
                :, t if single else 0 :, y : y + height + 3 - up, z : z + width + 3 - across
            ]
            place = t if single else time - 1 - t
            bias, target = self.upsample.conv.conv.bias, out[:, place::time, y::up, z::across]
            if self.pairs:
                target.copy_(vae_pairs.convolve(window, weight, bias, first))
            else:
                target.copy_(ops.causal_conv3d(window, weight, bias))
        return out

    def after(self, place: Place) -> Place:
        time, up, across = self.upsample.factors
        chunk = min(place.chunk, frames_of_chunk(place.height, place.width))
        return Place(
            time * (place.frames - 1) + 1,
            up * place.height,
            across * place.width,
            place.channels,
            min(time * chunk, time * (place.frames - 1) + 1),
        )

    def held(self, place: Place) -> int:
        return place.chunk_size

    def cache(self, place: Place) -> int:
        return place.padded(self.front)

    def work(self, place: Place) -> int:
        count = min(place.chunk, frames_of_chunk(place.height, place.width))
        phase = (2 * count + self.front) * place.area * place.channels  # its window and its result
        return (
            place.chunk_size
            + place.padded(count + self.front)
            + self.after(place).chunk_size
            + phase
        )

    def weights(self) -> int:
        channels = self.upsample.conv.conv.in_channels
        return channels**2 * _taps(self.upsample.factors) * (4 if self.pairs else 3) // 3

    def flops(self, place: Place) -> int:
        after = self.after(place)
        taps = _taps(self.upsample.factors) // (
            self.upsample.factors[0] * self.upsample.factors[1] * self.upsample.factors[2]
        )
        return 2 * after.frames * after.area * place.channels**2 * taps


def _taps(factors: tuple[int, int, int]) -> int:
    """Taps of all phases together: two phases of two taps along a doubled axis, else three."""
    count = 1
    for factor in factors:
        count *= 4 if factor == 2 else 3
    return count


class Shrink(Stage):
    """The strided downsampling convolution, whose frames are gathered to the longer chunks that
    suit smaller ones.

    The chunks it is given end where its stride does, see `shrinking_lengths`.
    """

    resizes = True

    def __init__(self, downsample: nn.Module):
        self.conv = downsample.conv.conv
        self.front = 3 - self.conv.stride[0]  # frames that the next chunk needs again

    def flow(
        self, stream: Iterable[Chunk], affine: tuple[Tensor, Tensor] | None, frames: int
    ) -> Iterator[Chunk]:
        front, ready = None, []
        for chunk in stream:
            x = chunk.take()
            if front is None:
                after = self.after(Place(frames, *x.shape[2:], x.shape[1]))
                wanted, *lengths = shrinking_lengths(after.frames, after.height, after.width)
            padded = pad(x, front, 2 if front is None else self.front)
            del x
            front = _keep(front, padded, self.front)
            # [B, f', Y', X', C]
            ready.append(
                ops.causal_conv3d(padded, self.conv.weight, self.conv.bias, self.conv.stride)
            )
            del padded
            if sum(piece.shape[1] for piece in ready) == wanted:
                chunk.x, ready = torch.cat(ready, 1) if len(ready) > 1 else ready[0], []
                yield chunk
                wanted = lengths.pop(0) if lengths else 0

    def after(self, place: Place) -> Place:
        frames, height, width = (
            (size - 1) // step + 1
            for size, step in zip(
                (place.frames, place.height, place.width), self.conv.stride, strict=True
            )
        )
        return Place(
            frames, height, width, place.channels, max(shrinking_lengths(frames, height, width))
        )

    def cache(self, place: Place) -> int:
        after = self.after(place)
        return (
            place.padded(self.front)
            + (after.chunk - self._piece(place)) * after.area * after.channels
        )

    def work(self, place: Place) -> int:
        after, piece = self.after(place), self._piece(place)
        gathering = after.chunk if piece < after.chunk else 0
        padded, out = (
            place.padded(place.chunk + self.front),
            (piece + gathering) * after.area * after.channels,
        )
        return max(padded + max(place.chunk_size, piece * after.area * after.channels), out)

    def _piece(self, place: Place) -> int:
        """The most frames it makes of a chunk."""
        return (place.chunk - 1) // self.conv.stride[0] + 1

    def flops(self, place: Place) -> int:
        after = self.after(place)
        return 2 * after.frames * after.area * place.channels**2 * 27


def pad(x: Tensor, front: Tensor | None, count: int) -> Tensor:
    """[B, count + T, Y + 2, X + 2, C]: borders repeat; in front `front`, or copies of the first
    frame."""
    batch, frames, height, width, channels = x.shape
    padded = x.new_empty(batch, count + frames, height + 2, width + 2, channels)
    rest = padded[:, count:]
    rest[:, :, 1:-1, 1:-1], rest[:, :, 0, 1:-1], rest[:, :, -1, 1:-1] = x, x[:, :, 0], x[:, :, -1]
    rest[:, :, :, 0], rest[:, :, :, -1] = rest[:, :, :, 1], rest[:, :, :, -2]
    padded[:, :count] = rest[:, :1] if front is None else front
    return padded


def _keep(front: Tensor | None, padded: Tensor, count: int) -> Tensor:
    """The last frames of `padded` in memory of their own, so that the rest can go."""
    last = padded[:, padded.shape[1] - count :]
    return last.clone() if front is None else front.copy_(last)


def pointwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def pixels(video: Tensor, like: Tensor) -> Tensor:
    """`video`, or a piece of it, on `like`'s device and in its dtype; uint8 becomes x / 127.5 -
    1."""
    if video.dtype == torch.uint8:
        video = (
            video.to(like.device)
            .to(torch.promote_types(like.dtype, torch.float32))
            .div_(127.5)
            .sub_(1)
        )
    return video.to(like)


def frames_of_chunk(height: int, width: int) -> int:
    return max(1, POSITIONS // (height * width))


def enlarging_lengths(frames: int, height: int, width: int) -> list[int]:
    """The chunks that frames which will be enlarged come in."""
    count = frames_of_chunk(height, width)
    return [min(count, frames - i) for i in range(0, frames, count)]


def shrinking_lengths(frames: int, height: int, width: int) -> list[int]:
    """The chunks that frames which will be made smaller come in: of powers of two, the first one of
    one frame more or alone.

    So the boundaries of a level's chunks are boundaries in the level before, and stride 2 in time
    meets whole pairs, as do convolutions in pairs.
    """
    count = frames_of_chunk(height, width)
    later = max(2, 1 << (count.bit_length() - 1))
    first = min(frames, 1 + later if count > 1 else 1)
    return [first, *(min(later, frames - i) for i in range(first, frames, later))]
