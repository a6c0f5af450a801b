# SPDX-License-Identifier: Apache-2.0
"""How the `official` decoding policy cuts a video into overlapping tiles and fades them into each
other."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TilePlan:
    """Fixed tiles of the `official` policy, in output frames and pixels.

    Time: tiles of `frames` every `frame_stride`. Each later tile drops its first frame and fades in
    linearly over the frames it then shares with the one before (17 and 8: eight of them). The last
    tile is cut where the video ends.
    Space: tiles of `height` x `width`; neighbours share `overlap` pixels, faded linearly,
    vertically and then horizontally. The last tile is moved inwards to end at the border, and what
    it then shares beyond `overlap` is its neighbour's. A side no longer than its tile is one tile.
    ValueError for sizes that are not whole latents or leave no stride.
    """

    height: int
    width: int
    overlap: int = 32
    frames: int = 17
    frame_stride: int = 8

    def __post_init__(self):
        sizes = (self.height, self.width, self.overlap)
        if (
            any(size % 8 or size < 0 for size in sizes)
            or min(self.height, self.width) <= self.overlap
        ):
            raise ValueError(
                "a tile's height and width must exceed its overlap, all multiples "
                f"of 8, got {sizes}: round them up"
            )
        if self.frames % 4 != 1 or self.frame_stride % 4 or not 0 < self.frame_stride < self.frames:
            raise ValueError(
                "a tile must have 4k+1 frames and a smaller stride divisible by 4, got "
                f"{self.frames} and {self.frame_stride}: "
                "take for example 17 and 8"
            )

    @classmethod
    def for_frame(cls, height: int, width: int) -> "TilePlan":
        """The plan for frames of height x width pixels: a function of the size alone, where
        upstream also asks for free memory.

        n = ceil(256 * 17 * (height + 32) * (width + 32) / 2^31), the widest activation in 32-bit
        indices. n = 1 is one tile (512x768 is); else the long side gets ceil(sqrt(n r)) tiles and
        the short one ceil(sqrt(n / r)), r their ratio, each the least multiple of 8 that covers the
        side with 32 pixels shared. That is upstream's tile on a large GPU wherever upstream reaches
        the border (768x1280: 2x3 of 400x448), and 8 pixels more where it stops short (640x1408: 1x3
        of 640x496).
        """
        parts, ratio = (
            math.ceil(256 * 17 * (height + 32) * (width + 32) / 2**31),
            max(height, width) / min(height, width),
        )
        few, many = (
            math.ceil(math.sqrt(n)) if parts > 1 else 1 for n in (parts / ratio, parts * ratio)
        )
        counts = (few, many) if width >= height else (many, few)
        # 40: a frame below the overlap is one tile as well
        return cls(
            *(
                max(40, 8 * math.ceil((size + 32 * (n - 1)) / n / 8))
                for size, n in zip((height, width), counts, strict=True)
            )
        )

    def largest(self, latents: Tensor) -> Tensor:
        """The first tile of `latents` [B, C, T, Y, X]; none is larger."""
        return latents[:, :, : (self.frames - 1) // 4 + 1, : self.height // 8, : self.width // 8]


def starts(size: int, tile: int, stride: int) -> range:
    """Where the tiles of one axis nominally begin: every `stride`, as many as it takes to reach
    `size`."""
    return range(0, max(size - tile, 0) + (stride if size > tile else 1), stride)


def fade(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """`tile` with its first `extent` positions along `dim` faded in over the last `extent` of
    `before`: weights 0, 1/n, 2/n ..."""
    shape = [extent if d == dim else 1 for d in range(tile.ndim)]
    ramp = torch.arange(extent, device=tile.device, dtype=tile.dtype).div(extent).view(shape)
    head, rest = tile.tensor_split((extent,), dim)
    return torch.cat(
        (before.narrow(dim, before.shape[dim] - extent, extent) * (1 - ramp) + head * ramp, rest),
        dim,
    )


def join(tiles: list[Tensor], overlap: int, dim: int) -> Tensor:
    """Each tile up to where the next one fades in, end to end."""
    return torch.cat(
        [tile.narrow(dim, 0, tile.shape[dim] - overlap) for tile in tiles[:-1]] + tiles[-1:], dim
    )


def tiled(latents: Tensor, plan: TilePlan, decode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Pieces [B, 3, f, 8Y, 8X] of the video of `latents` [B, C, T, Y, X], each tile by `decode`; in
    order, as soon as they are final."""
    length, faded, before = (plan.frames - 1) // 4, plan.frames - 1 - plan.frame_stride, None
    for start in starts(latents.shape[2] - 1, length, plan.frame_stride // 4):
        # [B, 3, <= frames, 8Y, 8X]
        tile = _tiled_in_space(latents[:, :, start : start + length + 1], plan, decode)
        if before is not None:
            yield before[:, :, : before.shape[2] - faded]
            tile = fade(before, tile[:, :, 1:], faded, dim=2)
        before = tile
    yield before


def _tiled_in_space(latents: Tensor, plan: TilePlan, decode: Callable[[Tensor], Tensor]) -> Tensor:
    height, width = latents.shape[3:]
    tile_height, tile_width, overlap = plan.height // 8, plan.width // 8, plan.overlap
    above, strips = [], []
    for y in starts(height, tile_height, tile_height - overlap // 8):
        row: list[Tensor] = []
        top = max(min(y, height - tile_height), 0)
        for x in starts(width, tile_width, tile_width - overlap // 8):
            left = max(min(x, width - tile_width), 0)
            tile = decode(latents[..., top : top + tile_height, left : left + tile_width])
            # a tile moved inwards counts from its nominal start
            tile = tile[..., 8 * (y - top) :, 8 * (x - left) :]
            tile = fade(above[len(row)], tile, overlap, dim=3) if above else tile
            row.append(fade(row[-1], tile, overlap, dim=4) if row else tile)
        strips.append(join(row, overlap, dim=4))  # [B, 3, F, <= height, 8X]
        above = row
    return join(strips, overlap, dim=3)  # [B, 3, F, 8Y, 8X]
