# SPDX-License-Identifier: Apache-2.0
"""The forwards that diffusers' Kandinsky 5 transformer gets, by the name of the class.

The transformer's forward decides once per pass which code runs. From there on the kind of the
rotary argument says so: a tuple (`Rotary`, or () for no rotation) means the code below, and
diffusers' tensors or None mean diffusers' own. A parameter is read only inside the forward of the
module that owns it, and linear layers are called as the modules they are, so that offloading,
casting, quantisation and adapters work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

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
from .forward_swap import (
    Foreign,
    accelerated,
    changed,
    falls_back,
    has_tangents,
    recorded,
    refusal,
    replacement,
    report,
    stock,
)

NO_ROTATION = ()
VISUAL_BLOCK = "Kandinsky5TransformerDecoderBlock"
TEXT_BLOCK = "Kandinsky5TransformerEncoderBlock"
# the norms of a block, which the operators compute without calling them
NORMS = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")
ATTENTIONS = ("self_attention", "cross_attention")


@replacement
def head_norm(self, x: Tensor, *fused: Any) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.RMSNorm of queries and keys.

    fused: (Rotary, block offsets), given for x [B, S, H, D]; either may be None. The heads are
    normed and rotated; with offsets the means of the blocks, [B, N, H, D], are returned as well.
    """
    if not fused:
        return stock(self, x)
    rotary, offsets = fused
    eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
    if offsets is None:
        return norm_rope(x, self.weight, rotary, eps)
    return norm_rope_means(x, self.weight, rotary, offsets, eps)


@replacement
def attention(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    sparse_params: dict | None = None,
    rotary_emb: Tensor | Rotary | tuple | None = None,
    **kwargs,
) -> Tensor:
    """Kandinsky5Attention of hidden_states [B, S, C] to themselves or to encoder_hidden_states.

    Attention over all tokens goes through diffusers' dispatcher, which honours its backends; with
    `sparse_params` (those of `_nabla_of`) it goes over the blocks that NABLA chooses.
    """
    if not isinstance(rotary_emb, tuple):
        return stock(
            self, hidden_states, encoder_hidden_states, sparse_params, rotary_emb, **kwargs
        )
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    rotary = rotary_emb or None

    def project() -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.num_heads, -1)
        query = self.to_query(hidden_states).unflatten(-1, heads)  # [B, S, H, D]
        key = self.to_key(context).unflatten(-1, heads)  # [B, L, H, D]
        value = self.to_value(context).unflatten(-1, heads)  # [B, L, H, D]
        return query, key, value

    if sparse_params is None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        query, key, value = project()
        query = self.query_norm(query, rotary, None)
        key = self.key_norm(key, rotary, None)
        backend = self.processor._attention_backend
        out = dispatch_attention_fn(query, key, value, backend=backend)
    else:
        recipe = nabla.Nabla(cast(Rotary, rotary), **sparse_params)
        out = nabla.attend(project, self.query_norm, self.key_norm, recipe)
    return self.out_layer(out.flatten(-2))  # [B, S, C]


@replacement
def text_block(
    self,
    x: Tensor,
    time_embed: Tensor,
    rope: Tensor | Rotary,
) -> Tensor:
    """Kandinsky5TransformerEncoderBlock of text tokens x [B, L, C]."""
    if not isinstance(rope, tuple):
        return stock(self, x, time_embed, rope)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = _vectors(
        self.text_modulation, time_embed, len(x), 6
    )
    normed: Tensor | None = modulated_norm(x, scale, shift, self.self_attention_norm.eps)
    branch = self.self_attention(normed, rotary_emb=rope).to(x.dtype)
    x, normed = gated_add_norm(x, branch, gate, scale_ff, shift_ff, self.feed_forward_norm.eps)
    branch = self.feed_forward(normed).to(x.dtype)
    return gated_add_norm(x, branch, gate_ff)[0]


