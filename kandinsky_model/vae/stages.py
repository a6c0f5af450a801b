# SPDX-License-Identifier: Apache-2.0
"""The streaming stages of the VAE: what each does to a stream of chunks, and what that costs.

A video passes through a stage as a stream of chunks, each of a few consecutive frames. All tensors
are channels last, [B, f, Y, X, C]. `stream` joins stages to a chain and runs it, `schemes` decides
which of their inputs stay in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kandinsky_kernels as ops

from . import winograd
from .layers import CausalConv3d, Downsample, FrameCausalAttention, Upsample

# A chunk has as many frames as it takes to reach this many positions: in smaller ones a convolution
# spends more time repacking its weights than it saves.
POSITIONS = 4096

Affine = tuple[Tensor, Tensor]  # scale and shift [B, C]: a GroupNorm whose statistics are known


class Chunk:
    """Consecutive frames on their way: `x` [B, f, Y, X, C], and inside a resnet the `skip` that
    will be added to it.

    A stage takes the tensors out and puts others in. No other reference to them exists, so a tensor
    is freed the moment it has served.
    """

    __slots__ = ("x", "skip")

    def __init__(self, x: Tensor, skip: Tensor | None = None):
        self.x = x
        self.skip = skip

    def take(self) -> Tensor:
        """`x`, which the chunk then no longer holds."""
        x = self.x
        del self.x
        return x

    def move(self) -> Chunk:
        """A new chunk with these tensors, which this one then no longer holds."""
        moved = Chunk(self.take(), self.skip)
        self.skip = None
        return moved


@dataclass(frozen=True)
class StreamShape:
    """The shape of a stream in front of a stage.

    frames: of the whole video. chunk: frames of the longest chunk. skip: channels of the skip that
    each chunk carries, 0 outside a resnet. All sizes are elements per sample.
    """

    frames: int
    height: int
    width: int
    channels: int
    chunk: int
    skip: int = 0

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
        """Elements of `frames` frames with a border of one position."""
        return frames * (self.height + 2) * (self.width + 2) * self.channels


class Stage(ABC):
    """One step of a chain: `flow` transforms a stream of chunks, the other methods count its cost.

    Costs are elements per sample and FLOPs, for a stream of shape `shape` in front of the stage.
    norm: the GroupNorm at the beginning of the stage, if any; `flow` needs its statistics over all
    frames. resizes: whether the next stage belongs to another level.
    """

    norm: nn.GroupNorm | None = None
    resizes = False

    @abstractmethod
    def flow(
        self,
        stream: Iterable[Chunk],
        affine: Affine | None,
        frames: int,
    ) -> Iterator[Chunk]:
        """The stream behind this stage. affine: of `norm`. frames: of the whole input."""

    def after(self, shape: StreamShape) -> StreamShape:
        """The shape of the stream behind this stage."""
        return shape

    @abstractmethod
    def cache(self, shape: StreamShape) -> int:
        """Elements that the stage keeps from one chunk to the next."""

    @abstractmethod
    def work(self, shape: StreamShape) -> int:
        """The most elements alive for one chunk, its input and output included, its cache not."""

    def held(self, shape: StreamShape) -> int:
        """Elements of a chunk that the stage holds while later stages work on its output."""
        return 0

    def weights(self) -> int:
        """Elements of weights that the stage makes from those of the model."""
        return 0

    @abstractmethod
    def flops(self, shape: StreamShape) -> int:
        """Arithmetic for the whole video."""


class Convolve(Stage):
    """GroupNorm and SiLU (with a `norm`), then a causal 3x3x3 convolution.

    before: what is done to a chunk first. detour: "opens" for the first convolution of a resnet,
    which sets the skip (through the 1x1x1 convolution `shortcut` where there is one), "closes" for
    the second, which adds it.
    """

    def __init__(
        self,
        conv: CausalConv3d,
        norm: nn.GroupNorm | None = None,
        before: Callable[[Tensor], Tensor] | None = None,
        shortcut: CausalConv3d | None = None,
        detour: str = "",
    ):
        self.conv = conv.conv
        self.norm = norm
        self.before = before
        self.detour = detour
        self.shortcut = None if shortcut is None else shortcut.conv

    def flow(
        self,
        stream: Iterable[Chunk],
        affine: Affine | None,
        frames: int,
    ) -> Iterator[Chunk]:
        front = None  # the last two padded frames of the chunk before
        taps = None
        for chunk in stream:
            x = chunk.take()
            if self.before is not None:
                x = self.before(x)
            first = front is None
            if first and winograd.suits(self.conv, x.shape[2] * x.shape[3]):
                taps = winograd.taps_of(self.conv.weight)
            padded = self._padded(x, front, affine)  # [B, f + 2, Y + 2, X + 2, C]
            if self.detour == "opens":
                chunk.skip = x if self.shortcut is None else pointwise(x, self.shortcut)
            del x
            front = _keep(front, padded, 2)
            if taps is None:
                out = ops.causal_conv3d(padded, self.conv.weight, self.conv.bias)
            else:
                out = winograd.convolve(padded, taps, self.conv.bias, first)
            chunk.x = out  # [B, f, Y, X, C']
            del padded, out
            if self.detour == "closes":
                assert chunk.skip is not None  # the stage before opened the detour
                chunk.x.add_(chunk.skip)
                chunk.skip = None
            yield chunk

    @staticmethod
    def _padded(
        x: Tensor,
        front: Tensor | None,
        affine: Affine | None,
    ) -> Tensor:
        """The padded input of the convolution, after GroupNorm and SiLU where there is a norm."""
        if affine is None:
            return pad(x, front, 2)
        scale, shift = affine
        return ops.group_norm_silu(x, scale, shift, front)

    def after(self, shape: StreamShape) -> StreamShape:
        channels = self.conv.out_channels
        return replace(shape, channels=channels, skip=channels if self.detour == "opens" else 0)

    def cache(self, shape: StreamShape) -> int:
        in_pairs = winograd.suits(self.conv, shape.area)
        return shape.padded(2) + (winograd.kernel_elements(self.conv) if in_pairs else 0)

    def work(self, shape: StreamShape) -> int:
        padded = shape.padded(shape.chunk + 2)
        out = shape.chunk * shape.area * self.conv.out_channels
        crossing = out if self.shortcut is not None else 0
        skip = out if self.detour == "opens" else shape.chunk * shape.area * shape.skip
        sums = 0
        if winograd.suits(self.conv, shape.area):
            sums = winograd.work_elements(shape.padded(1), shape.area, self.conv)
        normalising = shape.chunk_size + crossing
        convolving = out + skip + sums
        return padded + max(normalising, convolving)

    def flops(self, shape: StreamShape) -> int:
        taps = 27 if self.shortcut is None else 28
        channels = self.conv.out_channels * self.conv.in_channels
        return 2 * shape.frames * shape.area * channels * taps


class Attend(Stage):
    """The frame-causal attention of the middle, which keeps the keys and values of all frames."""

    def __init__(self, attention: FrameCausalAttention):
        self.attention = attention
        self.norm: nn.GroupNorm = attention.group_norm

    def flow(
        self,
        stream: Iterable[Chunk],
        affine: Affine | None,
        frames: int,
    ) -> Iterator[Chunk]:
        assert affine is not None  # `norm` is not None
        layer = self.attention
        keys: Tensor | None = None
        start = 0  # index of the first frame of the chunk
        scale, shift = (v[:, None, None] for v in affine)  # [B, 1, 1, C]
        for chunk in stream:
            x = chunk.take()
            end = start + x.shape[1]
            tokens = torch.addcmul(shift, x.flatten(2, 3), scale).to(x.dtype)  # [B, f, P, C]
            if keys is None:
                batch, _, positions, channels = tokens.shape
                shape = (batch, frames, positions, channels)
                keys = tokens.new_empty(shape)  # [B, T, P, C]
                values = tokens.new_empty(shape)
            keys[:, start:end] = layer.to_k(tokens)
            values[:, start:end] = layer.to_v(tokens)
            # autocast gives queries another dtype than that of the keys and values kept
            query = layer.to_q(tokens).to(keys.dtype)
            out = ops.frame_causal_attention(query, keys[:, :end], values[:, :end], start)
            del query
            chunk.x = layer.to_out[0](out).view_as(x).add_(x)  # [B, f, Y, X, C]
            start = end
            del x, tokens, out
            yield chunk

    def cache(self, shape: StreamShape) -> int:
        return 2 * shape.size

    def work(self, shape: StreamShape) -> int:
        return 4 * shape.chunk_size

    def flops(self, shape: StreamShape) -> int:
        pairs = shape.area**2 * shape.frames * (shape.frames + 1) // 2
        projections = 8 * shape.frames * shape.area * shape.channels**2
        return 4 * pairs * shape.channels + projections


class Enlarge(Stage):
    """Upsampling and its convolution, folded: phase by phase, a short run of frames at a time."""

    resizes = True

    def __init__(self, upsample: Upsample):
        self.upsample = upsample
        self.front = 3 - upsample.factors[0]  # frames that the next chunk needs again
        three_taps_in_time = self.front == 2
        self.in_pairs = three_taps_in_time and winograd.suits(upsample.conv.conv)
        self._kernels: dict[tuple[int, ...], Tensor | list[Tensor]] | None = None

    def _folded(self) -> dict[tuple[int, ...], Tensor | list[Tensor]]:
        """For every phase its weight, or the four kernels of convolution in pairs; made once."""
        if self._kernels is None:
            self._kernels = {
                phase: winograd.taps_of(weight) if self.in_pairs else weight
                for phase, weight in self.upsample.folded().items()
            }
        return self._kernels

    def flow(
        self,
        stream: Iterable[Chunk],
        affine: Affine | None,
        frames: int,
    ) -> Iterator[Chunk]:
        front = None
        for chunk in stream:
            height, width = chunk.x.shape[2:4]
            for x in chunk.x.split(frames_of_chunk(height, width), dim=1):
                padded = pad(x, front, self.front)  # [B, front + f, Y + 2, X + 2, C]
                piece = Chunk(self._phases(padded, first=front is None))
                front = _keep(front, padded, self.front)
                del padded
                yield piece
            del x
            chunk.take()

    def _phases(self, padded: Tensor, first: bool) -> Tensor:
        """Enlarged frames [B, f', 2Y, 2X, C] of padded ones [B, front + f, Y + 2, X + 2, C].

        first: whether these are the first frames of the video. Doubled in time, the first frame
        gives one frame. A later one gives two, and the first of these looks further back.
        """
        time, down, across = self.upsample.factors
        batch, padded_frames, padded_height, padded_width, channels = padded.shape
        count = padded_frames - self.front
        height = padded_height - 2
        width = padded_width - 2
        single = first and time == 2
        frames = time * count - int(single)
        out = padded.new_empty(batch, frames, down * height, across * width, channels)
        bias = self.upsample.conv.conv.bias
        for (t, y, z), kernel in self._folded().items():
            if single and t and count == 1:  # a single frame is not doubled
                continue
            rows = slice(y, y + height + 3 - down)
            columns = slice(z, z + width + 3 - across)
            window = padded[:, t if single else 0 :, rows, columns]
            offset = t if single else time - 1 - t
            phase = out[:, offset::time, y::down, z::across]
            if isinstance(kernel, list):
                phase.copy_(winograd.convolve(window, kernel, bias, first))
            else:
                phase.copy_(ops.causal_conv3d(window, kernel, bias))
        return out

    def after(self, shape: StreamShape) -> StreamShape:
        time, down, across = self.upsample.factors
        frames = time * (shape.frames - 1) + 1
        chunk = min(shape.chunk, frames_of_chunk(shape.height, shape.width))
        return StreamShape(
            frames=frames,
            height=down * shape.height,
            width=across * shape.width,
            channels=shape.channels,
            chunk=min(time * chunk, frames),
        )

    def held(self, shape: StreamShape) -> int:
        return shape.chunk_size

    def cache(self, shape: StreamShape) -> int:
        return shape.padded(self.front)

    def work(self, shape: StreamShape) -> int:
        count = min(shape.chunk, frames_of_chunk(shape.height, shape.width))
        padded = shape.padded(count + self.front)
        # of one phase, the window and the result
        phase = (2 * count + self.front) * shape.area * shape.channels
        return shape.chunk_size + padded + self.after(shape).chunk_size + phase

    def weights(self) -> int:
        channels = self.upsample.conv.conv.in_channels
        elements = channels**2 * _folded_taps(self.upsample.factors)
        return elements * 4 // 3 if self.in_pairs else elements

    def flops(self, shape: StreamShape) -> int:
        after = self.after(shape)
        time, down, across = self.upsample.factors
        taps = _folded_taps(self.upsample.factors) // (time * down * across)
        return 2 * after.frames * after.area * shape.channels**2 * taps


def _folded_taps(factors: tuple[int, int, int]) -> int:
    """Taps of all phases together: along a doubled axis two phases of two taps, else three taps."""
    count = 1
    for factor in factors:
        count *= 4 if factor == 2 else 3
    return count


class Shrink(Stage):
    """The strided downsampling convolution.

    Its frames are gathered to the longer chunks that suit smaller frames. The chunks that it is
    given end where its stride does, see `shrinking_lengths`.
    """

    resizes = True

    def __init__(self, downsample: Downsample):
        self.conv = downsample.conv.conv
        time, down, across = self.conv.stride
        self.stride = (time, down, across)
        self.front = 3 - time  # frames that the next chunk needs again

    def flow(
        self,
        stream: Iterable[Chunk],
        affine: Affine | None,
        frames: int,
    ) -> Iterator[Chunk]:
        conv = self.conv
        front = None
        ready: list[Tensor] = []
        for chunk in stream:
            x = chunk.take()
            if front is None:
                _, length, height, width, channels = x.shape
                after = self.after(StreamShape(frames, height, width, channels, length))
                wanted, *lengths = shrinking_lengths(after.frames, after.height, after.width)
            padded = pad(x, front, 2 if front is None else self.front)
            del x
            front = _keep(front, padded, self.front)
            out = ops.causal_conv3d(padded, conv.weight, conv.bias, self.stride)
            ready.append(out)  # [B, f', Y', X', C]
            del padded, out
            if sum(piece.shape[1] for piece in ready) == wanted:
                chunk.x = torch.cat(ready, 1) if len(ready) > 1 else ready[0]
                ready = []
                yield chunk
                wanted = lengths.pop(0) if lengths else 0

    def after(self, shape: StreamShape) -> StreamShape:
        sizes = (shape.frames, shape.height, shape.width)
        strided = [
            (size - 1) // step + 1  # of positions 0 to size - 1, those that a stride meets
            for size, step in zip(sizes, self.stride, strict=True)
        ]
        frames, height, width = strided
        chunk = max(shrinking_lengths(frames, height, width))
        return StreamShape(frames, height, width, shape.channels, chunk)

    def cache(self, shape: StreamShape) -> int:
        after = self.after(shape)
        gathered = after.chunk - self._made(shape)
        return shape.padded(self.front) + gathered * after.area * after.channels

    def work(self, shape: StreamShape) -> int:
        after = self.after(shape)
        frame = after.area * after.channels
        made = self._made(shape)
        joining = (made + (after.chunk if made < after.chunk else 0)) * frame
        padded = shape.padded(shape.chunk + self.front)
        return max(padded + max(shape.chunk_size, made * frame), joining)

    def _made(self, shape: StreamShape) -> int:
        """The most frames that become of one chunk."""
        return (shape.chunk - 1) // self.stride[0] + 1

    def flops(self, shape: StreamShape) -> int:
        after = self.after(shape)
        return 2 * after.frames * after.area * shape.channels**2 * 27


def pad(
    x: Tensor,
    front: Tensor | None,
    count: int,
) -> Tensor:
    """x [B, f, Y, X, C] with repeated borders and `count` frames in front.

    These frames are `front` [B, count, Y + 2, X + 2, C], or copies of the first frame without it.
    The result is [B, count + f, Y + 2, X + 2, C].
    """
    batch, frames, height, width, channels = x.shape
    padded = x.new_empty(batch, count + frames, height + 2, width + 2, channels)
    rest = padded[:, count:]
    rest[:, :, 1:-1, 1:-1] = x
    rest[:, :, 0, 1:-1] = x[:, :, 0]
    rest[:, :, -1, 1:-1] = x[:, :, -1]
    rest[:, :, :, 0] = rest[:, :, :, 1]
    rest[:, :, :, -1] = rest[:, :, :, -2]
    padded[:, :count] = rest[:, :1] if front is None else front
    return padded


def _keep(
    front: Tensor | None,
    padded: Tensor,
    count: int,
) -> Tensor:
    """The last `count` frames of `padded` in memory of their own, so that the others are freed.

    front: the memory used for the chunk before, which is used again.
    """
    last = padded[:, padded.shape[1] - count :]
    return last.clone() if front is None else front.copy_(last)


def pointwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """The 1x1x1 convolution of x [B, f, Y, X, C]: [B, f, Y, X, C']."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def pixels(video: Tensor, like: Tensor) -> Tensor:
    """`video`, or a piece of it, on the device and in the dtype of `like`.

    uint8 becomes x / 127.5 - 1, computed in fp32 or wider.
    """
    if video.dtype == torch.uint8:
        wide = torch.promote_types(like.dtype, torch.float32)
        video = video.to(like.device).to(wide)
        video = video.div_(127.5).sub_(1)
    return video.to(like)


def frames_of_chunk(height: int, width: int) -> int:
    return max(1, POSITIONS // (height * width))


def enlarging_lengths(
    frames: int,
    height: int,
    width: int,
) -> list[int]:
    """The lengths of the chunks into which a decoder's input is cut."""
    count = frames_of_chunk(height, width)
    return [min(count, frames - start) for start in range(0, frames, count)]


def shrinking_lengths(
    frames: int,
    height: int,
    width: int,
) -> list[int]:
    """The lengths of the chunks into which an encoder's input, and that of each level, is cut.

    Lengths are powers of two, except that the first chunk has one frame more or is a single frame.
    Therefore the boundaries of a level's chunks are boundaries in the level before, and both stride
    2 in time and convolution in pairs meet whole pairs of frames.
    """
    count = frames_of_chunk(height, width)
    later = max(2, 1 << (count.bit_length() - 1))
    first = min(frames, 1 + later if count > 1 else 1)
    starts = range(first, frames, later)
    return [first, *(min(later, frames - start) for start in starts)]
