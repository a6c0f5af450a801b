# SPDX-License-Identifier: Apache-2.0
"""What a text encoder gives and what the transformer is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a prompt became: embeds [B, L, Dt], lengths int64 [B] or None (every row is text),
    pooled [B, Dp]."""

    embeds: Tensor
    lengths: Tensor | None
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embedded prompts. embeds: [B, L, Dt], zero behind each prompt's end; lengths: int64 [B] on
    the CPU; pooled: [B, Dp]."""

    embeds: Tensor
    lengths: Tensor
    pooled: Tensor
