# SPDX-License-Identifier: Apache-2.0
"""How the time modulates the transformer: a shift, scale and gate for every sub-layer, which is

    x + gate * f(LayerNorm(x) * (1 + scale) + shift)

All of them depend on the time and the pooled text alone, so that those of every step are computed
before the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import gated_add_norm, modulated_norm

from .linear import Linear

TEXT_SUBLAYERS = 2  # of a text block: self-attention, feed-forward
VISUAL_SUBLAYERS = 3  # of a visual block: self-attention, cross-attention, feed-forward


@dataclass(frozen=True, eq=False)
class ShiftScale:
    """How the time modulates one norm, [B, C] each. It is all that the out layer has."""

    shift: Tensor
    scale: Tensor

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm(x) * (1 + scale) + shift, for x [B, S, C]."""
        return modulated_norm(x, self.scale, self.shift)


@dataclass(frozen=True, eq=False)
class Triple(ShiftScale):
    """How the time modulates one sub-layer: the norm before it, and a gate [B, C] after it."""

    gate: Tensor

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + gate * branch, where `branch` is what the sub-layer gave: [B, S, C]."""
        return gated_add_norm(x, branch, self.gate)[0]

    def add_and_norm(
        self,
        x: Tensor,
        branch: Tensor,
        following: ShiftScale,
    ) -> tuple[Tensor, Tensor]:
        """The same sum, and what `following.norm` makes of it, in one pass over memory."""
        y, normed = gated_add_norm(
            x,
            branch,
            self.gate,
            following.scale,
            following.shift,
        )
        assert normed is not None
        return y, normed


@dataclass(frozen=True, eq=False)
class Modulations:
    """How the time modulates one pass."""

    text: list[tuple[Triple, ...]]  # of each text block: attention, feed-forward
    visual: list[tuple[Triple, ...]]  # of each visual block: self-, cross-attention, feed-forward
    out: ShiftScale

    def before(self, i: int) -> ShiftScale:
        """What modulates the norm that visual block i begins with, or past the last block the out
        layer."""
        return self.visual[i][0] if i < len(self.visual) else self.out


@dataclass(frozen=True, eq=False)
class ModulationTable:
    """The modulations of n points in time, kept where the weights are that made them.

    A hundred passes of Pro take 0.9 GB, of which one pass reads 9 MB: these are copied to `device`
    when they are asked for.
    """

    vectors: Tensor  # [n, B, V, C]: of text blocks, visual blocks and the out layer, one by one
    text_blocks: int
    visual_blocks: int
    device: torch.device

    def step(self, i: int) -> Modulations:
        """The modulations of the i-th point in time."""
        vectors = iter(self.vectors[i].to(self.device, non_blocking=True).unbind(1))  # V x [B, C]
        text = [triples(vectors, TEXT_SUBLAYERS) for _ in range(self.text_blocks)]
        visual = [triples(vectors, VISUAL_SUBLAYERS) for _ in range(self.visual_blocks)]
        shift, scale = vectors
        return Modulations(text, visual, ShiftScale(shift, scale))


def triples(vectors: Iterator[Tensor], count: int) -> tuple[Triple, ...]:
    """The next `count` triples of an iterator over shift, scale, gate, shift, scale, gate, ..."""
    return tuple(Triple(next(vectors), next(vectors), next(vectors)) for _ in range(count))


class Modulation(nn.Module):
    """One block's modulation vectors: a linear layer on SiLU of the time's embedding. It starts at
    zero, where a block is the identity."""

    def __init__(
        self,
        time_dim: int,
        model_dim: int,
        count: int,
    ):
        super().__init__()
        self.count = count
        self.out_layer = Linear(time_dim, count * model_dim)
        if not self.out_layer.weight.is_meta:
            nn.init.zeros_(self.out_layer.weight)
            nn.init.zeros_(self.out_layer.bias)

    def forward(self, time: Tensor) -> Tensor:
        """[..., time_dim] -> [..., count, C], in the order of shift, scale, gate per sub-layer."""
        return self.out_layer(F.silu(time)).unflatten(-1, (self.count, -1))
