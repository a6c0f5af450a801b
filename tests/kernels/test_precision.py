# SPDX-License-Identifier: Apache-2.0
"""Operators compute in the precision of their inputs.

Neither autocast nor a process that allows fast fp32 products changes a bit of a result, and the
settings of the process are afterwards what they were.
"""

import contextlib

import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import reference
from kandinsky_kernels._precision import full_precision

CPU = torch.device("cpu")


def made(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Q = made(1, 70, 2, 32)
MEANS = made(2, 3, 60, 64)
OFFSETS = torch.tensor([0, 64, 70], dtype=torch.int32)
SELECTION = torch.full((1, 2, 2, 1), 1, dtype=torch.int32)
ROWS = made(1, 3, 32)
VECTOR = made(1, 32)
FRAMES = made(1, 3, 4, 5, 32)
ATTENTION = (Q, Q, Q, SELECTION, OFFSETS, 0.3)
OUT, LSE = reference.block_sparse_attention(*ATTENTION)
TABLES = (None, None, None, [])
SEEN = FRAMES[0]
CASES = {  # of each operator, backward ones included
    "modulated_norm": (ROWS, VECTOR, VECTOR, 1e-5),
    "modulated_norm_backward": (ROWS, VECTOR, ROWS, 1e-5),
    "gated_add_norm": (ROWS, ROWS, VECTOR, VECTOR, VECTOR, 1e-5),
    "gated_add_norm_backward": (ROWS, ROWS, VECTOR, VECTOR, ROWS, ROWS, 1e-5),
    "norm_rope": (Q, VECTOR[0], *TABLES, OFFSETS, 1e-6),
    "norm_rope_backward": (Q, VECTOR[0], *TABLES, Q, 1e-6),
    "select_blocks": (MEANS, MEANS, 0.9, [], [], "all"),
    "block_sparse_attention": (*ATTENTION, float("inf")),
    "block_sparse_attention_backward": (
        *(
            *ATTENTION[:3],
            OUT,
            LSE,
            *ATTENTION[3:5],
            Q,
            None,
            0.3,
        ),
    ),
    "group_moments": (FRAMES, 4),
    "group_norm_silu": (FRAMES, VECTOR, VECTOR, None, True, True),
    "frame_causal_attention": (SEEN, SEEN, SEEN, 0, 0.3),
    "causal_conv3d": (FRAMES, made(8, 32, 3, 3, 3), None, [1, 1, 1]),
}


def same(actual, wanted) -> bool:
    pairs = zip(actual, wanted, strict=True) if isinstance(actual, tuple) else [(actual, wanted)]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@contextlib.contextmanager
def fast_products():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


SETTINGS = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "medium": fast_products}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("by", ["operator", "reference"])
@pytest.mark.parametrize(
    ("op", "args"),
    CASES.items(),
    ids=CASES.keys(),
)
def test_settings_change_no_bit(op, args, by, setting):
    function = getattr(reference if by == "reference" else torch.ops.kandinsky_kernels, op)
    wanted = function(*args)
    with setting():
        actual = function(*args)
    assert same(actual, wanted)


def test_every_operator_is_there():
    assert set(CASES) == set(ops.kernels())
    assert all(callable(getattr(reference, op)) for op in CASES)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_convolutions_and_their_gradients(setting):
    x = made(1, 3, 6, 7, 16)
    weight = made(8, 16, 3, 3, 3).requires_grad_()
    wanted = ops.causal_conv3d(x, weight.detach()), ops.causal_conv3d(x, weight)
    with setting():
        actual = ops.causal_conv3d(x, weight.detach()), ops.causal_conv3d(x, weight)
    assert same(actual, wanted) and actual[1].requires_grad


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_gradients_through_references(setting):
    """PyTorch differentiates the references of the VAE's operators, under the same settings."""

    def gradient():
        x = SEEN.clone().requires_grad_()
        return ops.frame_causal_attention(x, x, x), x

    out, x = gradient()
    with setting():
        again, y = gradient()
    grads = [torch.autograd.grad(o.square().sum(), i)[0] for o, i in ((out, x), (again, y))]
    assert torch.equal(out, again) and torch.equal(*grads)


def settings() -> tuple:
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.mkldnn.conv.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["high", "medium"])
def test_the_older_setting_is_put_back(kind, name):
    torch.set_float32_matmul_precision(name)
    try:
        before = settings()
        for convolutions in (False, True):
            with full_precision(torch.device(kind), convolutions):
                inside = settings()
            assert settings() == before
            exact = inside[4 if kind == "cuda" else 3] if convolutions else inside[1]
            assert exact != "tf32" or (convolutions and kind == "cpu")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_newer_setting_is_put_back():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with full_precision(CPU):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_settings_are_put_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="keep_mass"):
            reference.select_blocks(MEANS, MEANS, 7.0, [], [], "all")
        with contextlib.suppress(ZeroDivisionError), full_precision(CPU):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
