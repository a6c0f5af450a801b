# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with normalised queries and keys: over all tokens, over the blocks that
NABLA chooses, over a text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import (
    Rotary,
    block_means,
    block_sparse_attention,
    norm_rope,
    norm_rope_means,
    select_blocks,
)

from .layout import Layout
from .linear import ALL, Linear


class HeadNorm(nn.Module):
    """RMSNorm of each head and, where given, rotation; with `block_offsets` also the mean of each
    block."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        return norm_rope(x, self.weight, rotary)

    def with_means(self, x: Tensor, rotary: Rotary, block_offsets: Tensor) -> tuple[Tensor, Tensor]:
        return norm_rope_means(x, self.weight, rotary, block_offsets)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys: `forward` for a text over itself,
    `attend` for a video over itself or over blocks of itself, `read` and `look_up` for a video over
    a text."""

    def __init__(self, model_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_query = Linear(model_dim, model_dim)
        self.to_key = Linear(model_dim, model_dim)
        self.to_value = Linear(model_dim, model_dim)
        self.query_norm = HeadNorm(head_dim)
        self.key_norm = HeadNorm(head_dim)
        self.out_layer = Linear(model_dim, model_dim)
        # told block means of queries and keys, and NABLA's choice
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.forget()

    def forget(self) -> None:
        """Undo `prepare`."""
        # one layer for all three projections, hidden from nn.Module: its tensors are theirs
        self._joint: tuple[Linear, ...] = ()
        self.logit_bound = math.inf

    def prepare(self) -> None:
        """For inference: one product gives queries, keys and values, and the logits get a bound.
        Loading and training undo it.

        RMSNorm makes |query| <= sqrt(D) max|weight|, rotation keeps it; 1 % is for rounding to 16
        bits.
        """
        self._joint = _join(self._projections())
        largest = (
            self.query_norm.weight.detach().abs().max() * self.key_norm.weight.detach().abs().max()
        )
        self.logit_bound = 1.01 * math.sqrt(self.head_dim) * largest.item()

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.to_query, self.to_key, self.to_value

    def _is_joint(self) -> bool:
        """Whether the projections still are what was joined: adapters and quantisers put others in
        their place."""
        layers = self._projections()
        if not self._joint or any(
            type(layer) is not type(self._joint[0]) or layer.additions is not None
            for layer in layers
        ):
            return False
        if torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in layers):
            return False
        return torch.compiler.is_compiling() or all(  # under the compiler an address cannot be read
            layer.weight.data_ptr() == part.data_ptr()
            for layer, part in zip(layers, self._joint[0].weight.chunk(3), strict=True)
        )

    def _apply(self, fn, recurse: bool = True) -> Attention:
        joint, self._joint = self._joint, ()
        super()._apply(fn, recurse)
        if joint:  # in its new place or dtype
            self.prepare()
        return self

    def _load_from_state_dict(self, *args) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> Attention:
        if mode:
            self.forget()
        return super().train(mode)

    def project(
        self, x: Tensor, context: Tensor, rows: slice = ALL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x and keys and values of `context`, each [B, S, H, D], of all heads or of
        those whose channels are `rows`."""
        heads = (-1, self.head_dim)
        if x is context and rows == ALL and self._is_joint():
            return self._joint[0](x).unflatten(-1, (3, *heads)).unbind(2)
        return (
            self.to_query(x, rows).unflatten(-1, heads),
            self.to_key(context, rows).unflatten(-1, heads),
            self.to_value(context, rows).unflatten(-1, heads),
        )

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        rope_cast: torch.dtype | None = None,
    ) -> Tensor:
        """Dense attention of x [B, S, C] over itself. key_mask: bool [B, 1, 1, S], True is
        visible."""
        query, key, value = self.project(x, x)
        query, key = (
            _round(self.query_norm(query, rotary), rope_cast),
            _round(self.key_norm(key, rotary), rope_cast),
        )
        return self.out_layer(_dense(query, key, value, key_mask))  # [B, S, C]

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, H, D] of a text [B, L, C], for `look_up`."""
        heads = (-1, self.head_dim)
        return self.key_norm(self.to_key(text).unflatten(-1, heads)), self.to_value(text).unflatten(
            -1, heads
        )

    def look_up(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], key_mask: Tensor | None
    ) -> Tensor:
        """Dense attention of x [B, S, C] over a text. key_mask: bool [B, 1, 1, L], True is
        visible."""
        query = self.query_norm(self.to_query(x).unflatten(-1, (-1, self.head_dim)))
        return self.out_layer(_dense(query, *keys_values, key_mask))

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention of x [B, S, C] over itself as the layout says, some heads at a time where it says
        so: [B, S, C] for `out_layer`."""
        team = layout.ranks is not None and layout.ranks.team is not None
        if team or layout.chunks.heads is None:
            out = self._attend(x, ALL, layout)
            return layout.ranks.to_tokens(out) if team else out
        out, width = torch.empty_like(x), layout.chunks.heads * self.head_dim
        for start in range(0, x.shape[-1], width):
            rows = slice(start, start + width)
            out[..., rows] = self._attend(x, rows, layout)
        return out

    def _attend(self, x: Tensor, rows: slice, layout: Layout) -> Tensor:
        """Each tensor goes as soon as it has served: there is room for four of the group's beside x
        at most, and six of all heads.

        Where ranks share the heads, x has this rank's tokens, and the result all tokens of its
        heads.
        """
        query, key, value = self.project(x, x, rows)
        if layout.ranks is not None and layout.ranks.team:
            query, key, value = layout.ranks.to_heads(
                torch.stack((query, key, value)), layout.grid.tokens
            ).unbind(0)
        if layout.nabla is None:
            query = _round(self.query_norm(query, layout.rotary), layout.rope_cast)
            key = _round(self.key_norm(key, layout.rotary), layout.rope_cast)
            return _dense(query, key, value)
        query, query_means = self.query_norm.with_means(query, layout.rotary, layout.block_offsets)
        key, key_means = self.key_norm.with_means(key, layout.rotary, layout.block_offsets)
        if layout.rope_cast is not None:
            query, key = _round(query, layout.rope_cast), _round(key, layout.rope_cast)
            query_means, key_means = (
                block_means(query, layout.block_offsets),
                block_means(key, layout.block_offsets),
            )
        selection = select_blocks(
            query_means.detach(),
            key_means.detach(),
            layout.nabla.keep_mass,
            layout.grid.tiles,
            layout.nabla.window,
        )
        if self.watch is not None:
            self.watch(query_means, key_means, selection)
        return block_sparse_attention(
            query, key, value, selection, layout.block_offsets, logit_bound=self.logit_bound
        ).flatten(-2)


def _dense(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Of queries [B, S, H, D] over keys and values [B, L, H, D]: [B, S, H D]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, S, D]
    return (
        F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        .transpose(1, 2)
        .flatten(-2)
    )


def _round(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _join(layers: tuple[nn.Module, ...]) -> tuple[Linear, ...]:
    """One layer with the outputs of all, or () where they are not alike.

    Their tensors become views of its own, so names, values and memory stay. Rows are outputs, so
    scales of rows join as weights do.
    """
    states = [layer.state_dict() for layer in layers]
    forms = {
        (type(layer), *((x.dtype, x.device) for x in state.values()))
        for layer, state in zip(layers, states, strict=True)
    }
    if len(forms) > 1 or not isinstance(layers[0], Linear) or layers[0].weight.is_meta:
        return ()
    joint = layers[0].empty(sum(layer.out_features for layer in layers))
    joint.load_state_dict(
        {name: torch.cat([state[name] for state in states]) for name in states[0]}, assign=True
    )
    for name, tensor in joint.state_dict().items():
        for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
            getattr(layer, name).data = part
    return (joint.requires_grad_(False),)
