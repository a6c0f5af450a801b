# SPDX-License-Identifier: Apache-2.0
"""The rows of the backward operators.

Every row of an operator that has a gradient is a row of its backward operator too, as a test and as
a benchmark. ``exact`` is PyTorch's derivative of the reference on fp64 inputs, and ``peer`` its
derivative of the peer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cases import BENCHES, CASES, OPERATORS, Case, Operator, as_tuple
from ..peers import head_first

INPUTS = {  # the gradients that a row is about
    "modulated_norm": ("x", "scale", "shift"),
    "gated_add_norm": ("x", "branch", "gate", "scale", "shift"),
    "norm_rope": ("x", "weight"),
    "norm_rope_means": ("x", "weight"),
    "block_sparse_attention": ("query", "key", "value"),
}


def without_gradients(inputs: dict) -> dict:
    """The inputs of the forward pass: all of a row's but ``grad_i``, the gradient of output i."""
    return {name: x for name, x in inputs.items() if not name.startswith("grad_")}


def derived(
    function: Callable, names: tuple[str, ...], inputs: dict
) -> Callable[[], tuple[Tensor, ...]]:
    """Run the forward pass; return a function that runs the backward pass, any number of times."""
    grads = [x for name, x in inputs.items() if name.startswith("grad_")]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names if name in inputs}
    outputs = as_tuple(function(**without_gradients(inputs) | leaves))
    return lambda: torch.autograd.grad(
        outputs,
        list(leaves.values()),
        grads,
        retain_graph=True,
    )


def dense_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_0: Tensor,
    **_,
) -> Callable:
    """A function that runs the gradient of PyTorch's dense attention, in its fastest layout."""
    query, key, value, grad = head_first(query, key, value, grad_0)
    return derived(
        torch.nn.functional.scaled_dot_product_attention,
        ("query", "key", "value"),
        {"query": query, "key": key, "value": value, "grad_0": grad},
    )


@dataclass(frozen=True)
class Backward(Case):
    """A row of a backward operator: the row ``forward``, and a random gradient of each output."""

    @property
    def forward(self) -> Case:
        return Case(
            self.op.removesuffix("_backward"),
            self.size,
            self.make,
            self.dtype,
            self.bench,
        )

    @property
    def operator(self) -> Operator:
        """Its gradient has five products where the forward pass has two."""
        operator = OPERATORS[self.forward.op]
        return replace(
            operator,
            flops=lambda inputs: operator.flops(inputs) * 5 // 2,
            dense=operator.dense and dense_backward,
        )

    def inputs(self, seed: int = 0) -> dict:
        inputs = self.forward.inputs(seed)
        g = torch.Generator().manual_seed(seed + 1)
        outputs = self.forward.run(inputs)
        return inputs | {
            f"grad_{i}": torch.randn(x.shape, generator=g).to(x.dtype)
            for i, x in enumerate(outputs)
        }

    def ready(self, function: Callable, inputs: dict) -> Callable[[], tuple[Tensor, ...]]:
        return derived(function, INPUTS[self.forward.op], inputs)


BACKWARDS, BACKWARD_BENCHES = (
    [
        Backward(f"{case.op}_backward", case.size, case.make, case.dtype, case.bench)
        for case in cases
        if case.op in INPUTS
    ]
    for cases in (CASES, BENCHES)
)
