# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer: text blocks, then visual blocks that read the text by cross-attention.

Every sub-layer is `x + gate * f(modulated_norm(x))`. The residual sum of one sub-layer and the norm of the next are one fused pass
(`gated_add_norm`), so the networks below hand on pairs: the residual stream `x` and its norm for whoever comes next.

Parameter names and shapes are those of the published checkpoints. Activations have the dtype of `visual_embeddings.in_layer.weight`;
the time embedding and every modulation are computed in fp32 whatever the weights are stored in. All of it is differentiable.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import (
    block_means,
    block_sparse_attention,
    gated_add_norm,
    modulated_norm,
    norm_rope,
    norm_rope_means,
    select_blocks,
)

from . import geometry
from .config import DiTConfig, NablaConfig

FEED_FORWARD_TOKENS = 16384  # at once: enough for large matrix products, a sixth of a 10 s clip
Rotary = tuple[Tensor, Tensor]  # cos, sin: fp32 [S, D/2]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one video size needs at every step and layer, computed once by `make_plan`."""

    grid: geometry.Grid
    rotary: Rotary  # in the order of the tokens
    nabla: NablaConfig | None = None  # None: dense attention, raster order
    order: Tensor | None = None  # int64 [S], raster index of the i-th token
    inverse: Tensor | None = None  # int64 [S]
    block_offsets: Tensor | None = None  # int32 [N + 1]
    rope_cast: torch.dtype | None = None
    text_rotaries: dict[tuple[int, int], Rotary] = field(default_factory=dict, repr=False)

    def text_rotary(self, length: int, head_dim: int) -> Rotary:
        """cos, sin of a text of `length` tokens; remembered, as every step asks for the same two or so."""
        if (length, head_dim) not in self.text_rotaries:
            angles = geometry.rotary_angles_1d(length, head_dim)
            self.text_rotaries[length, head_dim] = (angles.cos().to(self.rotary[0].device), angles.sin().to(self.rotary[0].device))
        return self.text_rotaries[length, head_dim]


