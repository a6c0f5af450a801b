# SPDX-License-Identifier: Apache-2.0
"""Embedded prompts, as text encoders return them and as the transformer reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The embeddings of B prompts.

    embeds: [B, L, Dt], one row for each of L tokens, zero behind each prompt's end.
    lengths: int64 [B] on the CPU, the tokens of each prompt; None means all L.
    pooled: [B, Dp], one vector for each prompt.
    """

    embeds: Tensor
    lengths: Tensor | None
    pooled: Tensor

    def repeat(self, count: int) -> Conditioning:
        """The same prompts `count` times, [count * B, ...]."""
        return Conditioning(
            self.embeds.repeat(count, 1, 1),
            None if self.lengths is None else self.lengths.repeat(count),
            self.pooled.repeat(count, 1),
        )

    def to(self, device: torch.device) -> Conditioning:
        """With embeds and pooled on `device`; lengths stay on the CPU, which reads them."""
        return Conditioning(self.embeds.to(device), self.lengths, self.pooled.to(device))
