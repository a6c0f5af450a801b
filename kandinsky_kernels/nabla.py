# SPDX-License-Identifier: Apache-2.0
"""NABLA (arXiv 2507.13546): which blocks of keys each block of queries attends to, and attention
over those blocks.

A block is one 8 x 8 tile of patches of one latent frame, fewer at a ragged border: tokens come tile
by tile and block i owns tokens ``block_offsets[i]`` to ``block_offsets[i + 1]``. A selection is
packed: int32 [B, H, N, W] with W = ceil(N / 32); bit j % 32 of word j // 32 says that the block of
queries keeps key block j.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._library import declare, differentiate, in_double


def _empty_selection(query_means: Tensor, *_) -> Tensor:
    B, H, N, _ = query_means.shape
    return query_means.new_empty((B, H, N, (N + 31) // 32), dtype=torch.int32)


def _empty_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    B, S, H, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((B, H, S), dtype=lse_dtype)


def _empty_gradients(query: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


_select_blocks = declare(
    "select_blocks(Tensor query_means, Tensor key_means, float keep_mass, int[] tiles, int[] "
    "window, str ties) -> Tensor",
    reference.select_blocks,
    _empty_selection,
)
_block_sparse_attention = declare(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor selection, Tensor "
    "block_offsets, float scale,"
    " float logit_bound) -> (Tensor, Tensor)",
    reference.block_sparse_attention,
    _empty_attention,
)
_block_sparse_attention_backward = declare(
    "block_sparse_attention_backward(Tensor query, Tensor key, Tensor value, Tensor out, Tensor "
    "lse, Tensor selection,"
    " Tensor block_offsets, Tensor grad_out, Tensor? grad_lse, float scale) -> (Tensor, Tensor, "
    "Tensor)",
    reference.block_sparse_attention_backward,
    _empty_gradients,
)


def _check_alike(**tensors: Tensor) -> None:
    """The kernels read whole rows of floats: one shape of four dimensions, one float dtype, rows
    contiguous."""
    (first, x), *rest = tensors.items()
    names = ", ".join(tensors)
    if x.dim() != 4 or any(other.shape != x.shape for _, other in rest):
        raise ValueError(
            f"{names} must share one shape of four dimensions, got "
            f"{[list(t.shape) for t in tensors.values()]}."
        )
    if not x.is_floating_point() or any(other.dtype != x.dtype for _, other in rest):
        raise TypeError(
            f"{names} must share one float dtype, got "
            f"{[t.dtype for t in tensors.values()]}; cast them first."
        )
    for name, t in tensors.items():
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides "
                f"{list(t.stride())}; "
                "call .contiguous() first."
            )


def select_blocks(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    ties: str = "all",
) -> Tensor:
    """For every block of queries, the smallest set of key blocks that holds ``keep_mass`` of its
    probability.

    A row's masses are m_j = round(2^32 exp(s_j - max s)) with s = query_means key_means^T /
    sqrt(D). In ascending order of m, blocks are dropped while their running sum, the block itself
    included, stays below (1 - keep_mass) * sum(m): exact integer arithmetic, so no order of
    summation changes the set. Blocks as heavy as the lightest kept one are all kept
    (``ties="all"``), or dropped from the lowest index on as a stable sort would
    (``ties="stable"``). The largest is always kept; a row without a finite maximum keeps
    everything. keep_mass is the published P.

    query_means, key_means: [B, H, N, D] (fp32 from `norm_rope_means`), last dimension contiguous. tiles: (T, Y, X) grid of blocks with
    N = T * Y * X, and window: published full widths (wT, wY, wX), for the union with the local window
    |dt| <= wT // 2, |dy| <= wY // 2, |dx| <= wX // 2, truncated at borders; both or neither.
    Returns the packed selection, int32 [B, H, N, W]. Raises ValueError on other shapes, strides or values, TypeError on
    other dtypes.
    """
    _check_alike(query_means=query_means, key_means=key_means)
    if not 0.0 < keep_mass <= 1.0:
        raise ValueError(f"keep_mass must be in (0, 1], got {keep_mass}.")
    if ties not in ("all", "stable"):
        raise ValueError(f'ties must be "all" or "stable", got {ties!r}.')
    if (tiles is None) != (window is None):
        raise ValueError("tiles and window must be given together, got only one of them.")
    tiles, window = list(tiles or ()), list(window or ())
    with torch.no_grad():  # the choice has no gradient
        op = reference.select_blocks if in_double(query_means) else _select_blocks
        return op(query_means, key_means, keep_mass, tiles, window, ties)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    logit_bound: float = math.inf,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value over the kept blocks only.

    query, key, value: [B, S, H, D] of one dtype, last dimension contiguous, other strides free.
    selection: packed int32 [B, H, N, W]. block_offsets: int32 [N + 1] from 0 to S, blocks of 1 to
    64 tokens. scale: 1 / sqrt(D) by default.
    logit_bound: a number that no |scale * query . key| exceeds, where one is known, as after
    `norm_rope` with known weights. A kernel may then take it for every row's maximum and need not
    search; a false one can overflow or lose the row. Returns out [B, S, H, D], contiguous, in
    query's dtype; with return_lse also the natural log-sum-exp of the kept logits, fp32 [B, H, S].
    A block of queries that keeps nothing gives zeros and -inf. Raises ValueError on other shapes,
    strides and bounds and, except by GPU kernels, which do not look at them, on other
    block_offsets; TypeError on other dtypes.
    """
    _check_alike(query=query, key=key, value=value)
    if block_offsets.dim() != 1 or block_offsets.dtype != torch.int32:
        raise ValueError(
            f"block_offsets must be int32 [N + 1], got {block_offsets.dtype} "
            f"{list(block_offsets.shape)}."
        )
    N = block_offsets.shape[0] - 1
    wanted = (query.shape[0], query.shape[2], N, -(-N // 32))
    if selection.shape != wanted or selection.dtype != torch.int32:
        raise ValueError(
            f"selection must be int32 [B, H, N, ceil(N / 32)] = {list(wanted)}, got "
            f"{selection.dtype} "
            f"{list(selection.shape)}; make it with select_blocks or pack_selection."
        )
    if not logit_bound >= 0.0:
        raise ValueError(
            f"logit_bound must be a number from 0 on, got {logit_bound}; leave it "
            "out when none is known."
        )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    op = reference.block_sparse_attention if in_double(query) else _block_sparse_attention
    out, lse = op(query, key, value, selection, block_offsets, scale, logit_bound)
    return (out, lse) if return_lse else out


def selection_density(selection: Tensor, blocks: int) -> float:
    """Kept blocks over all blocks of a packed selection for ``blocks`` = N blocks: a number in
    0..1. Raises ValueError where it is of another number of blocks, TypeError on other dtypes."""
    if selection.dim() < 2 or selection.shape[-2] != blocks:
        raise ValueError(
            f"selection must have a row for each of N = {blocks} blocks, got "
            f"{list(selection.shape)}; give the number of blocks it was made for."
        )
    return reference.unpack_selection(selection, blocks).double().mean().item()


def transpose_selection(selection: Tensor) -> Tensor:
    """Which blocks of queries keep a block of keys: bit i of row j of the result is bit j of row i
    of ``selection``.

    selection: packed int32 [..., N, W], on any device. Returns the same shape. Tiles of 32 x 32
    bits are transposed in five rounds of swaps (Warren, Hacker's Delight, 7-3), so that the map of
    N x N never exists. Raises ValueError on other shapes and dtypes.
    """
    N = selection.shape[-2] if selection.dim() > 1 else 0
    if selection.dtype != torch.int32 or selection.dim() < 2 or selection.shape[-1] != -(-N // 32):
        raise ValueError(
            f"selection must be int32 [..., N, ceil(N / 32)], got {selection.dtype} "
            f"{list(selection.shape)}; "
            "make it with select_blocks or pack_selection."
        )
    W = selection.shape[-1]
    # [..., tile of rows, 32, word]
    bits = F.pad(selection, (0, 0, 0, 32 * W - N)).unflatten(-2, (W, 32))
    for width, mask in (
        (16, 0x0000FFFF),
        (8, 0x00FF00FF),
        (4, 0x0F0F0F0F),
        (2, 0x33333333),
        (1, 0x55555555),
    ):
        low, high = bits.unflatten(-2, (-1, 2, width)).unbind(-3)  # rows that lie `width` apart
        swapped = ((low >> width) ^ high) & mask
        bits = torch.stack((low ^ (swapped << width), high ^ swapped), -3).flatten(-4, -2)
    return bits.transpose(-3, -1).flatten(-3, -2)[..., :N, :].contiguous()


# ---- gradients


def _keep_attention(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    query, key, value, selection, block_offsets, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradients = _block_sparse_attention_backward(
        query, key, value, out, lse, selection, block_offsets, grad_out, grad_lse, ctx.scale
    )
    return *gradients, None, None, None, None


differentiate("block_sparse_attention", _keep_attention, _attention_gradients)
