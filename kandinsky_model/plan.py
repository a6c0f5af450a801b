# SPDX-License-Identifier: Apache-2.0
"""What one size of video needs at every step and layer of the transformer: token order, rotary tables, blocks."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import geometry
from .config import DiTConfig, NablaConfig

Rotary = tuple[Tensor, Tensor]  # cos, sin: fp32 [S, D/2]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one video size needs at every step and layer, computed once by `make_plan`."""

    grid: geometry.Grid
    rotary: Rotary  # in the order of the tokens
    nabla: NablaConfig | None = None  # None: dense attention, raster order
    order: Tensor | None = None  # int64 [S], raster index of the i-th token
    inverse: Tensor | None = None  # int64 [S]
    block_offsets: Tensor | None = None  # int32 [N + 1]
    rope_cast: torch.dtype | None = None
    text_rotaries: dict[tuple[int, int], Rotary] = field(default_factory=dict, repr=False)

    def text_rotary(self, length: int, head_dim: int) -> Rotary:
        """cos, sin of a text of `length` tokens; remembered, as every step asks for the same two or so."""
        if (length, head_dim) not in self.text_rotaries:
            angles = geometry.rotary_angles_1d(length, head_dim)
            self.text_rotaries[length, head_dim] = (angles.cos().to(self.rotary[0].device), angles.sin().to(self.rotary[0].device))
        return self.text_rotaries[length, head_dim]


def make_plan(config: DiTConfig, grid: geometry.Grid, scale_factor: tuple[float, float, float], nabla: NablaConfig | None = None,
              device: torch.device | str = "cpu", rope_cast: torch.dtype | None = None) -> Plan:
    """Token order, rotary tables and blocks of one video size. With `nabla` tokens come tile by tile; any grid will do.

    rope_cast: round rotated queries and keys to this dtype and back. None is exact; torch.bfloat16 reproduces in an
    fp32 run what diffusers does there.
    """
    angles = geometry.rotary_angles(grid, config.axes_dims, scale_factor)  # [S, D/2], raster
    if nabla is None:
        return Plan(grid, (angles.cos().to(device), angles.sin().to(device)), rope_cast=rope_cast)
    order = geometry.tile_order(grid)
    angles = angles[order]
    return Plan(grid, (angles.cos().to(device), angles.sin().to(device)), nabla, order.to(device),
                geometry.inverse_order(order).to(device), geometry.block_offsets(grid).to(device), rope_cast)
