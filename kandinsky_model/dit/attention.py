# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with normalised queries and keys: of a text over itself, of a video over
itself (densely, or over the blocks that NABLA chooses), and of a video over a text.

The letters of the shapes are explained in the package's docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import Rotary, norm_rope, norm_rope_means

from . import nabla
from .layout import Layout
from .linear import ALL, Linear


class HeadNorm(nn.Module):
    """RMSNorm of each head of [B, S, H, D] with one weight [D] for all heads, then rotation where
    angles are given."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        return norm_rope(x, self.weight, rotary)

    def with_means(
        self,
        x: Tensor,
        rotary: Rotary,
        block_offsets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the mean of the result over each block of tokens: [B, H, N, D]."""
        return norm_rope_means(
            x,
            self.weight,
            rotary,
            block_offsets,
        )


@dataclass(frozen=True, eq=False)
class LogitBound:
    """What no |query . key| / sqrt(D) exceeds after norms with these weights and a rotation.

    RMSNorm makes a query sqrt(D) u * w, with w the weight and |u| <= 1; so for a key. A rotation
    turns each pair of adjacent channels in its plane and mixes it with no other pair. Therefore
    query . key is at most the sum over pairs of |query pair| |key pair|, where |query pair| is at
    most sqrt(D) |u pair| times the larger weight of the pair. By Cauchy-Schwarz this sum is at most

        D * max over pairs of (larger weight of the query's) * (larger weight of the key's).

    The value has 1 % more, for rounding to 16 bits.
    """

    value: float
    weights: tuple[Tensor, Tensor]  # of the norms of queries and keys, [D]
    versions: tuple[int, int]  # how often each had been written to

    @classmethod
    def of(cls, query_norm: HeadNorm, key_norm: HeadNorm) -> LogitBound | None:
        """The bound of two norms as they are now.

        None where the weights are not finite or have no values, or where PyTorch does not count
        how often they are written to, because they were made in inference mode.
        """
        weights = (query_norm.weight, key_norm.weight)
        if any(weight.is_meta or weight.is_inference() for weight in weights):
            return None
        query, key = (weight.detach().cpu().double().abs() for weight in weights)  # [D]
        pairs = query.view(-1, 2).amax(-1) * key.view(-1, 2).amax(-1)  # [D / 2]
        value = 1.01 * math.sqrt(len(query)) * pairs.max().item()
        if not math.isfinite(value):
            return None
        return cls(value, weights, _versions(weights))

    def holds(self, query_norm: HeadNorm, key_norm: HeadNorm) -> bool:
        """Whether both weights still are what they were.

        Moving a weight to other memory through `.data`, as offloading does, keeps the bound. So
        would, unseen, a change of its values through `.data`, which PyTorch does not count.
        """
        query, key = self.weights
        if query is not query_norm.weight or key is not key_norm.weight:
            return False
        return self.versions == _versions(self.weights)

    def __reduce__(self) -> tuple:
        """Copies of the weights count their writes anew: a copied bound holds for none."""
        return LogitBound, (self.value, self.weights, (-1, -1))


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """How often PyTorch has seen each tensor written to."""
    first, second = tensors
    return first._version, second._version


