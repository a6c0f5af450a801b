# SPDX-License-Identifier: Apache-2.0
"""Derivatives beyond the first gradient are never silently zero.

Gradients of gradients and forward-mode derivatives, by torch.autograd and by torch.func, equal
PyTorch's own derivatives of the usual expressions.
"""

import contextlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import kandinsky_kernels as ops

from ..compare import assert_faithful

LIBRARY = torch.ops.kandinsky_kernels
OFFSETS = torch.tensor([0, 4, 7], dtype=torch.int32)
SELECTION = torch.tensor([[[[0b11], [0b10]]]], dtype=torch.int32)


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V = made(2, 8, seed=1)
W = made(2, 8, seed=2)
ANGLES = made(7, 4, seed=3)
ROTARY = ops.Rotary.per_token(ANGLES.cos(), ANGLES.sin())
KEEP = torch.tensor([[1] * 7] * 4 + [[0] * 4 + [1] * 3] * 3, dtype=torch.bool)
BLOCK_MEANS = torch.tensor([[0.25] * 4 + [0] * 3, [0] * 4 + [1 / 3] * 3])


def layer_norm(x):
    return F.layer_norm(x, (8,), eps=1e-5) * (1 + V.to(x.dtype)[:, None]) + W.to(x.dtype)[:, None]


def gated(x):
    y = x + V.to(x.dtype)[:, None] * x.sin()
    return y, layer_norm(y)


def turned(x):
    y = F.rms_norm(x, (8,), eps=1e-6)
    even, odd = y.unflatten(-1, (4, 2)).unbind(-1)
    cos, sin = (table.to(x.dtype)[:, None] for table in (ANGLES.cos(), ANGLES.sin()))
    y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return y, torch.einsum("nt,bthd->bhnd", BLOCK_MEANS.to(x.dtype), y)


def masked(x):
    logits = torch.einsum("bihd,bjhd->bhij", x, x.cos()) / math.sqrt(8)
    logits = logits.masked_fill(~KEEP, -math.inf)
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), x)
    return out, logits.logsumexp(-1)


