# SPDX-License-Identifier: Apache-2.0
"""How the "official" decoding policy cuts latents into tiles and fades the decoded tiles into each
other.

Tiles overlap in time, height and width. Sizes are in pixels and frames of the video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP = 32  # pixels that neighbouring tiles share
# Elements that the published code lets the widest activation of a tile have, so that 32 bits can
# index it: 256 channels of 17 frames.
INDEXABLE = 2**31
WIDEST = 256 * 17


@dataclass(frozen=True)
class Tiling:
    """The tiles of the "official" policy.

    Time: tiles of `frames` frames every `frame_stride`. Each tile but the first drops its first
    frame and fades in linearly over the frames that it then shares with the tile before (with 17
    and 8: eight frames). The last tile is cut where the video ends.
    Space: tiles of `height` x `width` pixels. Neighbours share `overlap` pixels, faded linearly,
    first vertically and then horizontally. The last tile is moved inwards to end at the border,
    and of what it then shares beyond `overlap` its neighbour is shown. A side no longer than its
    tile is one tile.
    ValueError for sizes that are not whole latents or that leave no stride.
    """

    height: int
    width: int
    overlap: int = OVERLAP
    frames: int = 17
    frame_stride: int = 8

    def __post_init__(self) -> None:
        sizes = (self.height, self.width, self.overlap)
        whole = all(size % 8 == 0 and size >= 0 for size in sizes)
        if not whole or min(self.height, self.width) <= self.overlap:
            raise ValueError(
                "a tile's height and width must exceed its overlap, all multiples "
                f"of 8, got {sizes}: round them up"
            )
        strides = self.frame_stride % 4 == 0 and 0 < self.frame_stride < self.frames
        if self.frames % 4 != 1 or not strides:
            raise ValueError(
                "a tile must have 4k+1 frames and a smaller stride divisible by 4, got "
                f"{self.frames} and {self.frame_stride}: take for example 17 and 8"
            )

    @classmethod
    def for_frame(cls, height: int, width: int) -> Tiling:
        """The tiling for frames of height x width pixels.

        It depends on the size alone, where the published code also asks for free memory. With
        n = ceil(256 * 17 * (height + 32) * (width + 32) / 2^31), n = 1 is one tile (512x768 is).
        Otherwise, with r >= 1 the ratio of the sides, the long side gets ceil(sqrt(n r)) tiles and
        the short one ceil(sqrt(n / r)). The side of a tile is the least multiple of 8 that covers
        the frame with 32 pixels shared. These are the published code's tiles on a large GPU
        wherever they reach the border (768x1280: 2x3 of 400x448), and 8 pixels more where they stop
        short of it (640x1408: 1x3 of 640x496).
        """
        parts = math.ceil(WIDEST * (height + OVERLAP) * (width + OVERLAP) / INDEXABLE)
        ratio = max(height, width) / min(height, width)
        few = many = 1
        if parts > 1:
            few = math.ceil(math.sqrt(parts / ratio))
            many = math.ceil(math.sqrt(parts * ratio))
        rows, columns = (few, many) if width >= height else (many, few)
        return cls(_tile_side(height, rows), _tile_side(width, columns))

    def count(self, frames: int, height: int, width: int) -> int:
        """How many tiles latents of T x Y x X = frames x height x width are cut into."""
        length = (self.frames - 1) // 4
        tiles = len(starts(frames - 1, length, self.frame_stride // 4))
        for size, tile in ((height, self.height // 8), (width, self.width // 8)):
            tiles *= len(starts(size, tile, tile - self.overlap // 8))
        return tiles

    def largest(self, latents: Tensor) -> Tensor:
        """The first tile of `latents` [B, C, T, Y, X]; no other is larger."""
        frames = (self.frames - 1) // 4 + 1
        return latents[:, :, :frames, : self.height // 8, : self.width // 8]


def _tile_side(size: int, count: int) -> int:
    """The least multiple of 8 with which `count` tiles cover `size` pixels and share `OVERLAP`."""
    shared = OVERLAP * (count - 1)
    side = 8 * math.ceil((size + shared) / count / 8)
    return max(OVERLAP + 8, side)  # a frame smaller than the overlap is one tile as well


def starts(
    size: int,
    tile: int,
    stride: int,
) -> range:
    """Where the tiles of one axis nominally begin: every `stride`, until they reach `size`."""
    if size <= tile:
        return range(0, 1, stride)
    return range(0, size - tile + stride, stride)


def fade(
    before: Tensor,
    tile: Tensor,
    extent: int,
    dim: int,
) -> Tensor:
    """`tile`, faded in along `dim` over the last `extent` positions of `before`.

    Its first `extent` positions get the weights 0, 1/extent, 2/extent and so on.
    """
    shape = [extent if d == dim else 1 for d in range(tile.ndim)]
    positions = torch.arange(extent, device=tile.device, dtype=tile.dtype)
    ramp = positions.div(extent).view(shape)
    head, rest = tile.tensor_split((extent,), dim)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    return torch.cat((tail * (1 - ramp) + head * ramp, rest), dim)


def join(
    tiles: list[Tensor],
    overlap: int,
    dim: int,
) -> Tensor:
    """The tiles end to end, each up to where the next one fades in."""
    shown = []
    for tile in tiles[:-1]:
        shown.append(tile.narrow(dim, 0, tile.shape[dim] - overlap))
    return torch.cat([*shown, tiles[-1]], dim)


def tiled(
    latents: Tensor,
    tiling: Tiling,
    decode: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Pieces [B, 3, f, H, W] of the video of `latents` [B, C, T, Y, X], as soon as they are final.

    decode: makes the video of one tile.
    """
    length = (tiling.frames - 1) // 4  # latent frames after the first one of a tile
    faded = tiling.frames - 1 - tiling.frame_stride
    before = None
    for start in starts(latents.shape[2] - 1, length, tiling.frame_stride // 4):
        part = latents[:, :, start : start + length + 1]
        tile = _tiled_in_space(part, tiling, decode)  # [B, 3, <= frames, H, W]
        if before is not None:
            yield before[:, :, : before.shape[2] - faded]
            tile = fade(before, tile[:, :, 1:], faded, dim=2)
        before = tile
    assert before is not None  # `starts` is never empty
    yield before


def _tiled_in_space(
    latents: Tensor,
    tiling: Tiling,
    decode: Callable[[Tensor], Tensor],
) -> Tensor:
    """The video [B, 3, F, H, W] of latents [B, C, T, Y, X] of one tile in time."""
    height, width = latents.shape[3:]
    tile_height = tiling.height // 8
    tile_width = tiling.width // 8
    overlap = tiling.overlap
    above: list[Tensor] = []
    strips = []
    for y in starts(height, tile_height, tile_height - overlap // 8):
        row: list[Tensor] = []
        top = max(min(y, height - tile_height), 0)
        for x in starts(width, tile_width, tile_width - overlap // 8):
            left = max(min(x, width - tile_width), 0)
            rows = slice(top, top + tile_height)
            columns = slice(left, left + tile_width)
            tile = decode(latents[..., rows, columns])
            # a tile that was moved inwards is shown from its nominal beginning
            tile = tile[..., 8 * (y - top) :, 8 * (x - left) :]
            if above:
                tile = fade(above[len(row)], tile, overlap, dim=3)
            if row:
                tile = fade(row[-1], tile, overlap, dim=4)
            row.append(tile)
        strips.append(join(row, overlap, dim=4))  # [B, 3, F, <= tile height, W]
        above = row
    return join(strips, overlap, dim=3)  # [B, 3, F, H, W]
