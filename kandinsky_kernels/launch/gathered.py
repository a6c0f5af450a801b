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
from ..selections import transpose_selection, unpack_selection

ELEMENTS = 1 << 26  # of what is gathered and multiplied at once: 256 MiB of fp32


@dataclass(frozen=True)
class Blocks:
    """Where the tokens of each block are: token [N, 64], whether there is one [N, 64], and the
    place of each of the S tokens among the N * 64."""

    token: Tensor
    inside: Tensor
    place: Tensor

    @classmethod
    def of(cls, block_offsets: Tensor, S: int) -> Blocks:
        starts, lengths = block_offsets[:-1].long(), block_offsets.diff().long()
        position = torch.arange(tuning.TOKENS, device=starts.device)
        block = torch.repeat_interleave(lengths, output_size=S)
        place = block * tuning.TOKENS + torch.arange(S, device=starts.device) - starts[block]
        token = (starts[:, None] + position).clamp(max=max(0, S - 1))
        return cls(token, position < lengths[:, None], place)

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """Pieces [R, 64, ...] of all blocks -> [S, ...]."""
        return torch.cat(pieces).flatten(0, 1)[self.place]


def kept(selection: Tensor, blocks: Blocks, D: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of a packed selection [N, W] at a time: which they are, the tokens that they keep
    [R, M], and which of those there are [R, M]."""
    N = selection.shape[0]
    keep = unpack_selection(selection, N)  # [N, N]
    counts = keep.sum(-1)
    most = max(1, int(counts.max()))
    lists = torch.argsort(~keep, dim=-1, stable=True)[:, :most]  # [N, K]
    listed = torch.arange(most, device=keep.device) < counts[:, None]
    rows = max(1, ELEMENTS // (most * tuning.TOKENS * (2 * tuning.TOKENS + 2 * D)))
    for first in range(0, N, rows):
        piece = slice(first, first + rows)
        there = blocks.inside[lists[piece]] & listed[piece, :, None]  # [R, K, 64]
        yield piece, blocks.token[lists[piece]].flatten(1), there.flatten(1)


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
            outs, sums = [], []
            for rows, tokens, there in kept(selection[batch, head], blocks, D):
                logits = q[blocks.token[rows]].float() @ k[tokens].float().mT  # [R, 64, M]
                logits = (logits * scale).masked_fill_(~there[:, None], -math.inf)
                sums.append(logits.logsumexp(-1))  # [R, 64]
                # a row that keeps nothing: exp(-inf - 0) is zero, where -inf + inf would be NaN
                least = sums[-1].nan_to_num(neginf=0.0, posinf=math.inf)
                share = logits.sub_(least[..., None]).exp_()
                outs.append((share @ v[tokens].float()).to(query.dtype))  # [R, 64, D]
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

    Those of keys and values are summed up over the blocks of queries that keep them, so that no
    order of additions is left to chance.
    """
    B, S, H, D = query.shape
    blocks = Blocks.of(block_offsets, S)
    transposed = transpose_selection(selection)
    gradients = [query.new_empty(B, S, H, D) for _ in range(3)]
    for batch in range(B):
        for head in range(H):
            q, k, v, g = (x[batch, :, head] for x in (query, key, value, grad_out))  # [S, D]
            common = (out[batch, :, head].float() * g.float()).sum(-1)  # [S]
            if grad_lse is not None:
                common = common - grad_lse[batch, head]
            pieces: list[list[Tensor]] = [[], [], []]
            for rows, tokens, there in kept(selection[batch, head], blocks, D):
                own = blocks.token[rows]  # queries [R, 64]; tokens are keys
                keys, values = k[tokens].float(), v[tokens].float()  # [R, M, D]
                share = q[own].float() @ keys.mT * scale - lse[batch, head, own, None]
                share = share.masked_fill_(~there[:, None], -math.inf).exp_()  # [R, 64, M]
                change = share * (g[own].float() @ values.mT - common[own, None])
                pieces[0].append((change @ keys * scale).to(query.dtype))
            for rows, tokens, there in kept(transposed[batch, head], blocks, D):
                own = blocks.token[rows]  # keys [R, 64]; tokens are queries
                queries, grads = q[tokens].float(), g[tokens].float()  # [R, M, D]
                share = k[own].float() @ queries.mT * scale - lse[batch, head, tokens][:, None]
                share = share.masked_fill_(~there[:, None], -math.inf).exp_()  # [R, 64, M]
                change = share * (v[own].float() @ grads.mT - common[tokens][:, None])
                pieces[1].append((change @ queries * scale).to(query.dtype))
                pieces[2].append((share @ grads).to(query.dtype))
            for gradient, parts in zip(gradients, pieces, strict=True):
                gradient[batch, :, head] = blocks.joined(parts)
    return gradients[0], gradients[1], gradients[2]
