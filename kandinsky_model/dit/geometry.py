# SPDX-License-Identifier: Apache-2.0
"""Everything that depends only on the grid: patches, the order of tokens, blocks, the local window,
rotary angles.

A token is one latent frame x 2 x 2 latent pixels (16 x 16 output pixels). *Raster* order counts (t,
y, x). *Tile* order walks tiles of 8 x 8 tokens of one latent frame, tiles in raster order and
tokens in raster order inside a tile; a tile is one attention block. Where the grid is not a
multiple of 8 the tiles at its right and lower border simply hold fewer tokens: no padding token
ever exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

TILE = 8


@dataclass(frozen=True)
class Grid:
    """Latent frames T and patch rows Y, patch columns X (pixels / 16)."""

    T: int
    Y: int
    X: int

    def __post_init__(self):
        if min(self.T, self.Y, self.X) < 1:
            raise ValueError(
                f"a grid must have at least one token along each axis, got {self.T} "
                f"x {self.Y} x {self.X}; enlarge it"
            )

    @property
    def tokens(self) -> int:
        return self.T * self.Y * self.X

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles along (T, Y, X)."""
        return self.T, -(-self.Y // TILE), -(-self.X // TILE)

    @property
    def blocks(self) -> int:
        return math.prod(self.tiles)


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Latent pixels [B, T, h, w, C] -> tokens [B, S, patch * C] in raster order. Inside a token the
    *channel runs fastest*."""
    o, p, q = patch_size
    return rearrange(x, "b (t o) (y p) (x q) c -> b (t y x) (o p q c)", o=o, p=p, q=q)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: tuple[int, int, int]) -> Tensor:
    """Tokens [B, S, C * patch] in raster order -> [B, T, h, w, C]. Here, unlike at the input, the
    *channel runs slowest*."""
    o, p, q = patch_size
    return rearrange(
        tokens,
        "b (t y x) (c o p q) -> b (t o) (y p) (x q) c",
        t=grid.T,
        y=grid.Y,
        x=grid.X,
        o=o,
        p=p,
        q=q,
    )


def tile_order(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """int64 [S]: the raster index of the i-th token in tile order, so `x_tiled =
    x_raster[tile_order(grid)]`."""
    index = torch.arange(grid.tokens, device=device)
    frame, index = index // (grid.Y * grid.X), index % (grid.Y * grid.X)
    # only the last row of tiles may be lower
    top, index = TILE * (index // (TILE * grid.X)), index % (TILE * grid.X)
    height = (grid.Y - top).clamp(max=TILE)
    # only the last tile of a row may be narrower
    left, index = TILE * (index // (TILE * height)), index % (TILE * height)
    width = (grid.X - left).clamp(max=TILE)
    return (frame * grid.Y + top + index // width) * grid.X + left + index % width


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def block_offsets(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """int32 [N + 1]: block i owns the tokens offsets[i] .. offsets[i + 1] of the tile order (1 to
    64 of them)."""
    _, tiles_y, tiles_x = grid.tiles
    rows = (grid.Y - TILE * torch.arange(tiles_y, device=device)).clamp(max=TILE)
    columns = (grid.X - TILE * torch.arange(tiles_x, device=device)).clamp(max=TILE)
    sizes = (rows[:, None] * columns).flatten().repeat(grid.T)  # [N]
    return F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def local_window(tiles: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """bool [N, N]: which tiles lie in each other's window of full widths (wT, wY, wX), cut off at
    the borders.

    The kernels work this out from coordinates; this dense map is what they are tested against.
    """
    near = []
    for count, width in zip(tiles, window, strict=True):
        position = torch.arange(count)
        near.append((position[:, None] - position).abs() <= width // 2)
    t, y, x = near
    both = (
        t[:, None, None, :, None, None]
        & y[None, :, None, None, :, None]
        & x[None, None, :, None, None, :]
    )
    return rearrange(both, "t y x u v w -> (t y x) (u v w)")


def frequencies(count: int, device: torch.device | str | None = None) -> Tensor:
    """fp32 [count]: 10000^(-i / count), the geometric ladder shared by the time embedding and the
    rotary angles.

    The exponent is rounded to fp32, as in the official code; its power is exact to the last bit,
    for the same angles on every processor.
    """
    exponent = -math.log(10000.0) * torch.arange(count, dtype=torch.float32, device=device) / count
    return torch.exp(exponent.double()).float()


def positions(grid: Grid) -> Tensor:
    """int32 [S, 3], raster order: where each token lies along (T, Y, X)."""
    axes = [torch.arange(length, dtype=torch.int32) for length in (grid.T, grid.Y, grid.X)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def rotary_angles(
    length: int, axes_dims: tuple[int, ...], scale_factor: tuple[float, ...]
) -> Tensor:
    """fp32 [length, D / 2]: the angle of each adjacent pair of a head at each position along its
    axis.

    Pairs are split among the axes by `axes_dims`. angle = position * frequency / scale_factor: the
    scale divides the angle and so stretches the grid a model was trained on.
    """
    place = torch.arange(length, dtype=torch.float32)
    return torch.cat(
        [
            torch.outer(place, frequencies(dim // 2)) / scale
            for dim, scale in zip(axes_dims, scale_factor, strict=True)
        ],
        -1,
    )