@dataclass(frozen=True, eq=False)
class TextKeys:
    """What cross-attention reads of a text: keys, values, and which of them are not padding."""

    key: Tensor  # [B, L, H, D], normalised
    value: Tensor  # [B, L, H, D]
    mask: Tensor | None  # bool [B, 1, 1, L], True is visible; None: all are


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys.

    A text over itself is `forward`. A video over itself is `attend`, after which the caller applies
    `out_layer`. A video over a text is `read`, once for all tokens, then `look_up`.
    """

    # One layer for all three projections, whose tensors are views of its own. It is in a tuple to
    # hide it from nn.Module, which would list its weights a second time.
    _joint: tuple[Linear, ...]
    _bound: LogitBound | None

    def __init__(self, model_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_query = Linear(model_dim, model_dim)
        self.to_key = Linear(model_dim, model_dim)
        self.to_value = Linear(model_dim, model_dim)
        self.query_norm = HeadNorm(head_dim)
        self.key_norm = HeadNorm(head_dim)
        self.out_layer = Linear(model_dim, model_dim)
        # Called with what NABLA chose, see `Nabla.watch`.
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self.forget()

    # Inference: one product for three projections, and a bound of the logits

    def prepare(self) -> None:
        """Join the three projections into one product and bound the logits, for inference. Loading
        weights and training undo it."""
        self._joint = _join(self._projections())
        self._bound = LogitBound.of(self.query_norm, self.key_norm)

    @property
    def logit_bound(self) -> float:
        """What no |query . key| / sqrt(D) of self-attention exceeds; infinity where no bound is
        known. It is worked out again where a norm's weight has been written to or replaced."""
        if self._bound is None:
            return math.inf
        # The compiler cannot read version counters.
        if torch.compiler.is_compiling():
            return self._bound.value
        if not self._bound.holds(self.query_norm, self.key_norm):
            self._bound = LogitBound.of(self.query_norm, self.key_norm)
        return math.inf if self._bound is None else self._bound.value

    def forget(self) -> None:
        """Undo `prepare`."""
        self._joint = ()
        self._bound = None

    def _projections(self) -> tuple[Linear, Linear, Linear]:
        return self.to_query, self.to_key, self.to_value

    def _is_joint(self) -> bool:
        """Whether the projections still are the layers that were joined, with no adapter and no
        gradient: another layer or another weight may have come in their place."""
        layers = self._projections()
        if not self._joint:
            return False
        joint = self._joint[0]
        if any(type(layer) is not type(joint) or layer.additions is not None for layer in layers):
            return False
        if torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in layers):
            return False
        if torch.compiler.is_compiling():  # the compiler cannot read addresses
            return True
        parts = joint.weight.chunk(3)
        return all(
            layer.weight.data_ptr() == part.data_ptr()
            for layer, part in zip(layers, parts, strict=True)
        )

    def _apply(self, fn, recurse: bool = True) -> Attention:
        prepared = bool(self._joint) or self._bound is not None
        self.forget()  # the joint weight would keep its parts' former memory
        super()._apply(fn, recurse)
        if prepared:
            self.prepare()  # the weights have another place or dtype now
        return self

    def _load_from_state_dict(self, *args) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> Attention:
        if mode:
            self.forget()
        return super().train(mode)

    # A text over itself

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        key_mask: Tensor | None = None,
        rope_cast: torch.dtype | None = None,
    ) -> Tensor:
        """Dense attention of x [B, S, C] over itself. key_mask: bool [B, 1, 1, S], True is visible;
        rope_cast: see `Nabla`."""
        query, key, value = self.project(x)  # [B, S, H, D] each
        query = nabla.round_to(self.query_norm(query, rotary), rope_cast)
        key = nabla.round_to(self.key_norm(key, rotary), rope_cast)
        return self.out_layer(_dense(query, key, value, key_mask))  # [B, S, C]

    def project(self, x: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, S, C], each [B, S, H, D]: of all heads, or of those
        whose channels are `rows`."""
        if rows == ALL and self._is_joint():
            heads = self._joint[0](x).unflatten(-1, (3, -1, self.head_dim))  # [B, S, 3, H, D]
            query, key, value = heads.unbind(2)
            return query, key, value
        return (
            self._heads(self.to_query(x, rows)),
            self._heads(self.to_key(x, rows)),
            self._heads(self.to_value(x, rows)),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, S, H, D]

    # A video over itself

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention [B, S, C] of x [B, S, C] over itself, for `out_layer`.

        The layout says whether it is dense or NABLA's, and how many heads are done at a time. Where
        several ranks share the heads, x and the result have this rank's tokens.
        """
        if layout.ranks is not None and layout.ranks.team is not None:
            return layout.ranks.to_tokens(self._attend(x, ALL, layout))
        if layout.chunks.heads is None:
            return self._attend(x, ALL, layout)
        out = torch.empty_like(x)
        width = layout.chunks.heads * self.head_dim
        for start in range(0, x.shape[-1], width):
            rows = slice(start, start + width)
            out[..., rows] = self._attend(x, rows, layout)
        return out

    def _attend(
        self,
        x: Tensor,
        rows: slice,
        layout: Layout,
    ) -> Tensor:
        """Attention of the heads whose channels are `rows`; where ranks share the heads, of this
        rank's heads over the tokens of all.

        Each tensor goes as soon as it has served: there is room for four of the group's beside x
        at most, and for six of all heads.
        """

        def project() -> tuple[Tensor, Tensor, Tensor]:
            heads = self.project(x, rows)  # [B, S, H, D] each
            if layout.ranks is None or layout.ranks.team is None:
                return heads
            shared = layout.ranks.to_heads(torch.stack(heads), layout.grid.tokens)
            query, key, value = shared.unbind(0)
            return query, key, value

        if layout.nabla is None or layout.block_offsets is None:
            query, key, value = project()
            query = nabla.round_to(self.query_norm(query, layout.rotary), layout.rope_cast)
            key = nabla.round_to(self.key_norm(key, layout.rotary), layout.rope_cast)
            return _dense(query, key, value)
        recipe = nabla.Nabla(
            layout.rotary,
            layout.block_offsets,
            layout.grid.tiles,
            layout.nabla.keep_mass,
            layout.nabla.window,
            layout.rope_cast,
            self.logit_bound,
            self.watch,
        )
        out = nabla.attend(project, self.query_norm.with_means, self.key_norm.with_means, recipe)
        return out.flatten(-2)  # [B, S, H D]

    # A video over a text

    def read(self, text: Tensor, mask: Tensor | None) -> TextKeys:
        """Keys and values of a text [B, L, C]. mask: bool [B, 1, 1, L], see `TextKeys`."""
        key = self.key_norm(self._heads(self.to_key(text)))  # [B, L, H, D]
        value = self._heads(self.to_value(text))  # [B, L, H, D]
        return TextKeys(key, value, mask)

    def look_up(self, x: Tensor, text: TextKeys) -> Tensor:
        """Dense attention [B, S, C] of x [B, S, C] over a text."""
        query = self.query_norm(self._heads(self.to_query(x)))  # [B, S, H, D]
        return self.out_layer(_dense(query, text.key, text.value, text.mask))  # [B, S, C]


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of queries [B, S, H, D] over keys and values [B, L, H, D]: [B, S, H D]."""
    query = query.transpose(1, 2)  # [B, H, S, D]
    key = key.transpose(1, 2)  # [B, H, L, D]
    value = value.transpose(1, 2)  # [B, H, L, D]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
    return out.transpose(1, 2).flatten(-2)  # [B, S, H D]


def _join(layers: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """One layer that has the outputs of all `layers`, or () where they are not alike.

    The layers' tensors become views of the joint layer's, so that names, values and memory stay
    what they were. A row of a weight is one output, so scales of rows join as weights do.
    """
    states = [layer.state_dict() for layer in layers]
    forms = {
        (type(layer), *((x.dtype, x.device) for x in state.values()))
        for layer, state in zip(layers, states, strict=True)
    }
    if len(forms) > 1 or not isinstance(layers[0], Linear) or layers[0].weight.is_meta:
        return ()
    joint = layers[0].empty(sum(layer.out_features for layer in layers))
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    joint.load_state_dict(joined, assign=True)
    for name, tensor in joint.state_dict().items():
        for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
            getattr(layer, name).data = part
    return (joint.requires_grad_(False),)
