# SPDX-License-Identifier: Apache-2.0
"""PyTorch's FlopCounterMode counts the products of every operator.

It counts as many as it does for the usual expression where that makes the same products, and as
many as the benchmarks take for granted.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import kandinsky_kernels as ops
from kandinsky_kernels import flops
from kandinsky_model.dit.geometry import Grid

from ..cases import CASES, FP32, attention

ROOT = Path(__file__).resolve().parents[2]
GRID = Grid(2, 9, 17)
PRODUCTS = ("select_blocks", "block_sparse_attention", "frame_causal_attention")


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_every_operator_has_a_formula():
    assert set(flops.FORMULAS) == set(ops.kernels())
    for name in flops.FORMULAS:
        assert getattr(torch.ops.kandinsky_kernels, name) in flop_registry


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.dtype == FP32],
    ids=lambda case: case.id,
)
def test_operators_count_what_benchmarks_take(case):
    inputs = case.inputs()
    wanted = case.operator.flops(inputs)
    assert counted(lambda: case.run(inputs)) == wanted
    assert (wanted > 0) == (case.op in PRODUCTS)


def everything_kept():
    inputs = attention(2, 3, GRID, 64, 1.0)(torch.Generator().manual_seed(0))
    query, key, value = (inputs[name].requires_grad_() for name in ("query", "key", "value"))
    return query, key, value, inputs["selection"], inputs["block_offsets"]


def test_attention_to_everything_counts_as_dense_attention():
    query, key, value, *blocks = everything_kept()

    def dense():
        heads = (x.transpose(1, 2) for x in (query, key, value))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(*heads)

    def sparse():
        return ops.block_sparse_attention(query, key, value, *blocks)

    forward = counted(dense)
    assert counted(sparse) == forward > 0
    # the gradient of dense attention keeps the logits that ours computes again
    dense_gradient = counted(lambda: dense().sum().backward()) - forward
    sparse_gradient = counted(lambda: sparse().sum().backward()) - forward
    assert sparse_gradient * 4 == dense_gradient * 5


def test_convolution_counts_as_torch_does():
    x = torch.randn(2, 5, 6, 7, 8)
    weight = torch.randn(4, 8, 3, 3, 3)
    for stride in ((1, 1, 1), (2, 2, 2)):
        planes = x.permute(0, 4, 1, 2, 3)  # [B, C, T, Y, X]
        wanted = counted(
            lambda planes=planes, stride=stride: F.conv3d(planes, weight, None, stride)
        )
        ours = counted(lambda stride=stride: ops.causal_conv3d(x, weight, None, stride))
        assert ours == wanted > 0


def test_unknown_selections_count_as_full():
    args = everything_kept()
    wanted = counted(lambda: ops.block_sparse_attention(*args))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in args]
        assert counted(lambda: ops.block_sparse_attention(*fakes)) == wanted


@pytest.mark.parametrize("first", ["kandinsky_kernels", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first):
    """The package alone does not import the counter, which takes longer than the package."""
    program = f"""
import importlib, sys, torch
importlib.import_module({first!r})
assert {first!r} != "kandinsky_kernels" or "torch.utils.flop_counter" not in sys.modules
import kandinsky_kernels
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 1, 6, 8)
with FlopCounterMode(display=False) as counter:
    kandinsky_kernels.select_blocks(x, x, 0.5)
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == 2 * 6 * 6 * 8
