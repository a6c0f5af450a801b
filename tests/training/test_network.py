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

GRID, CPU = Grid(3, 9, 8), torch.device("cpu")
WAYS = {
    "everything kept": Computation(checkpoint=False),
    "blocks again": Computation(),
    "few tokens at a time": Computation(tokens=100),
    "inputs in host memory": Computation(host=True, tokens=100),
    "one block resident": Computation(resident=1, tokens=100),
    "all streamed": Computation(host=True, resident=0),
}


def trained(way=WAYS["everything kept"], targets=TARGETS):
    """A network with an adapter whose second matrices are not zero, so that gradients reach the
    first ones."""
    network = TrainNetwork(build().prepare(), CPU, way)
    parameters, g = (
        attach(network.dit, LoRAConfig(4, 6.0, targets), 0, CPU),
        torch.Generator().manual_seed(3),
    )
    for name, parameter in parameters.items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) / 12
    return network, parameters


def gradients(network, parameters, plan, batch=1, lengths=None):
    """(velocity, gradients of its mean square) on the inputs of the tests of the transformer."""
    out = network(*inputs(CONFIG, GRID, batch, seed=SEED_WITHOUT_FLIPS), plan, lengths)
    out.square().mean().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return out.detach(), found


def plain_gradients(state, made, scale, nabla, dtype):
    """The same by `plain_forward`, with the adapter added to the weights."""
    made = {name: matrix.detach().to(dtype).requires_grad_() for name, matrix in made.items()}
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for module in {name.rsplit(".lora_", 1)[0] for name in made}:
        state[f"{module}.weight"] = (
            state[f"{module}.weight"]
            + scale * made[f"{module}.lora_B.weight"] @ made[f"{module}.lora_A.weight"]
        )
    data = (x.to(dtype) for x in inputs(CONFIG, GRID, seed=SEED_WITHOUT_FLIPS))
    out = plain_forward(state, CONFIG, *data, SCALE, nabla)[0]
    out.square().mean().backward()
    return {name: matrix.grad for name, matrix in made.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "way", [WAYS["everything kept"], WAYS["few tokens at a time"]], ids=["kept", "again"]
)
def test_gradients_of_an_adapter_are_right(mode, way):
    network, parameters = trained(way=way)
    _, ours = gradients(network, parameters, make_layout(CONFIG, GRID, SCALE, MODES[mode]))
    state = build().state_dict()
    exact, peer = (
        plain_gradients(state, parameters, 1.5, MODES[mode], dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert len(ours) == 2 * (3 * 10 + 2 * 6)
    for name in ours:
        assert exact[name].any()
    for half in "AB":
        ours_, exact_, peer_ = (
            torch.cat([found[name].flatten() for name in sorted(found) if f"lora_{half}" in name])
            for found in (ours, exact, peer)
        )
        assert_faithful(ours_, exact_, peer_)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in WAYS if name != "everything kept"])
def test_ways_give_the_same_gradients(mode, name):
    """A batch of two prompts of different lengths; twice, because buffers are used again."""
    plan, lengths = make_layout(CONFIG, GRID, SCALE, MODES[mode]), torch.tensor([4, 11])
    out, wanted = gradients(*trained(), plan, 2, lengths)
    network, parameters = trained(way=WAYS[name])
    for _ in range(2):
        again, found = gradients(network, parameters, plan, 2, lengths)
        assert rel_l2(again, out) <= 1e-6
        for key in wanted:
            assert rel_l2(found[key], wanted[key]) <= 1e-5, key


def test_chunks_of_the_plan_are_left_alone_while_an_adapter_trains():
    """Neither the first block's input and text nor its weights need a gradient, only the adapter
    does: it must not be done piece by piece, in place."""
    plans = [
        make_layout(CONFIG, GRID, SCALE, chunks=Chunks(tokens=tokens)) for tokens in (10**6, 50)
    ]
    (_, wanted), (_, found) = (
        gradients(*trained(targets=["visual_transformer_blocks.0.self_attention.to_query"]), plan)
        for plan in plans
    )
    assert all(rel_l2(found[key], wanted[key]) <= 1e-6 for key in wanted)


@pytest.mark.parametrize("way", [Computation(), Computation(tokens=100)], ids=["whole", "parts"])
def test_gradients_of_all_weights_do_not_depend_on_the_way(way):
    plan = make_layout(CONFIG, GRID, SCALE, MODES["nabla"])
    found = []
    for one in (Computation(checkpoint=False), way):
        dit = build().requires_grad_(True).train()
        found.append(gradients(TrainNetwork(dit, CPU, one), dict(dit.named_parameters()), plan)[1])
    for key in found[0]:
        assert rel_l2(found[1][key], found[0][key]) <= 1e-5, key


def test_sixteen_bit_activations_on_full_weights():
    dit = build().requires_grad_(True).train()
    dit.compute_dtype = torch.bfloat16
    plan = make_layout(CONFIG, GRID, SCALE)
    out, found = gradients(TrainNetwork(dit, CPU), dict(dit.named_parameters()), plan)
    wide = build()(*inputs(CONFIG, GRID, seed=SEED_WITHOUT_FLIPS), plan)
    assert out.dtype == torch.bfloat16 and 1e-4 < rel_l2(out, wide) < 3e-2
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_targets_are_the_official_ones():
    """The published adapter of Pro, of rank 128 in 16 bits, has 1.71 GB: text blocks have one
    too."""
    layers = targeted(empty_dit(PRO_DIT), TARGETS)
    size = sum(2 * 128 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert len(layers) == 60 * 10 + 4 * 6 and round(size / 1e9, 2) == 1.71
    assert set(targeted(empty_dit(LITE_DIT), ["cross_attention.to_query"])) == {
        f"visual_transformer_blocks.{i}.cross_attention.to_query" for i in range(32)
    }
    with pytest.raises(ValueError, match="got 'to_nothing', which is none's"):
        targeted(empty_dit(LITE_DIT), ["to_nothing"])


def test_the_adapter_can_be_switched_off():
    network, _ = trained()
    plan, data = make_layout(CONFIG, GRID, SCALE), inputs(CONFIG, GRID)
    with torch.no_grad():
        with_it = network(*data, plan)
        with switched_off(network.dit):
            without = network(*data, plan)
        assert rel_l2(without, build()(*data, plan)) <= 1e-6 and rel_l2(with_it, without) > 1e-2
        assert torch.equal(network(*data, plan), with_it)
