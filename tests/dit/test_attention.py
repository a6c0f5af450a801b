# SPDX-License-Identifier: Apache-2.0
"""The transformer prepared for inference: one product for queries, keys and values, bounded logits,
modulations of all steps at once."""

import math

import pytest
import torch

from kandinsky_model.checkpoints.load import load_dit, save_dit
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout

from .test_transformer import CONFIG, MODES, SCALE, build, inputs, rel_l2


@pytest.mark.parametrize("mode", MODES)
def test_prepared_network_is_the_same_function(mode):
    """One product for queries, keys and values, and all steps' modulations at once."""
    grid = Grid(2, 10, 12)
    plain = build()
    data = inputs(CONFIG, grid, 2)
    layout = make_layout(CONFIG, grid, SCALE, MODES[mode])
    dit = build().prepare()
    attentions = [block.self_attention for block in dit.visual_transformer_blocks]
    assert all(
        a._is_joint() and a.to_key.weight.data_ptr() == a._joint[0].weight[128:].data_ptr()
        for a in attentions
    )
    assert rel_l2(dit(*data, layout), plain(*data, layout)) <= 1e-6
    times = torch.stack([data[3] - 100, data[3]])
    steps = dit.modulate(times, data[2])
    for time, step in zip(times, (steps.step(0), steps.step(1)), strict=True):
        wanted = plain(*data[:3], time, layout)
        out = dit(*data[:3], time, layout, None, step)
        assert rel_l2(out, wanted) <= 1e-6
    assert rel_l2(dit(*data, layout, None, steps.step(0)), plain(*data, layout)) > 1e-3


def test_logits_stay_below_their_bound():
    dit = build().prepare()
    grid = Grid(1, 8, 8)
    attention = dit.visual_transformer_blocks[0].self_attention
    layout = make_layout(CONFIG, grid, SCALE)
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(2))
    query, key, _ = attention.project(x)
    query = attention.query_norm(query, layout.rotary)
    key = attention.key_norm(key, layout.rotary)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(attention.head_dim)
    assert 0.1 * attention.logit_bound < logits.abs().max() < attention.logit_bound < math.inf


@pytest.mark.parametrize(
    "undo",
    [
        lambda a: a.load_state_dict(a.state_dict()),
        lambda a: a.train(),
        lambda a: setattr(a, "to_key", torch.nn.Identity()),
        lambda a: setattr(a.to_key.weight, "data", a.to_key.weight.data + 1),
        lambda a: a.requires_grad_(),
    ],
    ids=["loaded", "training", "adapter", "merged", "gradients"],
)
def test_projections_stay_apart_where_they_must(undo):
    attention = build().prepare().visual_transformer_blocks[0].self_attention
    assert attention._is_joint()
    undo(attention)
    assert not attention._is_joint()


def test_projections_are_joined_again_after_a_move():
    dit = build().prepare()
    attention = dit.visual_transformer_blocks[1].self_attention
    state = {name: tensor.double() for name, tensor in dit.state_dict().items()}
    dit.double()
    assert attention._is_joint()
    assert attention._joint[0].weight.dtype == torch.float64
    assert attention.logit_bound < math.inf
    assert all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())


def test_prepared_weights_are_saved_as_before(tmp_path):
    plain = build()
    save_dit(build().prepare(), tmp_path)
    loaded = load_dit(tmp_path).state_dict()
    assert loaded.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded[name], x) for name, x in plain.state_dict().items())
