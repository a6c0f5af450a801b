# SPDX-License-Identifier: Apache-2.0
"""Meta and fake tensors give the right shapes; tensors on different devices are refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kandinsky_kernels as ops
from kandinsky_kernels import reference

Q = torch.randn(1, 70, 2, 8)
OFFSETS = torch.tensor([0, 64, 70], dtype=torch.int32)
SELECTION = torch.full((1, 2, 2, 1), -1, dtype=torch.int32)
FRAMES = torch.randn(1, 3, 4, 5, 8)
WEIGHT = torch.randn(4, 8, 3, 3, 3)
ROWS = torch.randn(1, 3, 8)
VECTOR = torch.randn(1, 8)
MEANS = torch.randn(1, 2, 6, 8)
HEADS = (
    Q,
    torch.randn(8),
    torch.randn(9, 4),
    torch.randn(9, 4),
)
PLACES = torch.zeros(70, 1, dtype=torch.int32)

CALLS = {
    "modulated_norm": (ops.modulated_norm, (ROWS, VECTOR, VECTOR)),
    "gated_add_norm": (ops.gated_add_norm, (ROWS, ROWS, VECTOR, VECTOR, VECTOR)),
    "norm_rope_means": (
        lambda x, w, cos, sin, places, offsets: ops.norm_rope_means(
            x, w, ops.Rotary(cos, sin, places, (4,)), offsets
        ),
        (*HEADS, PLACES, OFFSETS),
    ),
    "block_means": (ops.block_means, (Q, OFFSETS)),
    "select_blocks": (lambda q, k: ops.select_blocks(q, k, 0.9), (MEANS, MEANS)),
    "block_sparse_attention": (ops.block_sparse_attention, (Q, Q, Q, SELECTION, OFFSETS)),
    "group_moments": (lambda x: ops.group_moments(x, 2), (FRAMES,)),
    "group_norm_silu": (ops.group_norm_silu, (FRAMES, VECTOR, VECTOR)),
    "frame_causal_attention": (ops.frame_causal_attention, (FRAMES[0], FRAMES[0], FRAMES[0])),
    "causal_conv3d": (ops.causal_conv3d, (FRAMES, WEIGHT)),
    "group_affine": (
        ops.group_affine,
        (
            torch.rand(1, 3, 2, 2),
            torch.randn(8),
            torch.randn(8),
        ),
    ),
}
each = pytest.mark.parametrize(
    ("call", "args"),
    CALLS.values(),
    ids=CALLS.keys(),
)


def forms(result) -> list:
    return [(x.shape, x.dtype) for x in (result if isinstance(result, tuple) else (result,))]


@each
def test_meta_tensors_give_shapes(call, args):
    result = call(*(x.to("meta") for x in args))
    assert forms(result) == forms(call(*args))
    assert all(x.is_meta for x in (result if isinstance(result, tuple) else (result,)))


@each
def test_fake_tensors_give_shapes(call, args):
    with FakeTensorMode() as mode:
        result = call(*(mode.from_tensor(x) for x in args))
    assert forms(result) == forms(call(*args))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_devices_are_refused(call, args, dtype):
    """It does not matter which tensor is elsewhere, nor whether a kernel or a reference runs."""
    args = [x.to(dtype) if x.dtype == torch.float32 else x for x in args]
    for i in range(len(args) if len(args) > 1 else 0):
        mixed = [x.to("meta") if i == j else x for j, x in enumerate(args)]
        with pytest.raises((ValueError, TypeError), match="must be (on one device|float32)"):
            call(*mixed)


def test_other_layouts_are_refused():
    sparse = VECTOR.to_sparse()
    for function in (torch.ops.kandinsky_kernels.modulated_norm, reference.modulated_norm):
        with pytest.raises(ValueError, match="scale must be a dense tensor, got a sparse_coo one"):
            function(ROWS, sparse, VECTOR, 1e-5)
