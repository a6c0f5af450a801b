# SPDX-License-Identifier: Apache-2.0
"""The peers: every operator as the official code writes it, in plain PyTorch.

A peer computes in the working dtype and does not use our references, so that its error is an honest
measure of what the dtype allows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_model.dit.geometry import local_window


def modulated_norm_peer(x, scale, shift):
    return (
        F.layer_norm(x.float(), x.shape[-1:], eps=1e-5) * (scale[:, None] + 1.0) + shift[:, None]
    ).to(x.dtype)


def gated_add_norm_peer(x, branch, gate, scale=None, shift=None):
    y = (x + gate[:, None] * branch.float()).to(x.dtype)
    return y if scale is None else (y, modulated_norm_peer(y, scale, shift))


def norm_rope_per_token(x, weight, cos=None, sin=None):
    """With a row of angles for each token, as the official code has them."""
    normed = F.rms_norm(
        x.float(),
        x.shape[-1:],
        weight,
        eps=ops.norm.RMS_NORM_EPS,
    ).type_as(x)
    if cos is None:
        return normed
    entries = torch.stack((cos, -sin, sin, cos), -1)  # [S, D/2, 4]
    rotation = entries.unflatten(-1, (2, 2))[:, None]  # [S, 1, D/2, 2, 2]
    pairs = normed.float().unflatten(-1, (-1, 1, 2))  # [B, S, H, D/2, 1, 2]
    return (rotation * pairs).sum(-1).flatten(-2).type_as(x)


def norm_rope_peer(x, weight, cos=None, sin=None, positions=None, pairs=()):
    if cos is not None:
        columns = torch.repeat_interleave(torch.tensor(pairs))  # the axis of each pair
        rows = positions.long()[:, columns]  # [S, D/2]
        pair = torch.arange(len(columns))
        cos = cos[rows, pair]  # [S, D/2]
        sin = sin[rows, pair]  # [S, D/2]
    return norm_rope_per_token(x, weight, cos, sin)


def norm_rope_means_peer(x, weight, block_offsets, **tables):
    y = norm_rope_peer(x, weight, **tables)
    blocks = y.float().split(block_offsets.diff().tolist(), dim=1)
    return y, torch.stack([block.mean(1) for block in blocks], 2)  # [B, H, N, D]


def select_blocks_peer(query_means, key_means, keep_mass, tiles, window, ties):
    """Sorts the whole map, as upstream does. Ties fall as the sort leaves them."""
    scores = query_means @ key_means.transpose(-1, -2) / math.sqrt(query_means.shape[-1])
    values, order = scores.softmax(-1).sort(-1)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(
        -1, order, values.cumsum(-1) >= 1 - keep_mass
    )
    return ops.pack_selection(kept | local_window(tiles, window) if tiles else kept)


def group_moments_peer(x, groups):
    variance, mean = torch.var_mean(
        x.float().unflatten(-1, (groups, -1)),
        (2, 3, 5),
        correction=0,
    )
    return torch.stack((mean, variance), -1).double()


def group_norm_silu_peer(x, scale, shift, front=None, pad=True, silu=True):
    y = torch.addcmul(
        shift[:, None, None, None],
        x.float(),
        scale[:, None, None, None],
    )
    y = (F.silu(y) if silu else y).to(x.dtype)
    if not pad:
        return y
    y = (
        F.pad(
            y.permute(0, 4, 1, 2, 3),
            (1, 1, 1, 1, 2, 0),
            mode="replicate",
        )
        .permute(0, 2, 3, 4, 1)
        .contiguous()
    )
    return y if front is None else torch.cat((front, y[:, 2:]), 1)


def frame_mask(inputs: dict) -> Tensor:
    """bool [T P, T' P']: query frame t sees key frames up to first_frame + t."""
    (T, P), (frames, keys) = (inputs[name].shape[1:3] for name in ("query", "key"))
    sees = torch.arange(frames) <= inputs.get("first_frame", 0) + torch.arange(T)[:, None]
    return sees.repeat_interleave(P, 0).repeat_interleave(keys, 1)


def frame_causal_attention_peer(query, key, value, first_frame=0, return_lse=False):
    mask = frame_mask({"query": query, "key": key, "first_frame": first_frame})
    q, k, v = (x.flatten(1, 2)[:, None] for x in (query, key, value))  # [B, 1, T P, D]
    out = (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
        .unflatten(1, query.shape[1:3])
        .contiguous()
    )
    if not return_lse:
        return out
    logits = (q.float() @ k.float().mT / math.sqrt(query.shape[-1])).masked_fill(~mask, -math.inf)
    return out, logits.logsumexp(-1)[:, 0].unflatten(1, query.shape[1:3])


def head_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def token_mask(selection: Tensor, offsets: Tensor) -> Tensor:
    """bool [B, H, S, S]."""
    block = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff().long())
    return ops.unpack_selection(selection, len(offsets) - 1)[:, :, block][..., block]


def block_sparse_attention_peer(query, key, value, selection, block_offsets, return_lse=False):
    mask = token_mask(selection, block_offsets)
    out = (
        F.scaled_dot_product_attention(*head_first(query, key, value), attn_mask=mask)
        .transpose(1, 2)
        .contiguous()
    )
    if not return_lse:
        return out
    scores = torch.einsum(
        "bihd,bjhd->bhij",
        query.float(),
        key.float(),
    ) / math.sqrt(query.shape[-1])
    return out, scores.masked_fill(~mask, -math.inf).logsumexp(-1)
