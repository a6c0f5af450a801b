# SPDX-License-Identifier: Apache-2.0
"""NABLA (arXiv 2507.13546): block-sparse attention whose blocks the queries and keys choose.

A block is one 8 x 8 tile of tokens of one latent frame, fewer at a ragged border. Tokens come tile
by tile, and block i has the tokens from ``block_offsets[i]`` to ``block_offsets[i + 1]``.

A selection says which blocks of keys each block of queries attends to, packed into bits (see
`selections`): int32 [B, H, N, W]. Sizes: B samples, S tokens, H heads of D numbers, N blocks,
W = ceil(N / 32) words.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from ._library import declare, differentiate


def _empty_selection(query_means: Tensor, *_) -> Tensor:
    B, H, N = query_means.shape[:3]
    W = (N + 31) // 32
    return query_means.new_empty((B, H, N, W), dtype=torch.int32)


def _empty_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    B, S, H = query.shape[:3]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(query.shape)
    lse = query.new_empty((B, H, S), dtype=lse_dtype)
    return out, lse


def _empty_gradients(query: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = query.new_empty(query.shape)
    grad_key = query.new_empty(query.shape)
    grad_value = query.new_empty(query.shape)
    return grad_query, grad_key, grad_value


_select_blocks = declare(
    "select_blocks(Tensor query_means, Tensor key_means, float keep_mass, int[] tiles,"
    " int[] window, str ties) -> Tensor",
    reference.select_blocks,
    _empty_selection,
)
_block_sparse_attention = declare(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor selection,"
    " Tensor block_offsets, float scale, float logit_bound) -> (Tensor, Tensor)",
    reference.block_sparse_attention,
    _empty_attention,
)
_block_sparse_attention_backward = declare(
    "block_sparse_attention_backward(Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor selection, Tensor block_offsets, Tensor grad_out, Tensor? grad_lse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    reference.block_sparse_attention_backward,
    _empty_gradients,
)


def select_blocks(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    ties: str = "all",
) -> Tensor:
    """For every block of queries, the fewest blocks of keys that hold a share of its attention.

    The attention of a block of queries to block j of keys is estimated by their means, with the
    logits s = query_means key_means^T / sqrt(D). The mass of block j is the integer
    m_j = round(2^32 exp(s_j - max s)). In ascending order of mass, blocks are dropped while their
    sum, the block itself included, stays below (1 - keep_mass) * sum(m). Sums of integers are
    exact, so no order of summation changes the choice. The heaviest block is always kept, and a
    row without a finite maximum keeps every block.

    Args:
        query_means, key_means: [B, H, N, D] of one float dtype, last dimension contiguous, as
            `norm_rope_means` gives them in fp32.
        keep_mass: the share to hold, in (0, 1]: P in the paper.
        tiles: the grid of blocks (T, Y, X) with N = T * Y * X.
        window: full widths (wT, wY, wX) of a local window that is kept besides: the blocks with
            |dt| <= wT // 2, |dy| <= wY // 2 and |dx| <= wX // 2. Given with tiles, or neither.
        ties: what becomes of blocks as heavy as the lightest kept one. "all" keeps them; "stable"
            drops those of lowest index first, as a stable sort would.

    Returns:
        The packed selection, int32 [B, H, N, W]. It has no gradient.

    Raises:
        ValueError: on other shapes, strides or values.
        TypeError: on other dtypes.
    """
    checks.tiles_and_window(tiles, window)
    tiles = list(tiles or ())
    window = list(window or ())
    with torch.no_grad():
        return _select_blocks(query_means, key_means, keep_mass, tiles, window, ties)


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

    Args:
        query, key, value: [B, S, H, D] of one dtype, last dimension contiguous.
        selection: packed, int32 [B, H, N, W].
        block_offsets: int32 [N + 1], ascending from 0 to S in blocks of 1 to 64 tokens.
        scale: of the logits; 1 / sqrt(D) by default.
        return_lse: whether to return the log-sum-exp too.
        logit_bound: a number that no |scale * query . key| exceeds, where one is known, as behind
            `norm_rope` with known weights. A kernel may take it for the maximum of every row in
            place of searching for one. A false bound can overflow or lose a row.

    Returns:
        out [B, S, H, D] in query's dtype, contiguous. With return_lse also the natural log-sum-exp
        of the kept logits, [B, H, S] in fp32, or in fp64 for fp64 inputs. A block of queries that
        keeps nothing gets zeros, and -inf.

    Raises:
        ValueError: on other shapes, strides, scales and bounds; and on other offsets, whose values
            kernels on a GPU do not look at.
        TypeError: on other dtypes.
    """
    if scale is None:
        checks.dimensions("query", query, "B, S, H, D")
        scale = 1.0 / math.sqrt(query.shape[-1] or 1)
    out, lse = _block_sparse_attention(
        query, key, value, selection, block_offsets, scale, logit_bound
    )
    return (out, lse) if return_lse else out


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
    constants = (None,) * 4  # selection, offsets, scale and bound
    return (*gradients, *constants)


differentiate("block_sparse_attention", _keep_attention, _attention_gradients)
