# SPDX-License-Identifier: Apache-2.0
"""What one size of video needs at every step and layer of the transformer: token order, rotary
tables, blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kandinsky_kernels import Rotary

from ..config import DiTConfig, NablaConfig
from ..devices.parallel import Ranks
from . import geometry


@dataclass(frozen=True)
class Chunks:
    """How much of a visual block is computed at once. Heads and tokens do not see each other there,
    so only rounding can depend on it: a matrix product may sum in another order at another size.

    heads: of self-attention; None: all, and one product gives their queries, keys and values.
    tokens: of all samples together, in everything but self-attention; 16384 are enough for large
    matrix products, and a sixth of a 10 s clip.
    """

    heads: int | None = None
    tokens: int = 16384


@dataclass(frozen=True, eq=False)
class Layout:
    """What one video size needs at every step and layer, computed once by `make_layout`."""

    grid: geometry.Grid
    rotary: Rotary  # its positions in the order of the tokens
    nabla: NablaConfig | None = None  # None: dense attention, raster order
    order: Tensor | None = None  # int64 [S], raster index of the i-th token
    inverse: Tensor | None = None  # int64 [S]
    block_offsets: Tensor | None = None  # int32 [N + 1]
    rope_cast: torch.dtype | None = None
    chunks: Chunks = Chunks()
    ranks: Ranks | None = None  # the processes that share the run
    text_rotaries: dict[tuple[int, int], Rotary] = field(default_factory=dict, repr=False)

    def text_rotary(self, length: int, head_dim: int) -> Rotary:
        """The angles of a text of `length` tokens; remembered, as every step asks for the same two
        or so."""
        if (length, head_dim) not in self.text_rotaries:
            angles = geometry.rotary_angles(length, (head_dim,), (1.0,))
            self.text_rotaries[length, head_dim] = Rotary.per_token(
                *(x.to(self.rotary.cos.device) for x in (angles.cos(), angles.sin()))
            )
        return self.text_rotaries[length, head_dim]


def make_layout(
    config: DiTConfig,
    grid: geometry.Grid,
    scale_factor: tuple[float, float, float],
    nabla: NablaConfig | None = None,
    device: torch.device | str = "cpu",
    rope_cast: torch.dtype | None = None,
    **options,
) -> Layout:
    """Token order, rotary tables and blocks of one video size. With `nabla` tokens come tile by
    tile; any grid will do.

    rope_cast: round rotated queries and keys to this dtype and back. None is exact; torch.bfloat16
    reproduces in an fp32 run what diffusers does there. options: `Layout`'s chunks and ranks.
    """
    # [P, D/2]
    angles = geometry.rotary_angles(max(grid.T, grid.Y, grid.X), config.axes_dims, scale_factor)
    order = geometry.tile_order(grid) if nabla else None
    positions = geometry.positions(grid) if order is None else geometry.positions(grid)[order]
    rotary = Rotary(
        angles.cos().to(device),
        angles.sin().to(device),
        positions.to(device),
        tuple(dim // 2 for dim in config.axes_dims),
    )
    if nabla is None:
        return Layout(grid, rotary, rope_cast=rope_cast, **options)
    return Layout(
        grid,
        rotary,
        nabla,
        order.to(device),
        geometry.inverse_order(order).to(device),
        geometry.block_offsets(grid).to(device),
        rope_cast,
        **options,
    )
