# SPDX-License-Identifier: Apache-2.0
"""diffusers' Kandinsky 5 transformer by our operators: mixins for `class_swap`, keyed by the class
they go before.

Whoever runs decides once, in the transformer's forward. From there on the kind of the rotary
argument says which code runs: a tuple (`Rotary`, or () for no rotation) means ours, diffusers'
tensors or None mean theirs. A parameter is read only inside the forward of the module that owns it,
and linear layers are called as the modules they are, so that offloading, casting, quantisation and
adapters work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kandinsky_kernels import (
    Rotary,
    gated_add_norm,
    modulated_norm,
    norm_rope,
    norm_rope_means,
)

from ..dit import geometry, nabla
from .class_swap import falls_back, recorded, refusal, report, unexpected

NO_ROTATION = ()


class FusedRMSNorm:
    """torch.nn.RMSNorm of queries and keys."""

    def forward(self, x: Tensor, *fused: Rotary | Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """fused = (rotary, block_offsets), either may be None: norm and rotation of x [B, S, H, D],
        with offsets also block means."""
        if not fused:
            return super().forward(x)
        rotary, offsets = fused
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return (
            norm_rope(x, self.weight, rotary, eps)
            if offsets is None
            else norm_rope_means(x, self.weight, rotary, offsets, eps)
        )


class Processor:
    """Attention over all tokens through diffusers' dispatcher, which honours its backends, or over
    the blocks that NABLA chooses."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb=None,
        sparse_params=None,
    ) -> Tensor:
        if not isinstance(rotary_emb, tuple):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rotary = rotary_emb or None

        def project() -> tuple[Tensor, Tensor, Tensor]:
            heads = (attn.num_heads, -1)
            query = attn.to_query(hidden_states).unflatten(-1, heads)  # [B, S, H, D]
            key = attn.to_key(context).unflatten(-1, heads)  # [B, L, H, D]
            value = attn.to_value(context).unflatten(-1, heads)  # [B, L, H, D]
            return query, key, value

        if sparse_params is None:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            query, key, value = project()
            query = attn.query_norm(query, rotary, None)
            key = attn.key_norm(key, rotary, None)
            out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        else:
            recipe = nabla.Nabla(rotary, **sparse_params)
            out = nabla.attend(project, attn.query_norm, attn.key_norm, recipe)
        return attn.out_layer(out.flatten(-2))  # [B, S, C]


class TextBlock:
    def forward(self, x: Tensor, time_embed: Tensor, rope) -> Tensor:
        if not isinstance(rope, tuple):
            return super().forward(x, time_embed, rope)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = _vectors(
            self.text_modulation, time_embed, len(x), 6
        )
        branch = self.self_attention(
            modulated_norm(x, scale, shift, self.self_attention_norm.eps), rotary_emb=rope
        )
        x, normed = gated_add_norm(
            x, branch.to(x.dtype), gate, scale_ff, shift_ff, self.feed_forward_norm.eps
        )
        return gated_add_norm(x, self.feed_forward(normed).to(x.dtype), gate_ff)[0]


class VisualBlock:
    def forward(
        self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope, sparse_params
    ) -> Tensor:
        x = visual_embed
        if not isinstance(rope, tuple):
            return super().forward(x, text_embed, time_embed, rope, sparse_params)
        shift, scale, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = (
            _vectors(self.visual_modulation, time_embed, len(x), 9)
        )
        branch = self.self_attention(
            modulated_norm(x, scale, shift, self.self_attention_norm.eps),
            rotary_emb=rope,
            sparse_params=sparse_params,
        )
        x, normed = gated_add_norm(
            x, branch.to(x.dtype), gate, scale_cross, shift_cross, self.cross_attention_norm.eps
        )
        branch = self.cross_attention(
            normed, encoder_hidden_states=text_embed, rotary_emb=NO_ROTATION
        )
        x, normed = gated_add_norm(
            x, branch.to(x.dtype), gate_cross, scale_ff, shift_ff, self.feed_forward_norm.eps
        )
        return gated_add_norm(x, self.feed_forward(normed).to(x.dtype), gate_ff)[0]


class OutLayer:
    def forward(
        self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, fused: bool = False
    ) -> Tensor:
        """visual_embed: [B, T, Y, X, C]. Returns [B, T, 2Y, 2X, C']."""
        if not fused:
            return super().forward(visual_embed, text_embed, time_embed)
        x = visual_embed.flatten(1, 3)  # [B, S, C]
        shift, scale = _vectors(self.modulation, time_embed, len(x), 2)
        x = self.out_layer(modulated_norm(x, scale, shift, self.norm.eps))
        return geometry.unpatchify(
            x, geometry.Grid(*visual_embed.shape[1:4]), tuple(self.patch_size)
        )


class TextPositions:
    """Angles of a text: a table of them and where each token looks, instead of a matrix per token
    and pair."""

    def forward(self, pos: Tensor, fused: bool = False) -> Tensor | Rotary:
        if not fused:
            return super().forward(pos)
        return Rotary(
            self.args.cos(), self.args.sin(), pos[:, None].to(torch.int32), (self.args.shape[1],)
        )


