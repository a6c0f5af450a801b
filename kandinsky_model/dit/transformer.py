# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer: text blocks, then visual blocks that read the text by cross-attention.

Every sub-layer is `x + gate * f(modulated_norm(x))`. The residual sum of one sub-layer and the norm
of the next are one fused pass (`gated_add_norm`), so the networks below hand on pairs: the residual
stream `x` and its norm for whoever comes next.

Parameter names and shapes are those of the published checkpoints. Activations have the network's
`dtype`; the time embedding and every modulation are computed in fp32 whatever the weights are
stored in. All of it is differentiable.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import gated_add_norm, modulated_norm

from ..config import DiTConfig
from . import geometry
from .attention import Attention
from .layout import Layout
from .linear import Linear

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Modulations:
    """Shift, scale and gate of every sub-layer at one time: a tuple of [B, C] per block, and last
    the out layer's."""

    text: list[tuple[Tensor, ...]]
    visual: list[tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class ModulationTable:
    """Those of n times: vectors [n, B, V, C], where the weights that made them are; V counts the
    vectors of all blocks.

    They are 0.9 GB for a hundred passes of Pro, of which a pass reads 9 MB: one copy brings these
    to `device`.
    """

    vectors: Tensor
    counts: tuple[list[int], list[int]]  # of text blocks; of visual blocks and the out layer
    device: torch.device

    def step(self, i: int) -> Modulations:
        """Those of the i-th time."""
        vectors = iter(self.vectors[i].to(self.device, non_blocking=True).unbind(1))  # V x [B, C]
        return Modulations(
            *([tuple(islice(vectors, count)) for count in counts] for counts in self.counts)
        )


class TimeEmbedding(nn.Module):
    """Two linear layers on [cos | sin] of time * frequencies; time is 1000 t."""

    def __init__(self, model_dim: int, time_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, time_dim)
        self.out_layer = Linear(time_dim, time_dim)

    def forward(self, time: Tensor) -> Tensor:
        # [..., B, C/2]
        angles = time[..., None] * geometry.frequencies(self.in_layer.in_features // 2, time.device)
        # [..., B, time_dim]
        return self.out_layer(
            F.silu(self.in_layer(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        )


class TextEmbedding(nn.Module):
    """Linear, then LayerNorm with weights, in at least fp32."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, text: Tensor) -> Tensor:
        x = self.in_layer(text)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(
            x.to(wide),
            x.shape[-1:],
            self.norm.weight.to(wide),
            self.norm.bias.to(wide),
            self.norm.eps,
        ).to(x.dtype)


class VisualEmbedding(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.in_layer(patches)


class Modulation(nn.Module):
    """`count` vectors [..., B, C]: shift, scale, gate per sub-layer. Starts at zero: an untrained
    block is the identity."""

    def __init__(self, time_dim: int, model_dim: int, count: int):
        super().__init__()
        self.count = count
        self.out_layer = Linear(time_dim, count * model_dim)
        if not self.out_layer.weight.is_meta:
            nn.init.zeros_(self.out_layer.weight)
            nn.init.zeros_(self.out_layer.bias)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.out_layer(F.silu(time)).chunk(self.count, dim=-1)


class FeedForward(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, model_dim: int, ff_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, ff_dim, bias=False)
        self.out_layer = Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(x)))


class TextBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(
        self, x: Tensor, modulation: tuple[Tensor, ...], key_mask: Tensor | None, layout: Layout
    ) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
        rotary = layout.text_rotary(x.shape[1], self.self_attention.head_dim)
        branch = self.self_attention(
            modulated_norm(x, scale, shift),
            rotary=rotary,
            key_mask=key_mask,
            rope_cast=layout.rope_cast,
        )
        x, normed = gated_add_norm(x, branch, gate, scale_ff, shift_ff)
        return gated_add_norm(x, self.feed_forward(normed), gate_ff)[0]


class VisualBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.cross_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, ...],
        text: Tensor,
        key_mask: Tensor | None,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """x and its first norm -> the next x and the next block's first norm, whose shift and scale
        lead `following`.

        All but self-attention is done for `layout.chunks.tokens` at a time, the results of which take
        the places of x and normed: 1.3 GB of wide activations at 10 s need never exist together.
        Where gradients are recorded, all tokens are done at once.
        """
        attended, keys_values = (
            self.self_attention.attend(normed, layout),
            self.cross_attention.read(text),
        )
        size = max(1, layout.chunks.tokens // x.shape[0])
        if x.shape[1] <= size or _records(self, x, normed, text):
            return self.after_attention(x, attended, keys_values, modulation, following, key_mask)
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            x[:, part], normed[:, part] = self.after_attention(
                x[:, part], attended[:, part], keys_values, modulation, following, key_mask
            )
        return x, normed

    def after_attention(
        self,
        x: Tensor,
        attended: Tensor,
        keys_values: tuple[Tensor, Tensor],
        modulation: tuple[Tensor, ...],
        following: tuple[Tensor, ...] | None,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What follows self-attention, which does every token by itself; without `following` no
        norm is made for a next block."""
        _, _, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = modulation
        x, normed = gated_add_norm(
            x, self.self_attention.out_layer(attended), gate, scale_cross, shift_cross
        )
        x, normed = gated_add_norm(
            x,
            self.cross_attention.look_up(normed, keys_values, key_mask),
            gate_cross,
            scale_ff,
            shift_ff,
        )
        return gated_add_norm(
            x, self.feed_forward(normed), gate_ff, *(following[1::-1] if following else ())
        )


def _records(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether autograd would record what `module` makes of the inputs. Adapters in training are no
    parameters of it, but count."""
    if not torch.is_grad_enabled():
        return False
    additions = (
        layer.additions
        for layer in module.modules()
        if isinstance(layer, Linear) and layer.additions is not None
    )
    added = (
        matrix for addition in additions for pair in addition.matrices.values() for matrix in pair
    )
    return any(tensor.requires_grad for tensor in chain(inputs, module.parameters(), added))


class OutLayer(nn.Module):
    """The last modulation and projection; its norm has already happened in the last block's closing
    pass."""

    def __init__(self, config: DiTConfig, features: int):
        super().__init__()
        self.modulation = Modulation(config.time_dim, config.model_dim, 2)
        self.out_layer = Linear(config.model_dim, features)

    def forward(self, normed: Tensor) -> Tensor:
        return self.out_layer(normed)


class DiffusionTransformer3D(nn.Module):
    """The velocity (noise minus clean latent) that Kandinsky 5.0 predicts for a noisy latent video.

    One class for every released architecture; `config` alone decides.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, self.compute_dtype = config, None
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
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
        """The dtype of activations: that of the weights, unless training on fp32 weights asks for
        another in `compute_dtype`."""
        return self.compute_dtype or self.visual_embeddings.in_layer.weight.dtype

    def prepare(self) -> DiffusionTransformer3D:
        """Ready for inference: see `Attention.prepare`. To be called once the weights are
        loaded."""
        self.eval()
        for block in self.visual_transformer_blocks:
            block.self_attention.prepare()
        bounds = [block.self_attention.logit_bound for block in self.visual_transformer_blocks]
        _log.info(
            "the weights of the norms bound the logits of self-attention by %.1f to %.1f",
            min(bounds),
            max(bounds),
        )
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """What runs one after another in every pass, so that weights can come and go; see
        `offload`."""
        return [*self.text_transformer_blocks, *self.visual_transformer_blocks]

    @property
    def once(self) -> list[nn.Module]:
        """What runs once per prompt, in `modulate`: an eighth of the weights, which need not be on
        the device for it."""
        return [self.time_embeddings, self.pooled_text_embeddings, *chain(*self._modulations())]

    def _modulations(self) -> tuple[list[Modulation], list[Modulation]]:
        return (
            [block.text_modulation for block in self.text_transformer_blocks],
            [
                *(block.visual_modulation for block in self.visual_transformer_blocks),
                self.out_layer.modulation,
            ],
        )

    def modulate(self, time: Tensor, pooled: Tensor) -> ModulationTable:
        """Everything that depends on time and pooled text alone, for n times. time: [n, B], 1000 t;
        pooled: [B, in_text_dim2].

        It is computed where the weights are, which are read once instead of n times, for the device
        of `time`.
        """
        wide, home = (
            torch.promote_types(self.dtype, torch.float32),
            self.time_embeddings.in_layer.weight.device,
        )
        # [n, B, time_dim]
        moments = self.time_embeddings(time.to(home, wide)) + self.pooled_text_embeddings(
            pooled.to(home, self.dtype)
        )
        text, visual = self._modulations()
        # [n, B, V, C]
        vectors = torch.stack(
            [vector for layer in (*text, *visual) for vector in layer(moments)], 2
        )
        if home.type == "cpu" and time.is_cuda:
            vectors = vectors.pin_memory()
        return ModulationTable(
            vectors,
            ([layer.count for layer in text], [layer.count for layer in visual]),
            time.device,
        )

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
        """Velocity [B, T, 2Y, 2X, out_visual_dim] in the model's dtype.

        x: [B, T, 2Y, 2X, in_channels], channels last. text: [B, L, in_text_dim]; text_lengths:
        int64 [B], how many rows of each sample are text (None: all); the rest never acts as a key,
        so a sample's result does not depend on its neighbours. pooled: [B, in_text_dim2]. time:
        [B], 1000 t, fp32. Keep `text_lengths` on the CPU to spare the device a synchronisation.
        modulations: of this time, where they are known already. Raises ValueError when shapes do
        not fit the layout or each other.
        """
        self._check(x, text, pooled, time, layout, text_lengths)
        modulations = (
            self.modulate(time[None], pooled).step(0) if modulations is None else modulations
        )
        x, text, key_mask = self.begin(x, text, layout, text_lengths, modulations)
        _, normed = self.blocks(
            x,
            None,
            text,
            modulations.visual,
            key_mask,
            layout,
            range(len(self.visual_transformer_blocks)),
        )
        return self.finish(normed, layout)

    def begin(
        self,
        x: Tensor,
        text: Tensor,
        layout: Layout,
        text_lengths: Tensor | None,
        modulations: Modulations,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The embedded tokens [B, S, C] in the layout's order, the text [B, L, C] after its blocks,
        and its key mask."""
        text, key_mask = _trim(text.to(self.dtype), text_lengths)
        text = self.text_embeddings(text)  # [B, L, C]
        for block, modulation in zip(self.text_transformer_blocks, modulations.text, strict=True):
            text = block(text, modulation, key_mask, layout)
        patches = geometry.patchify(x.to(self.dtype), self.config.patch_size)  # [B, S, patch * Cin]
        patches = patches if layout.order is None else patches[:, layout.order]
        return (
            self.visual_embeddings(patches if layout.ranks is None else layout.ranks.own(patches)),
            text,
            key_mask,
        )

    def blocks(
        self,
        x: Tensor,
        normed: Tensor | None,
        text: Tensor,
        modulations: list[tuple[Tensor, ...]],
        key_mask: Tensor | None,
        layout: Layout,
        span: range,
    ) -> tuple[Tensor, Tensor]:
        """The visual blocks of `span` on x [B, S, C] and its norm for the first of them (None: made
        here); x and norm for what follows."""
        normed = self.norm_for(span.start, x, modulations) if normed is None else normed
        for i in span:
            x, normed = self.visual_transformer_blocks[i](
                x, normed, modulations[i], modulations[i + 1], text, key_mask, layout
            )
        return x, normed

    def norm_for(self, stage: int, x: Tensor, modulations: list[tuple[Tensor, ...]]) -> Tensor:
        """x as visual block `stage`, or with -1 the out layer, reads it."""
        return modulated_norm(x, modulations[stage][1], modulations[stage][0])

    def finish(self, normed: Tensor, layout: Layout) -> Tensor:
        """The out layer on the last norm [B, S, C], put back into frames."""
        out = self.out_layer(normed)  # [B, S, patch * Cout]
        out = out if layout.ranks is None else layout.ranks.gather(out, layout.grid.tokens)
        # after the last projection, which is per token: fewer features to move
        if layout.inverse is not None:
            out = out[:, layout.inverse]
        return geometry.unpatchify(out, layout.grid, self.config.patch_size)

    def _check(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        layout: Layout,
        text_lengths: Tensor | None,
    ) -> None:
        config, grid, B = self.config, layout.grid, x.shape[0]
        o, p, q = config.patch_size
        wanted = {
            "x": (x, (B, grid.T * o, grid.Y * p, grid.X * q, config.in_channels)),
            "text": (text, (B, text.shape[1] if text.dim() == 3 else 0, config.in_text_dim)),
            "pooled": (pooled, (B, config.in_text_dim2)),
            "time": (time, (B,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {list(shape)} for this model, layout and "
                    f"batch, got {list(tensor.shape)}; "
                    "make the layout for the size of the latents and give every input "
                    "the same batch"
                )
        if text_lengths is not None and text_lengths.shape != (B,):
            raise ValueError(
                f"text_lengths must have shape {[B]}, got "
                f"{list(text_lengths.shape)}; give one length per sample"
            )


def _trim(text: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, Dt] cut to its longest sample, and the key mask [B, 1, 1, L] that shorter samples
    need, if any are shorter."""
    if lengths is None:
        return text, None
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > text.shape[1]:
        raise ValueError(
            f"text_lengths must lie in 1..{text.shape[1]}, got "
            f"{shortest}..{longest}; an empty prompt still has a token"
        )
    text = text[:, :longest]
    if shortest == longest:
        return text, None
    mask = torch.arange(longest, device=text.device) < lengths.to(text.device)[:, None]  # [B, L]
    # zero, because 0 * NaN is NaN
    return text.masked_fill(~mask[..., None], 0.0), mask[:, None, None]
