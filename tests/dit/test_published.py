# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and sizes of the released transformers, as published."""

import pytest
import torch

from kandinsky_model.config import (
    IMAGE_DIT,
    IMAGE_EDIT_DIT,
    LITE_DIT,
    PRESETS,
    PRO_DIT,
    DiTConfig,
    get_preset,
)
from kandinsky_model.dit.transformer import DiffusionTransformer3D

PUBLISHED = {  # preset: tensors, parameters, of which modulation, of which time embedding
    "t2v-lite-sft-5s": (814, 2_007_702_848, 277_627_392, 1_180_672),
    "t2v-pro-sft-5s": (1514, 19_311_325_248, 2_376_294_400, 5_244_928),
    "t2i-lite-sft": (1246, 6_022_080_576, 609_361_920, 1_573_888),
    "i2i-lite-sft": (1246, 6_022_254_656, 609_361_920, 1_573_888),
}


def published_shapes(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    d = c.model_dim
    td = c.time_dim
    ff = c.ff_dim
    hd = c.head_dim

    def linear(
        name,
        out,
        inner,
        bias=True,
    ):
        return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})}

    def attention(name):
        shapes = {f"{name}.query_norm.weight": (hd,), f"{name}.key_norm.weight": (hd,)}
        for part in ("to_query", "to_key", "to_value", "out_layer"):
            shapes |= linear(f"{name}.{part}", d, d)
        return shapes

    shapes = linear("time_embeddings.in_layer", td, d) | linear("time_embeddings.out_layer", td, td)
    for name, width, inner in (
        ("text_embeddings", d, c.in_text_dim),
        ("pooled_text_embeddings", td, c.in_text_dim2),
    ):
        shapes |= linear(f"{name}.in_layer", width, inner) | {
            f"{name}.norm.weight": (width,),
            f"{name}.norm.bias": (width,),
        }
    shapes |= linear(
        "visual_embeddings.in_layer", d, 4 * (33 if c.visual_cond or c.instruct_type else 16)
    )
    for kind, count, parts in (
        ("text", c.num_text_blocks, ("self",)),
        ("visual", c.num_visual_blocks, ("self", "cross")),
    ):
        for i in range(count):
            name = f"{kind}_transformer_blocks.{i}"
            shapes |= linear(f"{name}.{kind}_modulation.out_layer", 3 * (len(parts) + 1) * d, td)
            shapes |= linear(f"{name}.feed_forward.in_layer", ff, d, bias=False)
            shapes |= linear(f"{name}.feed_forward.out_layer", d, ff, bias=False)
            for part in parts:
                shapes |= attention(f"{name}.{part}_attention")
    return (
        shapes
        | linear("out_layer.modulation.out_layer", 2 * d, td)
        | linear("out_layer.out_layer", 64, d)
    )


@pytest.mark.parametrize(
    "config",
    sorted({preset.dit for preset in PRESETS.values()}, key=repr),
    ids=lambda c: f"{c.model_dim}",
)
def test_names_and_shapes_are_the_published_ones(config):
    with torch.device("meta"):
        state = DiffusionTransformer3D(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published_shapes(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensor_and_parameter_counts(name):
    with torch.device("meta"):
        state = DiffusionTransformer3D(get_preset(name).dit).state_dict()
    counted = [
        sum(t.numel() for key, t in state.items() if part in key)
        for part in ("", "modulation", "time_embeddings")
    ]
    assert (len(state), *counted) == PUBLISHED[name]


def test_architectures_differ_where_they_should():
    assert (LITE_DIT.num_heads, PRO_DIT.num_heads, IMAGE_DIT.num_heads) == (28, 32, 20)
    assert [config.in_channels for config in (LITE_DIT, PRO_DIT, IMAGE_DIT, IMAGE_EDIT_DIT)] == [
        33,
        33,
        16,
        33,
    ]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="t2v-lite-sft-5s"):
        get_preset("t2v-light-sft-5s")