def make_plan(config: DiTConfig, grid: geometry.Grid, scale_factor: tuple[float, float, float], nabla: NablaConfig | None = None,
              device: torch.device | str = "cpu", rope_cast: torch.dtype | None = None) -> Plan:
    """Token order, rotary tables and blocks of one video size. With `nabla` tokens come tile by tile; any grid will do.

    rope_cast: round rotated queries and keys to this dtype and back. None is exact; torch.bfloat16 reproduces in an
    fp32 run what diffusers does there.
    """
    angles = geometry.rotary_angles(grid, config.axes_dims, scale_factor)  # [S, D/2], raster
    if nabla is None:
        return Plan(grid, (angles.cos().to(device), angles.sin().to(device)), rope_cast=rope_cast)
    order = geometry.tile_order(grid)
    angles = angles[order]
    return Plan(grid, (angles.cos().to(device), angles.sin().to(device)), nabla, order.to(device),
                geometry.inverse_order(order).to(device), geometry.block_offsets(grid).to(device), rope_cast)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, so that a checkpoint may mix dtypes freely."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class TimeEmbedding(nn.Module):
    """Two linear layers on [cos | sin] of time * frequencies; time is 1000 t."""

    def __init__(self, model_dim: int, time_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, time_dim)
        self.out_layer = Linear(time_dim, time_dim)

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * geometry.frequencies(self.in_layer.in_features // 2, time.device)  # [B, C/2]
        return self.out_layer(F.silu(self.in_layer(torch.cat([angles.cos(), angles.sin()], dim=-1))))  # [B, time_dim]


class TextEmbedding(nn.Module):
    """Linear, then LayerNorm with weights, in at least fp32."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, text: Tensor) -> Tensor:
        x = self.in_layer(text)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.norm.weight.to(wide), self.norm.bias.to(wide), self.norm.eps).to(x.dtype)


class VisualEmbedding(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = Linear(in_dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.in_layer(patches)


class Modulation(nn.Module):
    """`count` vectors [B, C] per sub-layer in the order shift, scale, gate. Starts at zero: an untrained block is the identity."""

    def __init__(self, time_dim: int, model_dim: int, count: int):
        super().__init__()
        self.count = count
        self.out_layer = Linear(time_dim, count * model_dim)
        if not self.out_layer.weight.is_meta:
            nn.init.zeros_(self.out_layer.weight)
            nn.init.zeros_(self.out_layer.bias)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.out_layer(F.silu(time)).chunk(self.count, dim=-1)


class HeadNorm(nn.Module):
    """RMSNorm of each head and, where given, rotation; with `block_offsets` also the mean of each block."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        cos, sin = rotary or (None, None)
        return norm_rope(x, self.weight, cos, sin)

    def with_means(self, x: Tensor, rotary: Rotary, block_offsets: Tensor) -> tuple[Tensor, Tensor]:
        return norm_rope_means(x, self.weight, *rotary, block_offsets)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys, in three forms: over itself, over blocks of itself, over a text."""

    def __init__(self, model_dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_query = Linear(model_dim, model_dim)
        self.to_key = Linear(model_dim, model_dim)
        self.to_value = Linear(model_dim, model_dim)
        self.query_norm = HeadNorm(head_dim)
        self.key_norm = HeadNorm(head_dim)
        self.out_layer = Linear(model_dim, model_dim)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.head_dim)
        return (self.to_query(x).unflatten(-1, heads), self.to_key(context).unflatten(-1, heads),  # [B, S, H, D]
                self.to_value(context).unflatten(-1, heads))

    def forward(self, x: Tensor, context: Tensor | None = None, rotary: Rotary | None = None, key_mask: Tensor | None = None,
                rope_cast: torch.dtype | None = None) -> Tensor:
        """Dense attention of x [B, S, C] over `context` [B, L, C] (itself when None). key_mask: bool [B, 1, 1, L], True is visible."""
        query, key, value = self.project(x, x if context is None else context)
        query, key = _round(self.query_norm(query, rotary), rope_cast), _round(self.key_norm(key, rotary), rope_cast)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, S, D]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        return self.out_layer(out.transpose(1, 2).flatten(-2))  # [B, S, C]

    def nabla(self, x: Tensor, plan: Plan) -> Tensor:
        """Attention of x [B, S, C], in tile order, over the blocks that NABLA chooses from the block means."""
        query, key, value = self.project(x, x)
        query, query_means = self.query_norm.with_means(query, plan.rotary, plan.block_offsets)
        key, key_means = self.key_norm.with_means(key, plan.rotary, plan.block_offsets)
        if plan.rope_cast is not None:
            query, key = _round(query, plan.rope_cast), _round(key, plan.rope_cast)
            query_means, key_means = block_means(query, plan.block_offsets), block_means(key, plan.block_offsets)
        selection = select_blocks(query_means.detach(), key_means.detach(), plan.nabla.keep_mass, plan.grid.tiles, plan.nabla.window)
        out = block_sparse_attention(query, key, value, selection, plan.block_offsets)
        return self.out_layer(out.flatten(-2))  # [B, S, C]


def _round(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


class FeedForward(nn.Module):
    """Two linear layers around GELU, a part of the tokens at a time: the wide activation of all of them would be 1.3 GB at 10 s."""

    def __init__(self, model_dim: int, ff_dim: int):
        super().__init__()
        self.in_layer = Linear(model_dim, ff_dim, bias=False)
        self.out_layer = Linear(ff_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.out_layer(F.gelu(self.in_layer(part))) for part in x.split(FEED_FORWARD_TOKENS, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [B, S, C]


class TextBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(self, x: Tensor, time: Tensor, key_mask: Tensor | None, plan: Plan) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.text_modulation(time)
        rotary = plan.text_rotary(x.shape[1], self.self_attention.head_dim)
        branch = self.self_attention(modulated_norm(x, scale, shift), rotary=rotary, key_mask=key_mask, rope_cast=plan.rope_cast)
        x, normed = gated_add_norm(x, branch, gate, scale_ff, shift_ff)
        return gated_add_norm(x, self.feed_forward(normed), gate_ff)[0]


class VisualBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(config.model_dim, config.head_dim)
        self.cross_attention = Attention(config.model_dim, config.head_dim)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.visual_modulation(time)

    def forward(self, x: Tensor, normed: Tensor, modulation: tuple[Tensor, ...], following: tuple[Tensor, ...], text: Tensor,
                key_mask: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        """x and its first norm -> the next x and the next block's first norm, whose shift and scale lead `following`."""
        _, _, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = modulation
        if plan.nabla is None:
            branch = self.self_attention(normed, rotary=plan.rotary, rope_cast=plan.rope_cast)
        else:
            branch = self.self_attention.nabla(normed, plan)
        x, normed = gated_add_norm(x, branch, gate, scale_cross, shift_cross)
        x, normed = gated_add_norm(x, self.cross_attention(normed, text, key_mask=key_mask), gate_cross, scale_ff, shift_ff)
        return gated_add_norm(x, self.feed_forward(normed), gate_ff, following[1], following[0])


class OutLayer(nn.Module):
    """The last modulation and projection; its norm has already happened in the last block's closing pass."""

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
        self.config = config
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.time_embeddings = TimeEmbedding(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbedding(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbedding(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbedding(patch * config.in_channels, config.model_dim)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(VisualBlock(config) for _ in range(config.num_visual_blocks))
        self.out_layer = OutLayer(config, patch * config.out_visual_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.visual_embeddings.in_layer.weight.dtype

    def forward(self, x: Tensor, text: Tensor, pooled: Tensor, time: Tensor, plan: Plan, text_lengths: Tensor | None = None) -> Tensor:
        """Velocity [B, T, 2Y, 2X, out_visual_dim] in the model's dtype.

        x: [B, T, 2Y, 2X, in_channels], channels last. text: [B, L, in_text_dim]; text_lengths: int64 [B], how many rows of each sample
        are text (None: all); the rest never acts as a key, so a sample's result does not depend on its neighbours. pooled:
        [B, in_text_dim2]. time: [B], 1000 t, fp32. Keep `text_lengths` on the CPU to spare the device a synchronisation.
        Raises ValueError when shapes do not fit the plan or each other.
        """
        self._check(x, text, pooled, time, plan, text_lengths)
        text, key_mask = _trim(text.to(self.dtype), text_lengths)
        wide = torch.promote_types(self.dtype, torch.float32)
        time = self.time_embeddings(time.to(wide)) + self.pooled_text_embeddings(pooled.to(self.dtype))  # [B, time_dim]

        text = self.text_embeddings(text)  # [B, L, C]
        for block in self.text_transformer_blocks:
            text = block(text, time, key_mask, plan)

        patches = geometry.patchify(x.to(self.dtype), self.config.patch_size)  # [B, S, patch * Cin]
        if plan.order is not None:
            patches = patches[:, plan.order]
        out = self._visual(self.visual_embeddings(patches), text, time, key_mask, plan)
        if plan.inverse is not None:  # after the last projection, which is per token: fewer features to move
            out = out[:, plan.inverse]
        return geometry.unpatchify(out, plan.grid, self.config.patch_size)

    def _visual(self, x: Tensor, text: Tensor, time: Tensor, key_mask: Tensor | None, plan: Plan) -> Tensor:
        """Visual blocks and the out layer on x [B, S, C]; each modulation is made just before it is first needed."""
        stages = [*self.visual_transformer_blocks, self.out_layer]
        modulation = stages[0].modulation(time)
        normed = modulated_norm(x, modulation[1], modulation[0])
        for block, successor in pairwise(stages):
            following = successor.modulation(time)
            x, normed = block(x, normed, modulation, following, text, key_mask, plan)
            modulation = following
        return self.out_layer(normed)  # [B, S, patch * Cout]

    def _check(self, x: Tensor, text: Tensor, pooled: Tensor, time: Tensor, plan: Plan, text_lengths: Tensor | None) -> None:
        config, grid, B = self.config, plan.grid, x.shape[0]
        o, p, q = config.patch_size
        wanted = {
            "x": (x, (B, grid.T * o, grid.Y * p, grid.X * q, config.in_channels)),
            "text": (text, (B, text.shape[1] if text.dim() == 3 else 0, config.in_text_dim)),
            "pooled": (pooled, (B, config.in_text_dim2)), "time": (time, (B,)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)} for this model, plan and batch, got {list(tensor.shape)}; "
                                 "make the plan for the size of the latents and give every input the same batch")
        if text_lengths is not None and text_lengths.shape != (B,):
            raise ValueError(f"text_lengths must have shape {[B]}, got {list(text_lengths.shape)}; give one length per sample")


def _trim(text: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, Dt] cut to its longest sample, and the key mask [B, 1, 1, L] that shorter samples need, if any are shorter."""
    if lengths is None:
        return text, None
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > text.shape[1]:
        raise ValueError(f"text_lengths must lie in 1..{text.shape[1]}, got {shortest}..{longest}; an empty prompt still has a token")
    text = text[:, :longest]
    if shortest == longest:
        return text, None
    mask = torch.arange(longest, device=text.device) < lengths.to(text.device)[:, None]  # [B, L]
    return text.masked_fill(~mask[..., None], 0.0), mask[:, None, None]  # zero, because 0 * NaN is NaN
