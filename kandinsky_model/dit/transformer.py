# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer of Kandinsky 5.0, to be read from top to bottom.

The text goes through a few blocks of its own. The video goes through many, each of which attends to
the video, then to the text, then computes a feed-forward network. The time modulates all of them:
every sub-layer is

    x + gate * f(LayerNorm(x) * (1 + scale) + shift)

with a shift, scale and gate [B, C] that are computed from the time and the pooled text. The sum of
one sub-layer and the norm of the next are one pass over memory, `Triple.add_and_norm`. Visual
blocks therefore hand on two tensors: the residual stream `x`, and `normed`, which is x after the
norm that the next block begins with.

Parameter names and shapes are those of the published checkpoints. Activations have the network's
`dtype`. The time embedding and every modulation are computed in fp32, whatever dtype the weights
are stored in. All of it is differentiable.

Sizes: B samples, S tokens of the video, T x Y x X of them along time, height and width; L tokens of
the text; C channels; V modulation vectors; n points in time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DiTConfig
from . import geometry
from .attention import Attention, TextKeys
from .layout import Layout
from .linear import Linear
from .modulation import (
    TEXT_SUBLAYERS,
    VISUAL_SUBLAYERS,
    Modulation,
    Modulations,
    ModulationTable,
    ShiftScale,
    Triple,
)

_log = logging.getLogger(__name__)


# Embeddings


