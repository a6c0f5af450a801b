# SPDX-License-Identifier: Apache-2.0
"""What one size of video needs at every step and in every layer of the transformer: the order of
its tokens, rotary tables, and blocks for NABLA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kandinsky_kernels import Rotary

from ..config import DiTConfig, NablaConfig
from ..devices.parallel import Ranks
from . import geometry


@dataclass(frozen=True)
class Chunks:
    """How much of a visual block is computed at once, to save memory.

    Self-attention treats every head by itself, and everything else every token. So only rounding
    can depend on these numbers: a matrix product may sum in another order at another size.
    """

    # Heads of self-attention; None: all, and one product gives their queries, keys and values.
    heads: int | None = None
    # Tokens of all samples together, in everything but self-attention. 16384 are enough for
    # matrix products to be fast, and a sixth of a 10 s clip. Where fewer than all are done at a
    # time, their results are copied to the places of what they came from.
    tokens: int = 16384


@dataclass(frozen=True, eq=False)
class Layout:
    """What one size of video needs at every step and in every layer; `make_layout` computes it."""

    grid: geometry.Grid
    rotary: Rotary  # positions in the order of the tokens
    nabla: NablaConfig | None = None  # None: dense attention, tokens in raster order
    order: Tensor | None = None  # int64 [S], raster index of the i-th token
    inverse: Tensor | None = None  # int64 [S], undoes `order`
    block_offsets: Tensor | None = None  # int32 [N + 1], see `geometry.block_offsets`
    rope_cast: torch.dtype | None = None  # see `make_layout`
    chunks: Chunks = Chunks()
    ranks: Ranks | None = None  # the processes that share the run
    text_rotaries: dict[tuple[int, int], Rotary] = field(default_factory=dict, repr=False)

    def text_rotary(self, length: int, head_dim: int) -> Rotary:
        """The rotary angles of a text of `length` tokens.

        They are remembered: every step needs them, for the prompt and for the negative prompt.
        """
        key = (length, head_dim)
        if key not in self.text_rotaries:
            device = self.rotary.cos.device
            angles = geometry.rotary_angles(length, (head_dim,), (1.0,))  # [L, D / 2]
            cos = angles.cos().to(device)
            sin = angles.sin().to(device)
            self.text_rotaries[key] = Rotary.per_token(cos, sin)
        return self.text_rotaries[key]


def make_layout(
    config: DiTConfig,
    grid: geometry.Grid,
    scale_factor: tuple[float, float, float],
    nabla: NablaConfig | None = None,
    device: torch.device | str = "cpu",
    rope_cast: torch.dtype | None = None,
    **options,
) -> Layout:
    """Token order, rotary tables and blocks of one size of video, on `device`.

    scale_factor: divides the rotary angles along (T, Y, X). nabla: block-sparse attention, for
    which tokens come tile by tile; any grid will do. rope_cast: rotated queries and keys are
    rounded to this dtype and back. None is exact; torch.bfloat16 reproduces in an fp32 run what
    diffusers does there. options: `Layout`'s chunks and ranks. Raises ValueError for a scale factor
    that angles cannot be divided by.
    """
    if len(scale_factor) != 3 or not all(0 < scale < math.inf for scale in scale_factor):
        raise ValueError(
            "scale_factor must be three positive numbers, for time, height and width, "
            f"got {tuple(scale_factor)}; use those of the preset"
        )
    longest = max(grid.T, grid.Y, grid.X)
    angles = geometry.rotary_angles(longest, config.axes_dims, scale_factor)  # [longest, D / 2]
    positions = geometry.positions(grid)  # [S, 3]
    order = geometry.tile_order(grid) if nabla else None
    if order is not None:
        positions = positions[order]
    rotary = Rotary(
        angles.cos().to(device),
        angles.sin().to(device),
        positions.to(device),
        tuple(dim // 2 for dim in config.axes_dims),
    )
    if order is None:
        return Layout(
            grid,
            rotary,
            rope_cast=rope_cast,
            **options,
        )
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
