# SPDX-License-Identifier: Apache-2.0
"""The NABLA recipe (arXiv 2507.13546): each block of queries chooses the blocks of keys that hold
most of its attention, judged by block means, and attends to these alone.

The transformer of this package, diffusers' and ComfyUI's all follow this one function; they differ
in how they project tokens to heads, and in how a norm's weight is reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kandinsky_kernels import Rotary, block_means, block_sparse_attention, select_blocks

# (heads [B, S, H, D], rotary, block offsets)
# -> (normalised and rotated heads [B, S, H, D], their block means [B, H, N, D])
NormWithMeans = Callable[[Tensor, Rotary, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Nabla:
    """The blocks of one video's tokens, and how a layer chooses among them."""

    rotary: Rotary  # positions in the order of the tokens, which is tile by tile
    block_offsets: Tensor  # int32 [N + 1], block i owns tokens offsets[i] to offsets[i + 1]
    tiles: tuple[int, int, int]  # blocks along (T, Y, X), N in all
    keep_mass: float  # probability that the chosen blocks must hold, the published P
    window: tuple[int, int, int] | None  # in blocks; what lies within is always kept
    # Rotated queries and keys are rounded to this dtype and back, as diffusers does; None: exact.
    rope_cast: torch.dtype | None = None
    # No |query . key| / sqrt(D) exceeds this.
    logit_bound: float = math.inf
    # Called with block means of queries and keys [B, H, N, D] and the selection, by `inspection`.
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None


def attend(
    project: Callable[[], tuple[Tensor, Tensor, Tensor]],
    query_norm: NormWithMeans,
    key_norm: NormWithMeans,
    nabla: Nabla,
) -> Tensor:
    """Block-sparse attention [B, S, H, D] of a video over itself.

    project: gives queries, keys and values, [B, S, H, D] each, neither normalised nor rotated. It
    is called in here so that no caller holds its results, and each is freed once it has served.
    """
    query, key, value = project()
    query, query_means = query_norm(query, nabla.rotary, nabla.block_offsets)
    key, key_means = key_norm(key, nabla.rotary, nabla.block_offsets)
    if nabla.rope_cast is not None:
        # The means decide which blocks are kept, so they too must be those of the rounded values.
        query = round_to(query, nabla.rope_cast)
        key = round_to(key, nabla.rope_cast)
        query_means = block_means(query, nabla.block_offsets)
        key_means = block_means(key, nabla.block_offsets)
    selection = select_blocks(
        query_means.detach(),
        key_means.detach(),
        nabla.keep_mass,
        nabla.tiles,
        nabla.window,
    )  # int32 [B, H, N, ceil(N / 32)]
    if nabla.watch is not None:
        nabla.watch(query_means, key_means, selection)
    out = block_sparse_attention(
        query,
        key,
        value,
        selection,
        nabla.block_offsets,
        logit_bound=nabla.logit_bound,
    )
    return cast(Tensor, out)  # with return_lse it would be a pair


def round_to(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x rounded to `dtype`, in its own dtype again; x itself where `dtype` is None."""
    return x if dtype is None else x.to(dtype).to(x.dtype)
