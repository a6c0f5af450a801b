# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention by PyTorch's own operators, for cards whose Triton kernel is refused or
has failed.

The reference takes one block of queries of one head at a time, 41,000 in a layer of Lite 10 s. Here
the kept keys of many blocks are gathered and multiplied at once, in fp32. Sums have a fixed order.

Sizes: B batch, S tokens, H heads, D head dim, N blocks, R blocks at once, K kept blocks of the row
that keeps most, M = 64 K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tuning
from ..selections import transpose_selection, unpacked

# fp32 numbers that are gathered and multiplied at once: 256 MiB
ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Blocks:
    """Where the tokens of ragged blocks are, once each block is padded to 64 tokens.

    `token` [N, 64] is the index of every token in the sequence, `inside` [N, 64] whether the block
    has that many tokens, and `place` [S] where each token of the sequence is among the N * 64.
    """

    token: Tensor
    inside: Tensor
    place: Tensor

    @classmethod
    def of(cls, block_offsets: Tensor, S: int) -> Blocks:
        """The blocks between consecutive offsets [N + 1] of a sequence of S tokens."""
        device = block_offsets.device
        starts = block_offsets[:-1].long()
        lengths = block_offsets.diff().long()
        position = torch.arange(tuning.TOKENS, device=device)
        inside = position < lengths[:, None]  # [N, 64]
        block = torch.repeat_interleave(lengths, output_size=S)  # [S]
        position_in_block = torch.arange(S, device=device) - starts[block]
        place = block * tuning.TOKENS + position_in_block
        token = starts[:, None] + position  # [N, 64]
        token = token.clamp(max=max(0, S - 1))
        return cls(token, inside, place)

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """Pieces [R, 64, ...] that together hold all N blocks -> [S, ...]."""
        padded = torch.cat(pieces).flatten(0, 1)  # [N * 64, ...]
        return padded[self.place]


def kept(selection: Tensor, blocks: Blocks, D: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Goes through a packed selection [N, W], R rows at a time: yields which rows, the tokens that
    they keep [R, M], and whether each of those is one, or fills its row up [R, M].

    R is as large as `ELEMENTS` allows: a kept token takes two rows of logits, its key and value.
    """
    N = selection.shape[0]
    keep = unpacked(selection, N)  # [N, N]
    counts = keep.sum(-1)
    most = max(1, int(counts.max()))
    lists = torch.argsort(~keep, dim=-1, stable=True)  # [N, N], kept blocks first
    lists = lists[:, :most]  # [N, K]
    listed = torch.arange(most, device=keep.device) < counts[:, None]
    per_token = 2 * tuning.TOKENS + 2 * D
    per_row = most * tuning.TOKENS * per_token
    rows = max(1, ELEMENTS // per_row)
    for first in range(0, N, rows):
        piece = slice(first, first + rows)
        kept_blocks = lists[piece]  # [R, K]
        tokens = blocks.token[kept_blocks]  # [R, K, 64]
        inside = blocks.inside[kept_blocks]
        there = inside & listed[piece, :, None]
        yield piece, tokens.flatten(1), there.flatten(1)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] and the natural log-sum-exp fp32 [B, H, S], as the reference has them."""
    B, S, H, D = query.shape
    blocks = Blocks.of(block_offsets, S)
    out = query.new_empty(B, S, H, D)
    lse = query.new_empty((B, H, S), dtype=torch.float32)
    for batch in range(B):
        for head in range(H):
            q, k, v = (x[batch, :, head] for x in (query, key, value))  # [S, D]
            outs = []
            sums = []
            for rows, tokens, there in kept(selection[batch, head], blocks, D):
                queries = q[blocks.token[rows]].float()  # [R, 64, D]
                keys = k[tokens].float()  # [R, M, D]
                logits = queries @ keys.mT * scale  # [R, 64, M]
                logits.masked_fill_(~there[:, None], -math.inf)
                piece_lse = logits.logsumexp(-1)  # [R, 64]
                sums.append(piece_lse)
                # a row that keeps nothing: exp(-inf - 0) is zero, where -inf + inf would be NaN
                finite = piece_lse.nan_to_num(neginf=0.0, posinf=math.inf)
                share = logits.sub_(finite[..., None]).exp_()
                values = v[tokens].float()  # [R, M, D]
                piece_out = share @ values  # [R, 64, D]
                outs.append(piece_out.to(query.dtype))
            out[batch, :, head] = blocks.joined(outs)
            lse[batch, head] = blocks.joined(sums)
    return out, lse


def block_sparse_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value [B, S, H, D] (arXiv 2205.14135, appendix B.2).

    The gradients of keys and values are summed up over the blocks of queries that keep them, which
    the transposed selection lists, so that no order of additions is left to chance.
    """
    B, S, H, D = query.shape
    blocks = Blocks.of(block_offsets, S)
    transposed = transpose_selection(selection)
    gradients = [query.new_empty(B, S, H, D) for _ in range(3)]
    for batch in range(B):
        for head in range(H):
            q, k, v, g = (x[batch, :, head] for x in (query, key, value, grad_out))  # [S, D]
            weighted = out[batch, :, head].float() * g.float()  # [S, D]
            common = weighted.sum(-1)  # [S]
            if grad_lse is not None:
                common = common - grad_lse[batch, head]
            pieces: list[list[Tensor]] = [[], [], []]
            for rows, tokens, there in kept(selection[batch, head], blocks, D):
                own = blocks.token[rows]  # queries [R, 64]; tokens are keys
                keys = k[tokens].float()  # [R, M, D]
                values = v[tokens].float()
                queries = q[own].float()  # [R, 64, D]
                grads = g[own].float()
                logits = queries @ keys.mT * scale  # [R, 64, M]
                share = logits.sub_(lse[batch, head, own, None])
                share = share.masked_fill_(~there[:, None], -math.inf).exp_()
                grad_share = grads @ values.mT  # [R, 64, M]
                grad_logits = grad_share.sub_(common[own, None]).mul_(share)
                grad_queries = grad_logits @ keys * scale  # [R, 64, D]
                pieces[0].append(grad_queries.to(query.dtype))
            for rows, tokens, there in kept(transposed[batch, head], blocks, D):
                own = blocks.token[rows]  # keys [R, 64]; tokens are queries
                queries = q[tokens].float()  # [R, M, D]
                grads = g[tokens].float()
                keys = k[own].float()  # [R, 64, D]
                values = v[own].float()
                logits = keys @ queries.mT * scale  # [R, 64, M]
                share = logits.sub_(lse[batch, head, tokens][:, None])
                share = share.masked_fill_(~there[:, None], -math.inf).exp_()
                grad_share = values @ grads.mT  # [R, 64, M]
                grad_logits = grad_share.sub_(common[tokens][:, None]).mul_(share)
                grad_keys = grad_logits @ queries * scale  # [R, 64, D]
                grad_values = share @ grads
                pieces[1].append(grad_keys.to(query.dtype))
                pieces[2].append(grad_values.to(query.dtype))
            for gradient, parts in zip(gradients, pieces, strict=True):
                gradient[batch, :, head] = blocks.joined(parts)
    return gradients[0], gradients[1], gradients[2]
