# SPDX-License-Identifier: Apache-2.0
"""The rows of the backward operators: every row of an operator that has a gradient is one of its
backward too, test and benchmark.

``exact`` is PyTorch's derivative of the reference on fp64 inputs, ``peer`` its derivative of
upstream's expression.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cases import BENCHES, CASES, OPERATORS, Case, Operator, as_tuple, head_first

INPUTS = {  # the gradients that a row is about
    "modulated_norm": ("x", "scale", "shift"),
    "gated_add_norm": ("x", "branch", "gate", "scale", "shift"),
    "norm_rope": ("x", "weight"),
    "norm_rope_means": ("x", "weight"),
    "block_sparse_attention": ("query", "key", "value"),
}


def without_gradients(inputs: dict) -> dict:
    """What the forward pass takes of a row's inputs: all but ``grad_i``, the gradient of the i-th
    output."""
    return {name: x for name, x in inputs.items() if not name.startswith("grad_")}


def derived(
    function: Callable, names: tuple[str, ...], inputs: dict
) -> Callable[[], tuple[Tensor, ...]]:
    """Runs the forward pass; calling what it returns runs the backward pass, as often as wanted."""
    grads = [x for name, x in inputs.items() if name.startswith("grad_")]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names if name in inputs}
    outputs = as_tuple(function(**without_gradients(inputs) | leaves))
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)


def dense_backward(query: Tensor, key: Tensor, value: Tensor, grad_0: Tensor, **_) -> Callable:
    """The gradient of PyTorch's dense attention, ready to run, in the layout it likes best."""
    query, key, value, grad = head_first(query, key, value, grad_0)
    return derived(
        torch.nn.functional.scaled_dot_product_attention,
        ("query", "key", "value"),
        {"query": query, "key": key, "value": value, "grad_0": grad},
    )


@dataclass(frozen=True)
class Backward(Case):
    """A row of the backward of ``forward``'s operator, with a random gradient for each of its
    outputs."""

    @property
    def forward(self) -> Case:
        return Case(self.op.removesuffix("_backward"), self.size, self.make, self.dtype, self.bench)

    @property
    def operator(self) -> Operator:
        """Five products where the forward pass has two."""
        operator = OPERATORS[self.forward.op]
        return replace(
            operator,
            flops=lambda inputs: operator.flops(inputs) * 5 // 2,
            dense=operator.dense and dense_backward,
        )

    def inputs(self, seed: int = 0) -> dict:
        inputs, g = self.forward.inputs(seed), torch.Generator().manual_seed(seed + 1)
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