class VisualPositions:
    """Angles of a video, likewise: 12 bytes per token where diffusers' matrices take 1 KiB in each
    pass (head dim 128)."""

    def forward(
        self,
        shape: tuple[int, ...],
        pos: list[Tensor],
        scale_factor: tuple[float, ...] = (1.0, 1.0, 1.0),
        fused: bool = False,
        order: Tensor | None = None,
    ) -> Tensor | Rotary:
        """order: int64 [S], of the tokens; None for the raster's."""
        if not fused:
            return super().forward(shape, pos, scale_factor)
        tables = (self.args_0, self.args_1, self.args_2)
        # [P, D / 2]
        angles = torch.cat(
            [table / scale for table, scale in zip(tables, scale_factor, strict=True)], -1
        )
        grid = [axis.to(torch.int32) for axis in pos]
        positions = torch.stack(torch.meshgrid(*grid, indexing="ij"), -1).flatten(0, 2)  # [S, 3]
        positions = positions if order is None else positions[order]
        return Rotary(
            angles.cos(), angles.sin(), positions, tuple(table.shape[1] for table in tables)
        )


class Transformer:
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        visual_rope_pos,
        text_rope_pos: Tensor,
        scale_factor=(1.0, 1.0, 1.0),
        sparse_params=None,
        return_dict: bool = True,
    ):
        reason = self._stock_reason(
            sparse_params, hidden_states, encoder_hidden_states, pooled_projections
        )
        if falls_back(self, reason):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                timestep,
                pooled_projections,
                visual_rope_pos,
                text_rope_pos,
                scale_factor,
                sparse_params,
                return_dict,
            )
        text = self.text_embeddings(encoder_hidden_states)
        time = self.time_embeddings(timestep) + self.pooled_text_embeddings(pooled_projections)
        x = self.visual_embeddings(hidden_states)  # [B, T, Y, X, C]
        shape, grid = x.shape, geometry.Grid(*x.shape[1:4])
        order = geometry.tile_order(grid, x.device) if sparse_params else None
        blocks = self._blocks(grid, sparse_params, x.device) if sparse_params else None
        rope = self.text_rope_embeddings(text_rope_pos, True)
        for block in self.text_transformer_blocks:
            text = block(text, time, rope)
        rope = self.visual_rope_embeddings(shape[:-1], visual_rope_pos, scale_factor, True, order)
        x = x.flatten(1, 3) if order is None else x.flatten(1, 3)[:, order]  # [B, S, C]
        for block in self.visual_transformer_blocks:
            x = block(x, text, time, rope, blocks)
        x = x if order is None else x[:, geometry.inverse_order(order)]
        x = self.out_layer(x.view(shape), text, time, True)
        return self._result(x) if return_dict else x

    def _stock_reason(self, sparse: dict | None, *inputs: Tensor) -> str | None:
        """Why this pass must be diffusers' own, or None."""
        visual = [block.self_attention.processor for block in self.visual_transformer_blocks]
        others = [block.cross_attention.processor for block in self.visual_transformer_blocks]
        processors = [
            *visual,
            *others,
            *(block.self_attention.processor for block in self.text_transformer_blocks),
        ]
        if not all(isinstance(processor, Processor) for processor in processors):
            return "an attention processor has been replaced"
        if any(processor._parallel_config is not None for processor in processors):
            return "the model is split over several devices"
        if sparse is None or not sparse.get("to_fractal"):
            return (
                "sparse attention without tiles is not NABLA" if sparse else refusal(self, *inputs)
            )
        backend = next(
            (
                processor._attention_backend
                for processor in visual
                if processor._attention_backend is not None
            ),
            None,
        )
        if backend is not None:
            name = getattr(backend, "value", backend)
            return (
                f"NABLA uses the attention backend that was set, {name}; "
                "reset_attention_backend() brings ours back"
            )
        if sparse.get("sta_mask") is not None and None in self._window(sparse):
            return "the local window is known as a mask only"
        if recorded(self, *inputs):
            report(
                self,
                "records NABLA's gradients by our operators, because diffusers' own code "
                "needs a backend for them",
            )
        return None

    def _window(self, sparse: dict) -> tuple[int | None, ...]:
        return tuple(
            sparse.get(name, getattr(self.config, f"attention_{name}"))
            for name in ("wT", "wH", "wW")
        )

    def _blocks(self, grid: geometry.Grid, sparse: dict, device: torch.device) -> dict:
        """What the blocks get as `sparse_params`: the fields of `nabla.Nabla`, in a dict because
        hooks that move arguments to another device look into dicts."""
        window = (
            None
            if sparse.get("sta_mask") is None and None in self._window(sparse)
            else self._window(sparse)
        )
        return {
            "block_offsets": geometry.block_offsets(grid, device),
            "tiles": grid.tiles,
            "window": window,
            "keep_mass": sparse["P"],
        }

    def _result(self, x: Tensor):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=x)


def _vectors(modulation: nn.Module, time: Tensor, batch: int, count: int) -> tuple[Tensor, ...]:
    """`count` vectors [B, C] in fp32: shift, scale, gate of each part."""
    return modulation(time).float().expand(batch, -1).chunk(count, -1)


SWAPS = {
    "Kandinsky5Transformer3DModel": Transformer,
    "Kandinsky5TransformerEncoderBlock": TextBlock,
    "Kandinsky5TransformerDecoderBlock": VisualBlock,
    "Kandinsky5OutLayer": OutLayer,
    "Kandinsky5RoPE1D": TextPositions,
    "Kandinsky5RoPE3D": VisualPositions,
    "Kandinsky5AttnProcessor": Processor,
    "RMSNorm": FusedRMSNorm,
}


def obstacle(transformer: nn.Module) -> str | None:
    """What would be computed wrongly here, or None."""
    norms = [
        norm
        for m in transformer.modules()
        if type(m).__name__ == "Kandinsky5Attention"
        for norm in (m.query_norm, m.key_norm)
    ]
    return unexpected(nn.RMSNorm, norms)