@replacement
def visual_block(
    self,
    visual_embed: Tensor,
    text_embed: Tensor,
    time_embed: Tensor,
    rope: Tensor | Rotary,
    sparse_params: dict | None,
) -> Tensor:
    """Kandinsky5TransformerDecoderBlock of visual tokens [B, S, C]."""
    if not isinstance(rope, tuple):
        return stock(self, visual_embed, text_embed, time_embed, rope, sparse_params)
    x = visual_embed
    shift, scale, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = (
        _vectors(self.visual_modulation, time_embed, len(x), 9)
    )
    normed: Tensor | None = modulated_norm(x, scale, shift, self.self_attention_norm.eps)
    branch = self.self_attention(normed, rotary_emb=rope, sparse_params=sparse_params).to(x.dtype)
    eps = self.cross_attention_norm.eps
    x, normed = gated_add_norm(x, branch, gate, scale_cross, shift_cross, eps)
    branch = self.cross_attention(
        normed, encoder_hidden_states=text_embed, rotary_emb=NO_ROTATION
    ).to(x.dtype)
    eps = self.feed_forward_norm.eps
    x, normed = gated_add_norm(x, branch, gate_cross, scale_ff, shift_ff, eps)
    branch = self.feed_forward(normed).to(x.dtype)
    return gated_add_norm(x, branch, gate_ff)[0]


@replacement
def out_layer(
    self,
    visual_embed: Tensor,
    text_embed: Tensor,
    time_embed: Tensor,
    fused: bool = False,
) -> Tensor:
    """Kandinsky5OutLayer: visual_embed [B, T, Y, X, C] -> [B, T, 2Y, 2X, C'].

    fused: whether the operators compute it.
    """
    if not fused:
        return stock(self, visual_embed, text_embed, time_embed)
    grid = geometry.Grid(*visual_embed.shape[1:4])
    x = visual_embed.flatten(1, 3)  # [B, S, C]
    shift, scale = _vectors(self.modulation, time_embed, len(x), 2)
    x = self.out_layer(modulated_norm(x, scale, shift, self.norm.eps))  # [B, S, 4 C']
    return geometry.unpatchify(x, grid, tuple(self.patch_size))


@replacement
def text_positions(self, pos: Tensor, fused: bool = False) -> Tensor | Rotary:
    """Kandinsky5RoPE1D: the angles of text tokens at positions `pos` [L].

    fused: return a table of angles and where each token looks, instead of a matrix for every token
    and pair.
    """
    if not fused:
        return stock(self, pos)
    positions = pos[:, None].to(torch.int32)  # [L, 1]
    return Rotary(self.args.cos(), self.args.sin(), positions, (self.args.shape[1],))


@replacement
def visual_positions(
    self,
    shape: tuple[int, ...],
    pos: list[Tensor],
    scale_factor: tuple[float, ...] = (1.0, 1.0, 1.0),
    fused: bool = False,
    order: Tensor | None = None,
) -> Tensor | Rotary:
    """Kandinsky5RoPE3D: the angles of visual tokens on the grid of positions `pos` per axis.

    fused: return a `Rotary`, 12 bytes per token, where diffusers' matrices take 1 KiB in each pass
    (head dim 128). order: int64 [S], of the tokens; None for the raster's.
    """
    if not fused:
        return stock(self, shape, pos, scale_factor)
    tables = (self.args_0, self.args_1, self.args_2)  # [P, pairs of an axis] each
    scaled = [table / scale for table, scale in zip(tables, scale_factor, strict=True)]
    angles = torch.cat(scaled, -1)  # [P, D / 2]
    pairs = tuple(table.shape[1] for table in tables)
    if _turns_as_one(self):
        repeats = sum(self.axes_dims) // 2
        angles = angles.repeat(1, repeats)
        pairs = tuple(count * repeats for count in pairs)
    axes = [axis.to(torch.int32) for axis in pos]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [S, 3]
    positions = positions if order is None else positions[order]
    return Rotary(angles.cos(), angles.sin(), positions, pairs)


