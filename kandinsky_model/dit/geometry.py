# SPDX-License-Identifier: Apache-2.0
"""Everything that depends only on the grid of tokens: patches, the order of tokens, blocks, the
local window, rotary angles.

A token stands for one latent frame x 2 x 2 latent pixels, which are 16 x 16 output pixels. In
*raster* order tokens are counted along X first, then Y, then T. In *tile* order the frames are cut
into tiles of 8 x 8 tokens: tiles follow each other in raster order, and so do the tokens inside a
tile. A tile is one block of NABLA. Where the grid is not a multiple of 8, the tiles at its right
and lower border hold fewer tokens; there are no padding tokens.
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
    """The tokens of a video: T latent frames of Y patch rows and X patch columns (pixels / 16)."""

    T: int
    Y: int
    X: int

    def __post_init__(self):
        if min(self.T, self.Y, self.X) < 1:
            raise ValueError(
                "a grid must have at least one token along each axis, "
                f"got {self.T} x {self.Y} x {self.X}; enlarge it"
            )

    @property
    def tokens(self) -> int:
        return self.T * self.Y * self.X

    @property
    def tiles(self) -> tuple[int, int, int]:
        """How many tiles there are along (T, Y, X)."""
        tiles_y = -(-self.Y // TILE)
        tiles_x = -(-self.X // TILE)
        return self.T, tiles_y, tiles_x

    @property
    def blocks(self) -> int:
        return math.prod(self.tiles)


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Latent pixels [B, T, 2Y, 2X, C] -> tokens [B, S, patch * C] in raster order. The *channel
    runs fastest* inside a token."""
    o, p, q = patch_size
    return rearrange(
        x,
        "b (t o) (y p) (x q) c -> b (t y x) (o p q c)",
        o=o,
        p=p,
        q=q,
    )


def unpatchify(
    tokens: Tensor,
    grid: Grid,
    patch_size: tuple[int, int, int],
) -> Tensor:
    """Tokens [B, S, C * patch] in raster order -> latent pixels [B, T, 2Y, 2X, C]. Unlike at the
    input, the *channel runs slowest* inside a token."""
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
    """int64 [S]: the raster index of the i-th token in tile order, so that
    `x_tiled = x_raster[tile_order(grid)]`.

    All is index arithmetic on the device: a token's place in tile order is taken apart into the
    frame, the row of tiles, the tile and the place inside it.
    """
    index = torch.arange(grid.tokens, device=device)
    frame_tokens = grid.Y * grid.X
    frame = index // frame_tokens
    index = index % frame_tokens
    row_tokens = TILE * grid.X  # only the last row of tiles may have fewer, being lower
    top = TILE * (index // row_tokens)
    index = index % row_tokens
    height = (grid.Y - top).clamp(max=TILE)
    tile_tokens = TILE * height  # only the last tile of a row may have fewer, being narrower
    left = TILE * (index // tile_tokens)
    index = index % tile_tokens
    width = (grid.X - left).clamp(max=TILE)
    y = top + index // width
    x = left + index % width
    return (frame * grid.Y + y) * grid.X + x


def inverse_order(order: Tensor) -> Tensor:
    """int64 [S]: the permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def block_offsets(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """int32 [N + 1]: in tile order, block i owns the tokens from offsets[i] up to offsets[i + 1],
    1 to 64 of them."""
    _, tiles_y, tiles_x = grid.tiles
    top = TILE * torch.arange(tiles_y, device=device)
    left = TILE * torch.arange(tiles_x, device=device)
    heights = (grid.Y - top).clamp(max=TILE)
    widths = (grid.X - left).clamp(max=TILE)
    frame = (heights[:, None] * widths).flatten()  # tokens of each tile of one frame
    sizes = frame.repeat(grid.T)  # [N]
    return F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def local_window(tiles: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """bool [N, N]: which tiles lie in each other's window, which has the full widths (wT, wY, wX)
    and is cut off at the borders.

    The kernels work this out from coordinates; this dense map is what they are tested against.
    """
    near = []
    for count, width in zip(tiles, window, strict=True):
        position = torch.arange(count)
        distance = (position[:, None] - position).abs()
        near.append(distance <= width // 2)
    t, y, x = near  # [T, T], [Y, Y], [X, X]
    t = rearrange(t, "t u -> t 1 1 u 1 1")
    y = rearrange(y, "y v -> 1 y 1 1 v 1")
    x = rearrange(x, "x w -> 1 1 x 1 1 w")
    return rearrange(t & y & x, "t y x u v w -> (t y x) (u v w)")


def frequencies(count: int, device: torch.device | str | None = None) -> Tensor:
    """fp32 [count]: 10000^(-i / count), the geometric sequence of frequencies that the time
    embedding and the rotary angles share.

    The exponent is rounded to fp32, as in the official code. The power of it is exact to the last
    bit, so that angles are the same on every processor; Apple's GPUs, which have no fp64, are given
    it from the CPU.
    """
    apple = torch.device(device or "cpu").type == "mps"
    index = torch.arange(count, dtype=torch.float32, device="cpu" if apple else device)
    exponent = -math.log(10000.0) * index / count
    return torch.exp(exponent.double()).float().to(device)


def positions(grid: Grid) -> Tensor:
    """int32 [S, 3]: where each token lies along (T, Y, X), in raster order."""
    axes = [torch.arange(length, dtype=torch.int32) for length in (grid.T, grid.Y, grid.X)]
    places = torch.meshgrid(*axes, indexing="ij")  # 3 x [T, Y, X]
    return torch.stack(places, -1).flatten(0, 2)


def rotary_angles(
    length: int,
    axes_dims: tuple[int, ...],
    scale_factor: tuple[float, ...],
) -> Tensor:
    """fp32 [length, D / 2]: by which angle each adjacent pair of a head's channels turns, at each
    position along the axis that the pair belongs to.

    `axes_dims` splits the channels among the axes. The angle is position * frequency /
    scale_factor: the scale divides the angle, and so stretches the grid that a model was trained
    on over a larger one.
    """
    position = torch.arange(length, dtype=torch.float32)
    angles = []
    for dim, scale in zip(axes_dims, scale_factor, strict=True):
        angles.append(torch.outer(position, frequencies(dim // 2)) / scale)  # [length, dim / 2]
    return torch.cat(angles, -1)
