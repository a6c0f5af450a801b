# SPDX-License-Identifier: Apache-2.0
"""An accelerated transformer under torch.compile: whole or block by block, as one graph, for sizes
that change, before and after."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kandinsky_model import accelerate
from kandinsky_model.dit.geometry import Grid

from ..support.accelerated import ROUNDING, WHOLE, off, stock, velocity

# that no other dimension equals, which would become part of the graph
SIZES = (Grid(3, 10, 13), Grid(4, 11, 14))
MODES = {"dense": False, "nabla": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(monkeypatch):
    """Not yet accelerated; a single visual block, as compiling takes longer than anything else
    here."""
    model = stock(monkeypatch)
    del model.visual_transformer_blocks[1:]
    return model


@pytest.mark.parametrize("nabla", MODES.values(), ids=MODES)
def test_the_whole_model_is_one_graph(nabla, model):
    """The same graph for all sizes of dense attention; NABLA's counts of tiles are constants of its
    graph, so one size is enough here."""
    accelerate(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in SIZES[:1] if nabla else SIZES:
        assert (
            off(velocity(compiled, grid, nabla=nabla), velocity(model, grid, nabla=nabla))
            <= ROUNDING
        )
    assert counter.frame_count == 1


def test_repeated_blocks_of_changing_size(model):
    accelerate(model)
    wanted = [velocity(model, grid, nabla=True) for grid in SIZES]
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for grid, one in zip(SIZES, wanted, strict=True):
        assert off(velocity(model, grid, nabla=True), one) <= ROUNDING


@pytest.mark.parametrize("order", ["accelerated first", "compiled first"])
def test_repeated_blocks_through_inductor(order, model):
    """By diffusers' own method, which finds blocks by the names of their classes; nothing compiled
    of stock code stays in use."""
    ours = copy.deepcopy(model)
    accelerate(ours)
    wanted = velocity(ours, nabla=True)
    if order == "accelerated first":
        accelerate(model)
        model.compile_repeated_blocks(fullgraph=True)
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        velocity(model)
        accelerate(model)
    assert sum(block._compiled_call_impl is not None for block in model.modules()) == 2
    assert off(velocity(model, nabla=True), wanted) <= ROUNDING


def test_a_compiled_model_can_be_accelerated_and_undone(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wanted = velocity(compiled, WHOLE)
    handle = accelerate(compiled)
    assert 0 < off(velocity(compiled, WHOLE), wanted) <= ROUNDING
    handle.undo()
    assert torch.equal(velocity(compiled, WHOLE), wanted)
