# SPDX-License-Identifier: Apache-2.0
"""The transformer prepared for inference: one product for queries, keys and values, a bound of the
logits that is true and stays true, modulations of all steps at once."""

import copy
import math

import pytest
import torch

from kandinsky_model.checkpoints.load import load_dit, save_dit
from kandinsky_model.dit import nabla
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


def prepared():
    attention = build().visual_transformer_blocks[0].self_attention
    attention.prepare()
    return attention


def largest_logit(attention, query, key):
    """max |query . key| / sqrt(D) of heads [1, S, 1, D] at every pair of places of a layout."""
    layout = make_layout(CONFIG, Grid(6, 8, 8), (1.0, 1.0, 1.0))
    tokens = layout.grid.tokens
    query = attention.query_norm(query.expand(1, tokens, 1, -1), layout.rotary)[0, :, 0]
    key = attention.key_norm(key.expand(1, tokens, 1, -1), layout.rotary)[0, :, 0]
    return ((query @ key.mT).abs().max() / math.sqrt(attention.head_dim)).item()


def unit(channel):
    x = torch.zeros(CONFIG.head_dim)
    x[channel] = 1.0
    return x


@pytest.mark.parametrize("query, key", [(0, 0), (0, 1), (17, 16), (40, 41)])
def test_a_bound_is_reached_by_channels_of_one_pair(query, key):
    """Rotation brings the larger channel of a query's pair onto that of the key's, so no smaller
    bound is true."""
    attention = prepared()
    attention.query_norm.weight.fill_(0.01)[query] = 5.0
    attention.key_norm.weight.fill_(0.01)[key] = 7.0
    attention.prepare()
    largest = largest_logit(attention, unit(query), unit(key))
    assert 0.9 * attention.logit_bound < largest <= attention.logit_bound
    assert attention.logit_bound == pytest.approx(1.01 * math.sqrt(CONFIG.head_dim) * 35.0)


def test_a_bound_is_of_pairs_and_not_of_whole_weights():
    """Large weights of queries and of keys in different pairs never meet."""
    attention = prepared()
    attention.query_norm.weight.fill_(1.0)[4] = 50.0
    attention.key_norm.weight.fill_(1.0)[7] = 50.0
    attention.prepare()
    assert attention.logit_bound == pytest.approx(1.01 * math.sqrt(CONFIG.head_dim) * 50.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        query = unit(4) + 0.1 * torch.randn(CONFIG.head_dim, generator=generator)
        key = unit(4) + torch.randn(CONFIG.head_dim, generator=generator)
        assert largest_logit(attention, query, key) <= attention.logit_bound


@torch.no_grad()
def write_in_place(attention):
    attention.query_norm.weight.mul_(3.0)
    return attention


def load_one_norm(attention):
    attention.query_norm.load_state_dict({"weight": 3.0 * attention.query_norm.weight})
    return attention


def load_one_norm_by_assignment(attention):
    attention.query_norm.load_state_dict({"weight": 3.0 * attention.query_norm.weight}, assign=True)
    return attention


def replace_parameter(attention):
    attention.query_norm.weight = torch.nn.Parameter(3.0 * attention.query_norm.weight)
    return attention


def take_an_optimizer_step(attention):
    weight = attention.query_norm.weight.requires_grad_()
    weight.grad = -2.0 * weight.detach()
    torch.optim.SGD([weight], lr=1.0).step()
    return attention


def write_to_a_copy(attention):
    """Whose counters of writes start anew, and here come to where the bound knows them."""
    copied = copy.deepcopy(attention)
    for norm in ("key_norm", "query_norm"):
        original = getattr(attention, norm).weight
        weight = getattr(copied, norm).weight
        assert weight._version < original._version
        while weight._version < original._version:
            weight.mul_(9.0 if norm == "query_norm" else 1.0)
    return copied


def change_what_cannot_be_joined(attention):
    """Moves and casts work the bound out again, whether or not the projections were joined."""
    attention.to_key = torch.nn.Identity()
    attention.prepare()
    return attention._apply(lambda x: 3.0 * x if x.shape == (CONFIG.head_dim,) else x)


@pytest.mark.parametrize(
    "change, factor",
    [
        (write_in_place, 3),
        (load_one_norm, 3),
        (load_one_norm_by_assignment, 3),
        (replace_parameter, 3),
        (take_an_optimizer_step, 3),
        (write_to_a_copy, 9),
        (change_what_cannot_be_joined, 9),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_bound_follows_the_weights_of_the_norms(change, factor):
    attention = prepared()
    before = attention.logit_bound
    changed = change(attention)
    assert changed.logit_bound == pytest.approx(factor * before)


def test_a_stale_bound_reaches_no_kernel(monkeypatch):
    """What attention hands to the operator is the bound of the weights as they are."""
    handed = []
    attend = nabla.block_sparse_attention

    def seen(*args, logit_bound):
        handed.append(logit_bound)
        return attend(*args, logit_bound=logit_bound)

    monkeypatch.setattr(nabla, "block_sparse_attention", seen)
    grid = Grid(1, 8, 8)
    dit = build().prepare()
    layout = make_layout(CONFIG, grid, SCALE, MODES["nabla"])
    dit(*inputs(CONFIG, grid), layout)
    for block in dit.visual_transformer_blocks:
        block.self_attention.key_norm.weight.mul_(2.0)
    dit(*inputs(CONFIG, grid), layout)
    before = handed[: CONFIG.num_visual_blocks]
    after = handed[CONFIG.num_visual_blocks :]
    assert after == pytest.approx([2.0 * bound for bound in before])


def test_moving_weights_elsewhere_keeps_a_bound():
    """Offloading points tensors at other memory in every pass: nothing is read again for it."""
    attention = prepared()
    bound = attention._bound
    attention.key_norm.weight.data = attention.key_norm.weight.data.clone()
    assert attention.logit_bound == bound.value
    assert attention._bound is bound


def test_there_is_no_bound_where_none_is_sure():
    with torch.inference_mode():
        attention = build().visual_transformer_blocks[0].self_attention
        attention.prepare()
    assert attention.logit_bound == math.inf  # writes to its weights are not counted
    attention = prepared()
    attention.key_norm.weight[3] = math.nan
    assert attention.logit_bound == math.inf
    attention = prepared().to("meta")
    assert attention.logit_bound == math.inf


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