def framed(x):
    mask = torch.ones(3, 3).tril().bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
    x = x.flatten(1, 2)
    logits = (x @ x.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    return (logits.softmax(-1) @ x).unflatten(1, (3, 4))


CASES = {  # the operator of one tensor, upstream's expression of it, and its shape
    "modulated_norm": (lambda x: ops.modulated_norm(x, V, W), layer_norm, (2, 3, 8)),
    "gated_add_norm": (lambda x: ops.gated_add_norm(x, x.sin(), V, V, W), gated, (2, 3, 8)),
    "gated_add": (
        lambda x: ops.gated_add_norm(x, x.sin(), V)[0],
        lambda x: gated(x)[0],
        (2, 3, 8),
    ),
    "norm_rope_means": (
        lambda x: ops.norm_rope_means(
            x,
            torch.ones(8),
            ROTARY,
            OFFSETS,
            1e-6,
        ),
        turned,
        (2, 7, 2, 8),
    ),
    "block_sparse_attention": (
        lambda x: ops.block_sparse_attention(
            x,
            x.cos(),
            x,
            SELECTION,
            OFFSETS,
            return_lse=True,
        ),
        masked,
        (1, 7, 1, 8),
    ),
    "frame_causal_attention": (lambda x: ops.frame_causal_attention(x, x, x), framed, (1, 3, 4, 8)),
    "group_norm_silu": (
        lambda x: ops.group_norm_silu(x, V, W, pad=False),
        lambda x: F.silu(
            x * V.to(x.dtype)[:, None, None, None] + W.to(x.dtype)[:, None, None, None]
        ),
        (2, 1, 2, 3, 8),
    ),
    "group_moments": (
        lambda x: ops.group_moments(x, 2).to(x.dtype),
        lambda x: torch.stack(
            torch.var_mean(
                x.unflatten(-1, (2, 4)),
                (2, 3, 5),
                correction=0,
            )[::-1],
            -1,
        ),
        (2, 1, 2, 3, 8),
    ),
    "causal_conv3d": (
        lambda x: ops.causal_conv3d(x, WEIGHT.to(x.dtype)),
        lambda x: (
            F.conv3d(x.permute(0, 4, 1, 2, 3), WEIGHT.to(x.dtype))
            .permute(0, 2, 3, 4, 1)
            .contiguous()
        ),
        (1, 3, 3, 4, 8),
    ),
}
WEIGHT = made(4, 8, 3, 3, 3, seed=5)
each = pytest.mark.parametrize(
    ("operator", "peer", "shape"),
    CASES.values(),
    ids=CASES.keys(),
)


def loss(function):
    """A number of the outputs, none of whose derivatives vanishes."""

    def total(x):
        outputs = function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((y * y.sin()).sum() for y in outputs)

    return total


def second(function, x):
    """The gradient of a function of the gradient."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        loss(function)(x),
        x,
        create_graph=True,
    )
    (result,) = torch.autograd.grad(first.square().sum(), x)
    return result


def forward(function, x):
    """The derivative along the direction cos(x), in forward mode."""
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, x.cos()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tangents = [forward_ad.unpack_dual(y).tangent for y in outputs]
    return torch.cat([tangent.flatten() for tangent in tangents])


def judged(derive, operator, peer, shape):
    x = made(*shape, seed=7)
    exact = derive(peer, x.double())
    usual = derive(peer, x)
    assert exact.abs().max() > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        assert_faithful(
            derive(operator, x).contiguous(),
            exact.contiguous(),
            usual.contiguous(),
        )


@each
def test_gradients_of_gradients(operator, peer, shape):
    judged(second, operator, peer, shape)


@each
def test_forward_mode(operator, peer, shape):
    judged(forward, operator, peer, shape)


@each
def test_forward_mode_of_torch_func(operator, peer, shape):
    def derive(function, x):
        tangents = torch.func.jvp(function, (x,), (x.cos(),))[1]
        tangents = tangents if isinstance(tangents, tuple) else (tangents,)
        return torch.cat([tangent.flatten() for tangent in tangents])

    judged(derive, operator, peer, shape)


@each
def test_gradients_of_torch_func(operator, peer, shape):
    judged(lambda function, x: torch.func.grad(loss(function))(x), operator, peer, shape)


def test_third_derivatives():
    def third(function, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(
            loss(function)(x),
            x,
            create_graph=True,
        )
        (grad,) = torch.autograd.grad(
            first.square().sum(),
            x,
            create_graph=True,
        )
        return torch.autograd.grad(grad.sin().sum(), x)[0]

    x = made(1, 7, 1, 8)
    operator, peer, _ = CASES["block_sparse_attention"]
    wanted = third(peer, x.double())
    assert (third(operator, x) - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_raw_operators_have_derivatives_too():
    x = made(1, 2, 3, 8).requires_grad_()
    out, _ = LIBRARY.frame_causal_attention(x, x, x, 0, 0.3)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    wanted = ops.frame_causal_attention(x, x, x, scale=0.3)
    assert torch.equal(grad, torch.autograd.grad(wanted.square().sum(), x)[0])
    rows = made(2, 3, 8).requires_grad_()
    grads = LIBRARY.modulated_norm_backward(rows, V, rows.sin(), 1e-5)
    assert all(grad.requires_grad for grad in grads)


@pytest.mark.parametrize("derive", [torch.autograd.grad, torch.func.grad])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (2,)], ids=["all", "cos"])
def test_angles_have_gradients(derive, wanted):
    inputs = (made(2, 7, 2, 8, seed=7), made(8, seed=8), ANGLES.cos(), ANGLES.sin())

    def total(x, weight, cos, sin):
        rotary = ops.Rotary.per_token(cos, sin)
        y, means = ops.norm_rope_means(x, weight, rotary, OFFSETS)
        return (y * y.sin()).sum() + means.square().sum()

    def grads(inputs):
        if derive is torch.func.grad:
            return torch.func.grad(total, wanted)(*inputs)
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        return torch.autograd.grad(total(*leaves), [leaves[i] for i in wanted])

    exact = grads([x.double() for x in inputs])
    assert all(grad.any() for grad in exact)
    torch.testing.assert_close(grads(inputs), tuple(grad.float() for grad in exact))


def test_a_choice_has_no_derivative():
    means = made(1, 1, 6, 8).requires_grad_()
    assert not ops.select_blocks(means, means, 0.5).requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(means.detach(), means.detach())
        chosen = ops.select_blocks(dual, dual, 0.5)
        assert forward_ad.unpack_dual(chosen).tangent is None
    assert torch.equal(chosen, ops.select_blocks(means, means, 0.5))


def test_kernels_run_where_nothing_more_is_wanted():
    """The first gradient is a kernel's; references serve further derivatives only."""
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self,
            function,
            types,
            args=(),
            kwargs=None,
        ):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    x = made(2, 3, 8).requires_grad_()
    with Watch(), contextlib.nullcontext():
        ops.modulated_norm(x, V, W).sum().backward()
    assert "kandinsky_kernels::modulated_norm" in called
    assert "kandinsky_kernels::modulated_norm_backward" in called


# ---- heads wider than one chain of sums


def wide_heads(D):
    """Inputs of three blocks, of which the second has one token and keeps itself alone."""
    offsets = torch.tensor([0, 64, 65, 100], dtype=torch.int32)
    keep = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    selection = ops.pack_selection(keep[None, None].expand(1, 2, 3, 3).contiguous())
    token = torch.arange(3).repeat_interleave(offsets.diff())
    qkv = [made(1, 100, 2, D, seed=seed).requires_grad_() for seed in range(3)]
    return qkv, selection, offsets, keep[token][:, token]


@pytest.mark.parametrize("D", [128, 160, 192, 256, 257])
def test_gradients_of_wide_heads(D, simd):  # laws 1 and 3
    qkv, selection, offsets, mask = wide_heads(D)
    grad = made(1, 100, 2, D, seed=9)

    def peer(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            heads = (x.transpose(1, 2) for x in inputs)
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        return torch.autograd.grad(out, inputs, grad.to(dtype))

    actual = torch.autograd.grad(
        ops.block_sparse_attention(*qkv, selection, offsets),
        qkv,
        grad,
    )
    for outputs in zip(
        actual,
        peer(torch.float64),
        peer(torch.float32),
        strict=True,
    ):
        assert_faithful(*(x.contiguous() for x in outputs))


@pytest.mark.parametrize("D", [8, 128, 160, 192, 256])
def test_the_gradient_of_a_weight_of_one_is_zero(D, simd):
    """Where a query sees one token, the weight is 1 whatever the logit.

    So exactly no gradient reaches the query and the key.
    """
    qkv, selection, offsets, _ = wide_heads(D)
    out = ops.block_sparse_attention(*qkv, selection, offsets)
    grad = torch.zeros_like(out)
    grad[:, 64] = made(1, 2, D, seed=4)  # the token of the second block
    query, key, value = torch.autograd.grad(out, qkv, grad)
    assert not query.any()
    assert not key.any()
    torch.testing.assert_close(value, grad, rtol=1e-5, atol=0.0)