def _turns_as_one(rope: Foreign) -> bool:
    """Whether a Kandinsky5RoPE3D has one pair for a head of several: diffusers then turns all of
    them by its angle."""
    return sum(dim // 2 for dim in rope.axes_dims) == 1


@replacement
def transformer(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    pooled_projections: Tensor,
    visual_rope_pos: list[Tensor],
    text_rope_pos: Tensor,
    scale_factor: tuple[float, float, float] = (1.0, 1.0, 1.0),
    sparse_params: dict | None = None,
    return_dict: bool = True,
):
    """Kandinsky5Transformer3DModel: the velocity of hidden_states [B, T, H, W, C].

    One text may serve several videos, and one time too.
    """
    inputs = (hidden_states, encoder_hidden_states, pooled_projections)
    if not accelerated(self) or falls_back(self, _stock_reason(self, sparse_params, *inputs)):
        return stock(
            self,
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
    text = self.text_embeddings(encoder_hidden_states)  # [B or 1, L, C]
    time = self.time_embeddings(timestep) + self.pooled_text_embeddings(pooled_projections)
    x = self.visual_embeddings(hidden_states)  # [B or 1, T, Y, X, C]
    batch = max(len(x), len(text), len(time))
    x = x.expand(batch, -1, -1, -1, -1)
    text = text.expand(batch, -1, -1)

    shape = x.shape
    grid = geometry.Grid(*x.shape[1:4])
    order = geometry.tile_order(grid, x.device) if sparse_params else None
    sparse = _nabla_of(self, grid, sparse_params, x.device) if sparse_params else None
    rope = self.text_rope_embeddings(text_rope_pos, True)
    for block in self.text_transformer_blocks:
        text = _call(self, block, text, time, rope)
    rope = self.visual_rope_embeddings(shape[:-1], visual_rope_pos, scale_factor, True, order)
    x = x.flatten(1, 3)  # [B, S, C]
    x = x if order is None else x[:, order]
    for block in self.visual_transformer_blocks:
        x = _call(self, block, x, text, time, rope, sparse)
    x = x if order is None else x[:, geometry.inverse_order(order)]
    x = self.out_layer(x.view(shape), text, time, True)
    if not return_dict:
        return x
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def _call(model: Foreign, block: Foreign, *args):
    """Call a block, through gradient checkpointing where the model has it switched on."""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *args)
    return block(*args)


def _stock_reason(model: Foreign, sparse: dict | None, *inputs: Tensor) -> str | None:
    """Why this pass must be diffusers' own, or None.

    sparse: what the pipeline passes for NABLA. inputs: of the pass.
    """
    visual = list(_blocks_of(model.visual_transformer_blocks, VISUAL_BLOCK))
    text = list(_blocks_of(model.text_transformer_blocks, TEXT_BLOCK))
    if reason := changed(_parts(model, visual, text)):
        return reason
    if any(attention is None for attention in map(_processor_of, _attentions(visual, text))):
        return "an attention processor has been replaced"
    processors = [attention.processor for attention in _attentions(visual, text)]
    if any(processor._parallel_config is not None for processor in processors):
        return "the model is split over several devices"
    for wrapper in (*model.visual_transformer_blocks, *model.text_transformer_blocks):
        if not accelerated(wrapper):
            report(model, f"calls its blocks through {type(wrapper).__name__}")
    if sparse is None:
        return refusal(model, *inputs)
    if not sparse.get("to_fractal"):
        return "sparse attention without tiles is not NABLA"
    return _nabla_reason(model, sparse, visual, *inputs)


def _nabla_reason(
    model: Foreign,
    sparse: dict,
    visual: list[Foreign],
    *inputs: Tensor,
) -> str | None:
    """Why diffusers must compute NABLA this time, or None."""
    for block in visual:
        backend = block.self_attention.processor._attention_backend
        if backend is not None:
            return (
                f"NABLA uses the attention backend that was set, "
                f"{getattr(backend, 'value', backend)}; "
                "reset_attention_backend() lets the operators compute it"
            )
    if sparse.get("sta_mask") is not None and None in _window(model, sparse):
        return "the local window is known as a mask only"
    if has_tangents(model, *inputs):
        return "forward-mode derivatives are computed"
    if recorded(model, *inputs):
        report(
            model,
            "records NABLA's gradients by the operators of kandinsky_kernels, because "
            "diffusers' own code needs a backend for them",
        )
    return None


def _blocks_of(blocks: Iterable[Foreign], name: str) -> Iterator[Foreign]:
    """The blocks in a list, also those inside a wrapper (cache-dit's, for one) that stands there
    instead and calls them. A wrapper without any is returned itself."""
    for block in blocks:
        inside = [one for one in block.modules() if type(one).__name__ == name]
        yield from inside or [block]


def _attentions(visual: list[Foreign], text: list[Foreign]) -> list[Foreign]:
    both = [getattr(block, name) for block in visual for name in ATTENTIONS]
    return both + [block.self_attention for block in text]


def _processor_of(attention: Foreign) -> object | None:
    """The attention's processor where it is the one that diffusers gives it, or None."""
    processor = attention.processor
    return processor if type(processor) is attention._default_processor_cls else None


def _parts(
    model: Foreign, visual: list[Foreign], text: list[Foreign]
) -> Iterator[tuple[nn.Module, type | None]]:
    """The modules that a pass calls with other arguments or does not call at all, as `changed`
    takes them. Blocks and attentions may be watched by hooks, so only their class counts."""
    for module in (model.text_rope_embeddings, model.visual_rope_embeddings, model.out_layer):
        yield module, None
    yield model.out_layer.norm, nn.LayerNorm
    for block in (*visual, *text):
        if not accelerated(block):
            yield block, None  # a module of another class, which `changed` names
            return
        for name in NORMS:
            if hasattr(block, name):
                yield getattr(block, name), nn.LayerNorm
        for name in ATTENTIONS:
            attention = getattr(block, name, None)
            if attention is None:
                continue
            if not accelerated(attention):
                yield attention, None
                return
            yield attention.query_norm, None
            yield attention.key_norm, None


def _window(model: Foreign, sparse: dict) -> tuple[int | None, ...]:
    """The local window of NABLA in tiles, (T, Y, X)."""
    return tuple(
        sparse.get(name, getattr(model.config, f"attention_{name}")) for name in ("wT", "wH", "wW")
    )


def _nabla_of(
    model: Foreign,
    grid: geometry.Grid,
    sparse: dict,
    device: torch.device,
) -> dict:
    """What visual blocks get as `sparse_params`: the fields of `nabla.Nabla` but the rotary, in a
    dict because hooks that move arguments to another device look into dicts."""
    window: tuple | None = _window(model, sparse)
    if sparse.get("sta_mask") is None and None in _window(model, sparse):
        window = None
    return {
        "block_offsets": geometry.block_offsets(grid, device),
        "tiles": grid.tiles,
        "window": window,
        "keep_mass": sparse["P"],
    }


def _vectors(
    modulation: Foreign,
    time: Tensor,
    batch: int,
    count: int,
) -> tuple[Tensor, ...]:
    """`count` modulation vectors [B, C] in fp32: shift, scale and gate of each part."""
    return modulation(time).float().expand(batch, -1).chunk(count, -1)


FORWARDS = {
    "Kandinsky5Transformer3DModel": transformer,
    VISUAL_BLOCK: visual_block,
    TEXT_BLOCK: text_block,
    "Kandinsky5Attention": attention,
    "Kandinsky5OutLayer": out_layer,
    "Kandinsky5RoPE1D": text_positions,
    "Kandinsky5RoPE3D": visual_positions,
    "RMSNorm": head_norm,
}


def obstacle(model: Foreign) -> str | None:
    """Why nothing of this transformer would run faster, or None."""
    dims = model.config.axes_dims
    pairs = sum(dim // 2 for dim in dims)
    if pairs not in (1, sum(dims) // 2):
        return (
            f"its axes {tuple(dims)} have {pairs} frequencies for {sum(dims) // 2} pairs of a head"
        )
    if tuple(model.config.patch_size) != (1, 2, 2):
        return f"its patches are {tuple(model.config.patch_size)} and not (1, 2, 2)"
    return None
