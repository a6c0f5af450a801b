# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ComfyUI's Kandinsky 5: modules with its names, called as it calls them, and the
little of its patcher that nodes use.

The arithmetic is that of the model in its plainest form. What is ComfyUI's is the convention: names
of modules, `transformer_options`, `patches_replace`, rotation as 2 x 2 matrices, wrappers around
the network.
"""

import math
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F


def turned(x, matrices):
    """x [B, S, H, D], matrices [1, S, 1, D / 2, 2, 2]."""
    pairs = x.to(matrices.dtype).unflatten(-1, (-1, 2))
    return (matrices @ pairs[..., None]).flatten(-3).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        for name in ("to_query", "to_key", "to_value", "out_layer"):
            self.add_module(name, nn.Linear(dim, dim))
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1))

    def mix(self, query, key, value):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return self.out_layer(out.transpose(1, 2).flatten(-2))

    def forward(self, x, freqs, transformer_options={}):  # noqa: B006 - ComfyUI's signature
        query = turned(self.query_norm(self.heads(self.to_query(x))), freqs)
        key = turned(self.key_norm(self.heads(self.to_key(x))), freqs)
        return self.mix(query, key, self.heads(self.to_value(x)))


class CrossAttention(SelfAttention):
    def forward(self, x, context, transformer_options={}):  # noqa: B006
        return self.mix(
            self.query_norm(self.heads(self.to_query(x))),
            self.key_norm(self.heads(self.to_key(context))),
            self.heads(self.to_value(context)),
        )


class Stack(nn.Module):
    """Layers called in_layer and out_layer, with something between."""

    def __init__(self, sizes, between, bias=True):
        super().__init__()
        self.between = between
        self.in_layer = nn.Linear(*sizes[:2], bias=bias)
        self.out_layer = nn.Linear(*sizes[1:], bias=bias)

    def forward(self, x):
        return self.out_layer(self.between(self.in_layer(x)))


class Modulation(nn.Module):
    def __init__(self, time_dim, outputs):
        super().__init__()
        self.out_layer = nn.Linear(time_dim, outputs)

    def forward(self, time):
        return self.out_layer(F.silu(time))


def vectors(modulation, time, count):
    return [vector[:, None] for vector in modulation(time).chunk(count, -1)]


def normed(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class TextBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, 6 * config.model_dim)
        self.self_attention = SelfAttention(config.model_dim, config.head_dim)
        self.feed_forward = Stack(
            (config.model_dim, config.ff_dim, config.model_dim), F.gelu, bias=False
        )

    def forward(self, x, time_embed, freqs, transformer_options={}):  # noqa: B006
        shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors(
            self.text_modulation, time_embed, 6
        )
        x = x + gate * self.self_attention(
            normed(x, shift, scale), freqs, transformer_options=transformer_options
        )
        return x + gate_ff * self.feed_forward(normed(x, shift_ff, scale_ff))


class VisualBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, 9 * config.model_dim)
        self.self_attention = SelfAttention(config.model_dim, config.head_dim)
        self.cross_attention = CrossAttention(config.model_dim, config.head_dim)
        self.feed_forward = Stack(
            (config.model_dim, config.ff_dim, config.model_dim), F.gelu, bias=False
        )

    def forward(self, visual_embed, text_embed, time_embed, freqs, transformer_options={}):  # noqa: B006
        shift, scale, gate, *others, shift_ff, scale_ff, gate_ff = vectors(
            self.visual_modulation, time_embed, 9
        )
        x = visual_embed + gate * self.self_attention(
            normed(visual_embed, shift, scale), freqs, transformer_options=transformer_options
        )
        x = x + others[2] * self.cross_attention(
            normed(x, *others[:2]), text_embed, transformer_options=transformer_options
        )
        return x + gate_ff * self.feed_forward(normed(x, shift_ff, scale_ff))


class Embedding(nn.Module):
    def __init__(self, inputs, outputs, norm=True):
        super().__init__()
        self.in_layer = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs) if norm else None

    def forward(self, x):
        return self.norm(self.in_layer(x)) if self.norm else self.in_layer(x)


class OutLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.modulation = Modulation(config.time_dim, 2 * config.model_dim)
        self.out_layer = nn.Linear(config.model_dim, 4 * config.out_visual_dim)

    def forward(self, x, time_embed):
        shift, scale = (vector[:, None, None] for vector in vectors(self.modulation, time_embed, 2))
        return rearrange(
            self.out_layer(normed(x, shift, scale)),
            "b t y x (c p q) -> b c t (y p) (x q)",
            p=2,
            q=2,
        )


class Kandinsky5(nn.Module):
    """Velocity [B, C, T, H, W] of x [B, in_channels, T, H, W], or [B, C, H, W] of pictures."""

    def __init__(self, config, scale=(1.0, 2.0, 2.0)):
        super().__init__()
        self.config = config
        self.scale = scale
        self.model_dim = config.model_dim
        self.patch_size = config.patch_size
        self.time_embeddings = Stack((config.model_dim, config.time_dim, config.time_dim), F.silu)
        self.text_embeddings = Embedding(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = Embedding(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = Embedding(4 * config.in_channels, config.model_dim, norm=False)
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(config) for _ in range(config.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(config) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(config)

    @staticmethod
    def matrices(positions, axes, scale):
        """[1, S, 1, D / 2, 2, 2] in fp32, of positions [S, axes]."""
        ladders = [
            torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
            for dim in axes
        ]
        angles = torch.cat(
            [(positions[:, i, None] / scale[i]) * ladder for i, ladder in enumerate(ladders)], -1
        )
        rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(
            -1, (2, 2)
        )
        return rows.float()[None, :, None]

    def forward_orig(self, x, timestep, context, y, freqs, freqs_text, transformer_options):
        half = self.model_dim // 2
        angles = timestep.float()[:, None] * torch.exp(
            -math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half
        )
        time = self.time_embeddings(
            torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        ) + self.pooled_text_embeddings(y)
        context = self.text_embeddings(context)
        for block in self.text_transformer_blocks:
            context = block(context, time, freqs_text, transformer_options=transformer_options)
        tokens = self.visual_embeddings(
            rearrange(x, "b c t (y p) (x q) -> b t y x (p q c)", p=2, q=2)
        )
        shape = tokens.shape[:-1]
        tokens = tokens.flatten(1, -2)
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        transformer_options["total_blocks"] = len(self.visual_transformer_blocks)
        transformer_options["block_type"] = "double"
        for i, block in enumerate(self.visual_transformer_blocks):
            transformer_options["block_index"] = i
            if ("double_block", i) in replaced:

                def original(args, block=block):
                    return block(
                        x=args["x"],
                        context=args["context"],
                        time_embed=args["time_embed"],
                        freqs=args["freqs"],
                        transformer_options=args.get("transformer_options"),
                    )

                args = {
                    "x": tokens,
                    "context": context,
                    "time_embed": time,
                    "freqs": freqs,
                    "transformer_options": transformer_options,
                }
                tokens = replaced["double_block", i](args, {"original_block": original})["x"]
            else:
                tokens = block(
                    tokens, context, time, freqs=freqs, transformer_options=transformer_options
                )
        return self.out_layer(tokens.reshape(*shape, -1), time)

    def inner(self, x, timestep, context, y, transformer_options={}, **_):  # noqa: B006
        picture = x.dim() == 4
        x = x[:, :, None] if x.dim() == 4 else x
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2, 0, 0))
        T = x.shape[2]
        rows = -(-height // 2)
        columns = -(-width // 2)
        positions = torch.cartesian_prod(
            *(torch.arange(n, dtype=torch.float64) for n in (T, rows, columns))
        )
        freqs = self.matrices(positions, self.config.axes_dims, self.scale)
        line = self.matrices(
            torch.arange(context.shape[1], dtype=torch.float64)[:, None],
            (self.config.head_dim,),
            (1.0,),
        )
        out = self.forward_orig(x, timestep, context, y, freqs, line, transformer_options)
        return out[:, :, 0] if picture else out

    def forward(self, x, timestep, context, y, transformer_options={}, **kwargs):  # noqa: B006
        wrappers = [
            one
            for some in transformer_options.get("wrappers", {}).get("diffusion_model", {}).values()
            for one in some
        ]
        return Executor(self, wrappers)(
            x, timestep, context, y, transformer_options=transformer_options, **kwargs
        )


class Executor:
    """The next wrapper, or in the end the network."""

    def __init__(self, network, wrappers):
        self.class_obj = network
        self.wrappers = wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.class_obj.inner(*args, **kwargs)
        return self.wrappers[0](Executor(self.class_obj, self.wrappers[1:]), *args, **kwargs)


class ModelPatcher:
    """ComfyUI's MODEL: a network that clones share, and options that they do not."""

    def __init__(self, network):
        self.model = SimpleNamespace(diffusion_model=network)
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        other = ModelPatcher(self.model.diffusion_model)
        other.model_options = {
            "transformer_options": dict(self.model_options["transformer_options"])
        }
        other.wrappers = {
            kind: {key: list(some) for key, some in keyed.items()}
            for kind, keyed in self.wrappers.items()
        }
        return other

    def get_model_object(self, name):
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def __call__(self, *inputs, **options):
        """One evaluation by a sampler."""
        with torch.inference_mode():
            return self.model.diffusion_model(
                *inputs,
                transformer_options={
                    **self.model_options["transformer_options"],
                    "wrappers": self.wrappers,
                    **options,
                },
            )
