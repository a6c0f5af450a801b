# SPDX-License-Identifier: Apache-2.0
"""Gradients of training: those of adapters and of whole networks against a plain rewriting in fp64,
however a pass is computed."""

import pytest
import torch

from kandinsky_model.checkpoints.load import empty_dit
from kandinsky_model.config import LITE_DIT, PRO_DIT
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import Chunks, make_layout
from kandinsky_model.training.adapters import attach, switched_off, targeted
from kandinsky_model.training.config import TARGETS, LoRAConfig
from kandinsky_model.training.network import Computation, TrainNetwork

from ..compare import assert_faithful
from ..dit.test_transformer import CONFIG, MODES, SCALE, SEED_WITHOUT_FLIPS, build, inputs, rel_l2
from ..support.plain_dit import plain_forward

GRID = Grid(3, 9, 8)
CPU = torch.device("cpu")
KEPT = Computation(checkpoint=False)
WAYS = {
    "blocks again": Computation(),
    "few tokens at a time": Computation(tokens=100),
    "inputs in host memory": Computation(host=True, tokens=100),
    "one block resident": Computation(resident=1, tokens=100),
    "all streamed": Computation(host=True, resident=0),
}


def trained(computation=KEPT, targets=TARGETS):
    """A network with an adapter whose matrices B are not zero, so that gradients reach A."""
    network = TrainNetwork(build().prepare(), CPU, computation)
    parameters = attach(network.dit, LoRAConfig(4, 6.0, targets), 0, CPU)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 12
    return network, parameters


def gradients(network, parameters, layout, batch=1, lengths=None):
    """(velocity, gradients of its mean square) on the inputs of the tests of the transformer."""
    out = network(
        *inputs(
            CONFIG,
            GRID,
            batch,
            seed=SEED_WITHOUT_FLIPS,
        ),
        layout,
        lengths,
    )
    out.square().mean().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return out.detach(), found


def plain_gradients(state, parameters, scale, nabla, dtype):
    """The same by `plain_forward`, with the adapter added to the weights."""
    matrices = {name: p.detach().to(dtype).requires_grad_() for name, p in parameters.items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for module in {name.rsplit(".lora_", 1)[0] for name in matrices}:
        a = matrices[f"{module}.lora_A.weight"]
        b = matrices[f"{module}.lora_B.weight"]
        state[f"{module}.weight"] = state[f"{module}.weight"] + scale * b @ a
    read = (x.to(dtype) for x in inputs(CONFIG, GRID, seed=SEED_WITHOUT_FLIPS))
    out = plain_forward(state, CONFIG, *read, SCALE, nabla)[0]
    out.square().mean().backward()
    return {name: matrix.grad for name, matrix in matrices.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [KEPT, WAYS["few tokens at a time"]], ids=["kept", "again"])
def test_gradients_of_an_adapter_are_right(mode, way):
    """Law 1, with the plain rewriting in fp64 for oracle and in fp32 for peer."""
    network, parameters = trained(way)
    _, ours = gradients(
        network,
        parameters,
        make_layout(
            CONFIG,
            GRID,
            SCALE,
            MODES[mode],
        ),
    )
    state = build().state_dict()
    exact, peer = (
        plain_gradients(state, parameters, 1.5, MODES[mode], dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert len(ours) == 2 * (3 * 10 + 2 * 6)
    assert all(exact[name].any() for name in ours)
    for half in ("lora_A", "lora_B"):
        names = sorted(name for name in ours if half in name)
        flat = [torch.cat([found[n].flatten() for n in names]) for found in (ours, exact, peer)]
        assert_faithful(*flat)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WAYS)
def test_ways_give_the_same_gradients(mode, name):
    """A batch of two prompts of different lengths; twice, because buffers are used again."""
    layout = make_layout(CONFIG, GRID, SCALE, MODES[mode])
    lengths = torch.tensor([4, 11])
    out, wanted = gradients(*trained(), layout, 2, lengths)
    network, parameters = trained(WAYS[name])
    for _ in range(2):
        again, found = gradients(network, parameters, layout, 2, lengths)
        assert rel_l2(again, out) <= 1e-6
        for key in wanted:
            assert rel_l2(found[key], wanted[key]) <= 1e-5, key


def test_chunks_of_the_layout_are_left_alone_while_an_adapter_trains():
    """Neither the first block's input and text nor its weights need a gradient, only the adapter
    does: the block must not be computed piece by piece, in place."""
    targets = ["visual_transformer_blocks.0.self_attention.to_query"]
    wanted, found = (
        gradients(
            *trained(targets=targets),
            make_layout(
                CONFIG,
                GRID,
                SCALE,
                chunks=chunks,
            ),
        )[1]
        for chunks in (Chunks(tokens=10**6), Chunks(tokens=50))
    )
    assert all(rel_l2(found[key], wanted[key]) <= 1e-6 for key in wanted)


@pytest.mark.parametrize("way", [Computation(), Computation(tokens=100)], ids=["whole", "parts"])
def test_gradients_of_all_weights_do_not_depend_on_the_way(way):
    layout = make_layout(CONFIG, GRID, SCALE, MODES["nabla"])

    def found(computation):
        dit = build().requires_grad_(True).train()
        network = TrainNetwork(dit, CPU, computation)
        return gradients(network, dict(dit.named_parameters()), layout)[1]

    wanted = found(KEPT)
    actual = found(way)
    for key in wanted:
        assert rel_l2(actual[key], wanted[key]) <= 1e-5, key


def test_sixteen_bit_activations_on_full_weights():
    dit = build().requires_grad_(True).train()
    dit.compute_dtype = torch.bfloat16
    layout = make_layout(CONFIG, GRID, SCALE)
    out, found = gradients(TrainNetwork(dit, CPU), dict(dit.named_parameters()), layout)
    wide = build()(*inputs(CONFIG, GRID, seed=SEED_WITHOUT_FLIPS), layout)
    assert out.dtype == torch.bfloat16
    assert 1e-4 < rel_l2(out, wide) < 3e-2
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_targets_are_the_published_ones():
    """The published adapter of Pro, of rank 128 in 16 bits, has 1.71 GB: text blocks have one
    too."""
    layers = targeted(empty_dit(PRO_DIT), TARGETS)
    size = sum(2 * 128 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert len(layers) == 60 * 10 + 4 * 6
    assert round(size / 1e9, 2) == 1.71
    lite = empty_dit(LITE_DIT)
    name = "cross_attention.to_query"
    wanted = {f"visual_transformer_blocks.{i}.{name}" for i in range(32)}
    assert set(targeted(lite, [name])) == wanted
    with pytest.raises(ValueError, match="got 'to_nothing', which is none's"):
        targeted(lite, ["to_nothing"])


def test_the_adapter_can_be_switched_off():
    network, _ = trained()
    layout = make_layout(CONFIG, GRID, SCALE)
    read = inputs(CONFIG, GRID)
    with torch.no_grad():
        adapted = network(*read, layout)
        with switched_off(network.dit):
            without = network(*read, layout)
        assert rel_l2(without, build()(*read, layout)) <= 1e-6
        assert rel_l2(adapted, without) > 1e-2
        assert torch.equal(network(*read, layout), adapted)
