# SPDX-License-Identifier: Apache-2.0
"""The transformer once more, as one plain function of a state dict: no fusion, no kernels, dense
masks, any dtype.

It returns the stream after every block, so a test can tell where two implementations part ways. In
fp64 it is the oracle.
"""

import math

import torch
from einops import rearrange
from torch.nn import functional as F

from kandinsky_model.config import DiTConfig, NablaConfig
from kandinsky_model.dit.geometry import Grid, local_window


def random_state(config: DiTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter random, modulations too: freshly built ones are zero and would gate every
    block off."""
    from kandinsky_model.dit.transformer import DiffusionTransformer3D

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in DiffusionTransformer3D(config).state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        is_norm = name.endswith("norm.weight")
        spread = 0.2 if tensor.dim() == 1 else tensor.shape[1] ** -0.5
        state[name] = value * spread + (1.0 if is_norm else 0.0)
    return state


def plain_forward(
    state,
    config: DiTConfig,
    x,
    text,
    pooled,
    time,
    scale_factor,
    nabla: NablaConfig | None = None,
    before_linear=lambda name, y: y,
):
    """Returns (velocity, [text after each text block], [tokens in raster order after each visual
    block]).

    before_linear(name, y): what the linear layer of that name gets in place of y.
    """

    def linear(name, y):
        return F.linear(before_linear(name, y), state[f"{name}.weight"], state.get(f"{name}.bias"))

    def affine(name, y):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def vectors(name, time, count):
        return [part[:, None] for part in linear(name, F.silu(time)).chunk(count, -1)]

    def norm(y, shift, scale):
        return F.layer_norm(y, y.shape[-1:]) * (1 + scale) + shift

    def head_norm(name, y):
        return y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 2.0**-23) * state[f"{name}.weight"]

    def attention(name, y, context, angles=None, keep=None):
        query, key, value = (
            rearrange(linear(f"{name}.{part}", z), "b s (h d) -> b h s d", d=config.head_dim)
            for part, z in (("to_query", y), ("to_key", context), ("to_value", context))
        )
        query, key = head_norm(f"{name}.query_norm", query), head_norm(f"{name}.key_norm", key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        logits = query @ key.mT / math.sqrt(config.head_dim)
        if keep is not None:
            logits = logits.masked_fill(~keep(query, key), -math.inf)
        return linear(
            f"{name}.out_layer", rearrange(logits.softmax(-1) @ value, "b h s d -> b s (h d)")
        )

    def feed_forward(name, y):
        return linear(f"{name}.out_layer", F.gelu(linear(f"{name}.in_layer", y)))

    o, p, q = config.patch_size
    grid = Grid(x.shape[1] // o, x.shape[2] // p, x.shape[3] // q)
    half = config.model_dim // 2
    ladder = time[:, None] * ladder_of(half, x.dtype)
    time = linear("time_embeddings.in_layer", torch.cat([ladder.cos(), ladder.sin()], -1))
    time = linear("time_embeddings.out_layer", F.silu(time))
    time = time + affine(
        "pooled_text_embeddings.norm", linear("pooled_text_embeddings.in_layer", pooled)
    )
    text = affine("text_embeddings.norm", linear("text_embeddings.in_layer", text))
    texts, streams = [], []
    for i in range(config.num_text_blocks):
        name, angles = (
            f"text_transformer_blocks.{i}",
            line_angles(text.shape[1], config.head_dim, x.dtype),
        )
        shift, scale, gate, shift2, scale2, gate2 = vectors(
            f"{name}.text_modulation.out_layer", time, 6
        )
        y = norm(text, shift, scale)
        text = text + gate * attention(f"{name}.self_attention", y, y, angles)
        text = text + gate2 * feed_forward(f"{name}.feed_forward", norm(text, shift2, scale2))
        texts.append(text)
    keep = None if nabla is None else lambda query, key: nabla_mask(query, key, grid, nabla)
    angles = grid_angles(grid, config.axes_dims, scale_factor, x.dtype)
    stream = linear(
        "visual_embeddings.in_layer",
        rearrange(x, "b (t o) (y p) (x q) c -> b (t y x) (o p q c)", o=o, p=p, q=q),
    )
    for i in range(config.num_visual_blocks):
        name = f"visual_transformer_blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2, shift3, scale3, gate3 = vectors(
            f"{name}.visual_modulation.out_layer", time, 9
        )
        y = norm(stream, shift, scale)
        stream = stream + gate * attention(f"{name}.self_attention", y, y, angles, keep)
        stream = stream + gate2 * attention(
            f"{name}.cross_attention", norm(stream, shift2, scale2), text
        )
        stream = stream + gate3 * feed_forward(f"{name}.feed_forward", norm(stream, shift3, scale3))
        streams.append(stream)
    shift, scale = vectors("out_layer.modulation.out_layer", time, 2)
    out = linear("out_layer.out_layer", norm(stream, shift, scale))
    out = rearrange(
        out,
        "b (t y x) (c o p q) -> b (t o) (y p) (x q) c",
        t=grid.T,
        y=grid.Y,
        x=grid.X,
        o=o,
        p=p,
        q=q,
    )
    return out, texts, streams


def ladder_of(count, dtype):
    return torch.exp(-math.log(10000.0) * torch.arange(count, dtype=dtype) / count)


def line_angles(length, dim, dtype):
    return torch.arange(length, dtype=dtype)[:, None] * ladder_of(dim // 2, dtype)


def grid_angles(grid, axes_dims, scale_factor, dtype):
    t, y, x = (
        line_angles(n, dim, dtype) / scale
        for n, dim, scale in zip((grid.T, grid.Y, grid.X), axes_dims, scale_factor, strict=True)
    )
    return torch.stack(
        [
            torch.cat([t[i], y[j], x[k]])
            for i in range(grid.T)
            for j in range(grid.Y)
            for k in range(grid.X)
        ]
    )


def rotate(y, angles):
    """Adjacent pairs as complex numbers."""
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def tile_of_token(grid):
    """int64 [S]: the tile that each token of the raster belongs to."""
    _, tiles_y, tiles_x = grid.tiles
    return torch.tensor(
        [
            (t * tiles_y + y // 8) * tiles_x + x // 8
            for t in range(grid.T)
            for y in range(grid.Y)
            for x in range(grid.X)
        ]
    )


def nabla_mask(query, key, grid, nabla):
    """bool [B, H, S, S]: sort, cumulate, cut, unite with the window, and blow up to tokens."""
    tile = tile_of_token(grid)
    member = F.one_hot(tile, grid.blocks).to(query.dtype)  # [S, N]
    member = member / member.sum(0)
    logits = (query.mT @ member).mT @ (key.mT @ member) / math.sqrt(query.shape[-1])
    mass, index = logits.softmax(-1).sort(-1)
    kept = (mass.cumsum(-1) >= 1 - nabla.keep_mass).gather(-1, index.argsort(-1))
    kept = kept | local_window(grid.tiles, nabla.window)
    return kept[:, :, tile][..., tile]