class TimeEmbedding(nn.Module):
    """Two linear layers on [cos | sin] of time * frequencies."""

    def __init__(self, model_dim: int, time_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, time_dim)
        self.out_layer = Linear(time_dim, time_dim)

    def forward(self, time: Tensor) -> Tensor:
        """[...] of 1000 t, t from 1 (noise) to 0 -> [..., time_dim]."""
        frequencies = geometry.frequencies(self.in_layer.in_features // 2, time.device)
        angles = time[..., None] * frequencies  # [..., C / 2]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # [..., C]
        return self.out_layer(F.silu(self.in_layer(waves)))


class TextEmbedding(nn.Module):
    """A linear layer, then LayerNorm with weights in at least fp32."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, text: Tensor) -> Tensor:
        x = self.in_layer(text)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.norm.weight.to(wide)
        bias = self.norm.bias.to(wide)
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, self.norm.eps).to(x.dtype)


class VisualEmbedding(nn.Module):
    """A linear layer on patches."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.in_layer(patches)


# Blocks


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What every visual block of one pass reads beside the tokens of the video."""

    text: Tensor  # [B, L, C], after the text blocks
    key_mask: Tensor | None  # bool [B, 1, 1, L], True where the text is not padding; None: all
    layout: Layout
    modulations: Modulations


class FeedForward(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, model_dim: int, ff_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, ff_dim, bias=False)
        self.out_layer = Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.in_layer(x)
        if torch.is_grad_enabled() and wide.requires_grad:
            return self.out_layer(F.gelu(wide))
        # The largest activation of the network: it is there once, not twice.
        return self.out_layer(torch.ops.aten.gelu_(wide))


class TextBlock(nn.Module):
    """Self-attention of the text, then a feed-forward network."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 3 * TEXT_SUBLAYERS)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Triple, ...],
        key_mask: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        attention, feed_forward = modulation
        rotary = layout.text_rotary(x.shape[1], self.self_attention.head_dim)
        branch = self.self_attention(attention.norm(x), rotary, key_mask, layout.rope_cast)
        x, normed = attention.add_and_norm(x, branch, feed_forward)
        return feed_forward.add(x, self.feed_forward(normed))


class VisualBlock(nn.Module):
    """Self-attention of the video, cross-attention to the text, then a feed-forward network."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 3 * VISUAL_SUBLAYERS)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.cross_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        modulation: tuple[Triple, ...],
        following: ShiftScale,
        context: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x [B, S, C] and its norm for this block -> the same two for what
        `following` modulates, the next block or the out layer.

        All but self-attention is done for `layout.chunks.tokens` at a time, and the results take
        the places of x and normed: the wide activations of all tokens, 1.3 GB at 10 s, never exist
        together. Where gradients are recorded, all tokens are done at once.
        """
        attended = self.self_attention.attend(normed, context.layout)
        text = self.cross_attention.read(context.text, context.key_mask)
        size = max(1, context.layout.chunks.tokens // x.shape[0])
        if x.shape[1] <= size or _records(self, x, normed, context.text):
            return self.after_attention(x, attended, text, modulation, following)
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            x[:, part], normed[:, part] = self.after_attention(
                x[:, part],
                attended[:, part],
                text,
                modulation,
                following,
            )
        return x, normed

    def after_attention(
        self,
        x: Tensor,
        attended: Tensor,
        text: TextKeys,
        modulation: tuple[Triple, ...],
        following: ShiftScale,
    ) -> tuple[Tensor, Tensor]:
        """What comes after self-attention, which treats every token by itself: the next x, and its
        norm for what `following` modulates.

        attended: [B, S, C], from `Attention.attend`.
        """
        x, normed = self._before_feed_forward(x, attended, text, modulation)
        return modulation[-1].add_and_norm(x, self.feed_forward(normed), following)

    def after_attention_without_norm(
        self,
        x: Tensor,
        attended: Tensor,
        text: TextKeys,
        modulation: tuple[Triple, ...],
    ) -> Tensor:
        """The next x alone, as training needs it."""
        x, normed = self._before_feed_forward(x, attended, text, modulation)
        return modulation[-1].add(x, self.feed_forward(normed))

    def _before_feed_forward(
        self,
        x: Tensor,
        attended: Tensor,
        text: TextKeys,
        modulation: tuple[Triple, ...],
    ) -> tuple[Tensor, Tensor]:
        # Branches have no names, so that each is freed once it is added.
        attention, cross, feed_forward = modulation
        x, normed = attention.add_and_norm(x, self.self_attention.out_layer(attended), cross)
        return cross.add_and_norm(x, self.cross_attention.look_up(normed, text), feed_forward)


def _records(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether autograd would record what `module` computes from `inputs`. The matrices of adapters
    are no parameters of it, but may be trained."""
    if not torch.is_grad_enabled():
        return False
    layers = [layer for layer in module.modules() if isinstance(layer, Linear)]
    additions = [layer.additions for layer in layers if layer.additions is not None]
    added = [tensor for one in additions for pair in one.matrices.values() for tensor in pair]
    return any(tensor.requires_grad for tensor in chain(inputs, module.parameters(), added))


class OutLayer(nn.Module):
    """The last modulation and projection. The norm between them is made by the last visual block,
    together with its sum."""

    def __init__(self, config: DiTConfig, features: int):
        super().__init__()
        self.modulation = Modulation(config.time_dim, config.model_dim, 2)
        self.out_layer = Linear(config.model_dim, features)

    def forward(self, normed: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, features]."""
        return self.out_layer(normed)


# The network


class DiffusionTransformer3D(nn.Module):
    """The velocity (noise minus clean latents) that Kandinsky 5.0 predicts for noisy latents.

    One class for every released architecture; `config` alone decides.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        o, p, q = config.patch_size
        patch = o * p * q
        self.time_embeddings = TimeEmbedding(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbedding(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbedding(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbedding(patch * config.in_channels, config.model_dim)
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(config) for _ in range(config.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(config) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(config, patch * config.out_visual_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the weights, unless training on fp32 weights sets
        `compute_dtype`."""
        return self.compute_dtype or self.visual_embeddings.in_layer.weight.dtype

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        layout: Layout,
        text_lengths: Tensor | None = None,
        modulations: Modulations | None = None,
    ) -> Tensor:
        """Velocity [B, T, 2Y, 2X, out_visual_dim] in the network's dtype.

        x: latents [B, T, 2Y, 2X, in_channels], channels last. text: [B, L, in_text_dim].
        text_lengths: int64 [B], how many rows of each sample are text (None: all); the rest never
        acts as a key, so that a sample's result does not depend on its neighbours. Keep it on the
        CPU to spare the device a synchronisation. pooled: [B, in_text_dim2]. time: fp32 [B],
        1000 t. modulations: those of this time, where `modulate` has made them already. Raises
        ValueError when shapes do not fit the layout or each other.
        """
        self._check(
            x,
            text,
            pooled,
            time,
            layout,
            text_lengths,
        )
        if modulations is None:
            modulations = self.modulate(time[None], pooled).step(0)
        x, context = self.begin(
            x,
            text,
            layout,
            text_lengths,
            modulations,
        )  # [B, S, C]
        _, normed = self.blocks(
            x,
            None,
            context,
            range(len(self.visual_transformer_blocks)),
        )
        return self.finish(normed, layout)

    def modulate(self, time: Tensor, pooled: Tensor) -> ModulationTable:
        """Everything that depends on the time and the pooled text alone, for n points in time.

        time: [n, B], 1000 t. pooled: [B, in_text_dim2]. It is computed where the weights are, which
        are read once instead of n times, for use on the device of `time`.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        home = self.time_embeddings.in_layer.weight.device
        embedded = self.time_embeddings(time.to(home, wide))  # [n, B, time_dim]
        embedded = embedded + self.pooled_text_embeddings(pooled.to(home, self.dtype))
        vectors = torch.cat([layer(embedded) for layer in self._modulations()], -2)  # [n, B, V, C]
        if home.type == "cpu" and time.is_cuda:
            vectors = vectors.pin_memory()
        return ModulationTable(
            vectors,
            len(self.text_transformer_blocks),
            len(self.visual_transformer_blocks),
            time.device,
        )

    def begin(
        self,
        x: Tensor,
        text: Tensor,
        layout: Layout,
        text_lengths: Tensor | None,
        modulations: Modulations,
    ) -> tuple[Tensor, BlockContext]:
        """What comes before the visual blocks: the embedded tokens [B, S, C] in the layout's order
        (where ranks share the video, this rank's), and what the blocks read beside them."""
        text, key_mask = _trim(text.to(self.dtype), text_lengths)
        text = self.text_embeddings(text)  # [B, L, C]
        for block, modulation in zip(self.text_transformer_blocks, modulations.text, strict=True):
            text = block(text, modulation, key_mask, layout)
        patches = geometry.patchify(x.to(self.dtype), self.config.patch_size)  # [B, S, patch * Cin]
        if layout.order is not None:
            patches = patches[:, layout.order]
        if layout.ranks is not None:
            patches = layout.ranks.own(patches)
        tokens = self.visual_embeddings(patches)  # [B, S, C]
        return tokens, BlockContext(text, key_mask, layout, modulations)

    def blocks(
        self,
        x: Tensor,
        normed: Tensor | None,
        context: BlockContext,
        span: range,
    ) -> tuple[Tensor, Tensor]:
        """The visual blocks of `span` on x [B, S, C] and its norm for the first of them, which is
        made here where it is None. Returns x and the norm for what comes next.

        Both may be written to.
        """
        modulations = context.modulations
        if normed is None:
            normed = modulations.before(span.start).norm(x)
        for i in span:
            block = self.visual_transformer_blocks[i]
            x, normed = block(
                x,
                normed,
                modulations.visual[i],
                modulations.before(i + 1),
                context,
            )
        return x, normed

    def finish(self, normed: Tensor, layout: Layout) -> Tensor:
        """The out layer on the last norm [B, S, C], put back into frames [B, T, 2Y, 2X, Cout]."""
        out = self.out_layer(normed)  # [B, S, patch * Cout]
        if layout.ranks is not None:
            out = layout.ranks.gather(out, layout.grid.tokens)
        # The order is undone after the last projection: there are fewer features to move.
        if layout.inverse is not None:
            out = out[:, layout.inverse]
        return geometry.unpatchify(out, layout.grid, self.config.patch_size)

    # Preparation, and parts by name

    def prepare(self) -> DiffusionTransformer3D:
        """Make the network ready for inference, once its weights are loaded: see
        `Attention.prepare`."""
        self.eval()
        for attention in self.attentions:
            attention.prepare()
        bounds = [attention.logit_bound for attention in self.attentions]
        _log.info(
            "the weights of the norms bound the logits of self-attention by %.1f to %.1f",
            min(bounds),
            max(bounds),
        )
        return self

    @property
    def attentions(self) -> list[Attention]:
        """Self-attention of every visual block."""
        return [block.self_attention for block in self._visual_blocks()]

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, which run one after another in every pass, so that their weights can be
        streamed: see `devices.offload`."""
        return [*self.text_transformer_blocks, *self.visual_transformer_blocks]

    @property
    def once(self) -> list[nn.Module]:
        """What runs once per prompt, in `modulate`: an eighth of the weights, which need not be on
        the device for it."""
        return [
            self.time_embeddings,
            self.pooled_text_embeddings,
            *self._modulations(),
        ]

    def _text_blocks(self) -> list[TextBlock]:
        return cast("list[TextBlock]", list(self.text_transformer_blocks))

    def _visual_blocks(self) -> list[VisualBlock]:
        return cast("list[VisualBlock]", list(self.visual_transformer_blocks))

    def _modulations(self) -> list[Modulation]:
        """What makes the vectors of a `ModulationTable`, in its order."""
        text = [block.text_modulation for block in self._text_blocks()]
        visual = [block.visual_modulation for block in self._visual_blocks()]
        return [*text, *visual, self.out_layer.modulation]

    def _check(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        layout: Layout,
        text_lengths: Tensor | None,
    ) -> None:
        config = self.config
        grid = layout.grid
        o, p, q = config.patch_size
        B = x.shape[0]
        L = text.shape[1] if text.dim() == 3 else 0
        wanted = {
            "x": (x, (B, grid.T * o, grid.Y * p, grid.X * q, config.in_channels)),
            "text": (text, (B, L, config.in_text_dim)),
            "pooled": (pooled, (B, config.in_text_dim2)),
            "time": (time, (B,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {list(shape)} for this model, layout and batch, "
                    f"got {list(tensor.shape)}; make the layout for the size of the latents and "
                    "give every input the same batch"
                )
        if text_lengths is not None and text_lengths.shape != (B,):
            raise ValueError(
                f"text_lengths must have shape {[B]}, got {list(text_lengths.shape)}; "
                "give one length per sample"
            )


def _trim(text: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, in_text_dim] cut to its longest sample, and the key mask [B, 1, 1, L] that
    shorter samples need, where there are any."""
    if lengths is None:
        return text, None
    shortest = int(lengths.min())
    longest = int(lengths.max())
    if shortest < 1 or longest > text.shape[1]:
        raise ValueError(
            f"text_lengths must lie in 1..{text.shape[1]}, got {shortest}..{longest}; "
            "an empty prompt still has a token"
        )
    text = text[:, :longest]
    if shortest == longest:
        return text, None
    mask = torch.arange(longest, device=text.device) < lengths.to(text.device)[:, None]  # [B, L]
    # Padding becomes zero, because a masked NaN would still be multiplied by a weight of 0.
    return text.masked_fill(~mask[..., None], 0.0), mask[:, None, None]
