# SPDX-License-Identifier: Apache-2.0
"""The operators of the video VAE: what streaming a video in pieces relies on, beyond the laws every
operator keeps."""

import math

import pytest
import torch
import torch.nn.functional as F

import kandinsky_kernels as ops
from kandinsky_kernels import reference, vae

from .cases import FP32, Case, frames, normed, video
from .compare import assert_faithful


def made(make, dtype=FP32):
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) else x
        for name, x in make(torch.Generator().manual_seed(3)).items()
    }


def halves(x):
    """Uneven pieces of x [B, T, ...] along T."""
    return x[:, :1], x[:, 1:4], x[:, 4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7, 32, 8), (1, 6, 40, 33, 24, 4)], ids=["small", "slabs"]
)
def test_moments_of_a_frame_do_not_depend_on_the_piece(shape, dtype, simd):  # law 12
    x = made(video(*shape), dtype)["x"]
    whole = ops.group_moments(x, shape[-1])
    assert torch.equal(
        torch.cat([ops.group_moments(piece, shape[-1]) for piece in halves(x)], 1), whole
    )
    assert torch.equal(
        torch.cat([ops.group_moments(x[:, t : t + 1].clone(), shape[-1]) for t in range(6)], 1),
        whole,
    )
    assert torch.equal(
        reference.group_moments(x[:, 2:3], shape[-1]), reference.group_moments(x, shape[-1])[:, 2:3]
    )


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_moments_far_from_zero(offset, simd):  # law 10
    x = made(video(1, 2, 40, 33, 32, 8))["x"] + offset
    moments, exact = ops.group_moments(x, 8), ops.group_moments(x.double(), 8)
    torch.testing.assert_close(moments, exact, rtol=1e-7, atol=0)


EXTREMES = {
    "constant": lambda x: x.fill_(1234.567),
    "huge": lambda x: x.mul_(1e38 / x.abs().amax()),
    "zero": lambda x: x.zero_(),
    "overflowing squares": lambda x: x.mul_(1e25),
    "an outlier first": lambda x: x[..., 0, 0, :].fill_(1e6),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("size", [(1, 2, 3, 5, 16, 4), (1, 2, 20, 30, 16, 4)], ids=["few", "many"])
def test_moments_of_extremes(extreme, size, simd):  # law 10
    x = made(video(*size))["x"]
    EXTREMES[extreme](x)
    torch.testing.assert_close(
        ops.group_moments(x, 4), ops.group_moments(x.double(), 4), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3)], ids=["first pixel", "inside"])
def test_non_finite_stays_in_its_group(value, place, simd):  # law 9
    case = Case("group_moments", "non_finite", video(1, 3, 20, 17, 32, 8), FP32)
    inputs = case.inputs()
    clean = ops.group_moments(**inputs)
    inputs["x"][0, 1, place[0], place[1], 5] = value
    dirty, (exact,) = ops.group_moments(**inputs), case.exact(inputs)
    assert (
        torch.equal(dirty.isnan(), exact.isnan())
        and torch.equal(dirty.isinf(), exact.isinf())
        and not dirty[0, 1, 1].isfinite().all()
    )
    dirty[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 88.8, -88.8, -200.0, 3e38, -3e38])
def test_silu_of_anything(value, simd):  # laws 9 and 10
    x = torch.full((1, 1, 1, 1, 19), value)
    ones = torch.ones(1, 19)
    out = ops.group_norm_silu(x, ones, 0 * ones, pad=False)
    torch.testing.assert_close(
        out, F.silu(x.double()).float(), equal_nan=True, atol=1e-36, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_affine_is_group_norm(dtype):
    """From the input to the padded output: as faithful as PyTorch's group norm, SiLU and padding,
    which read it three times more often."""
    x, weight, bias = (
        made(video(2, 3, 18, 17, 32, 8), dtype)["x"],
        torch.randn(32).to(dtype),
        torch.randn(32).to(dtype),
    )

    def torch_way(x, weight, bias):
        y = F.silu(F.group_norm(x.permute(0, 4, 1, 2, 3), 8, weight, bias, eps=1e-6))
        return F.pad(y, (1, 1, 1, 1, 2, 0), mode="replicate").permute(0, 2, 3, 4, 1).contiguous()

    def our_way(x, weight, bias):
        return ops.group_norm_silu(x, *ops.group_affine(ops.group_moments(x, 8), weight, bias))

    exact = our_way(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(
        exact, torch_way(x.double(), weight.double(), bias.double()), rtol=1e-9, atol=1e-9
    )
    assert_faithful(our_way(x, weight, bias), exact, torch_way(x, weight, bias))


def test_affine_weighs_frames_in_order():
    # [1, 3, 1, 2]
    moments = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]], dtype=torch.float64)[None, :, None]
    scale, shift = ops.group_affine(
        moments, torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), eps=0.0
    )
    variance = (2 + 9 + 4 + 1 + 0 + 16) / 3  # around the mean 4
    assert scale.dtype == shift.dtype == torch.float64
    torch.testing.assert_close(scale, torch.full((1, 2), variance**-0.5, dtype=torch.float64))
    torch.testing.assert_close(shift, torch.full((1, 2), -4 * variance**-0.5, dtype=torch.float64))
    assert (
        ops.group_affine(moments, torch.ones(2).bfloat16(), torch.zeros(2).bfloat16())[0].dtype
        == torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_continue_exactly(dtype, simd):
    inputs = made(normed(2, 6, 5, 4, 24), dtype)
    x, scale, shift = (inputs[name] for name in ("x", "scale", "shift"))
    whole, parts, front = ops.group_norm_silu(x, scale, shift), [], None
    for piece in halves(x):
        parts.append(ops.group_norm_silu(piece, scale, shift, front))
        front = parts[-1][:, -2:]
    assert torch.equal(torch.cat([parts[0], *(part[:, 2:] for part in parts[1:])], 1), whole)
    # a piece without frames
    assert torch.equal(ops.group_norm_silu(x[:, :0], scale, shift, front), front)
    strided = F.pad(front, (0, 3))[..., :24]  # pixels apart in memory
    assert torch.equal(
        ops.group_norm_silu(x, scale, shift, strided), ops.group_norm_silu(x, scale, shift, front)
    )
    assert torch.equal(
        whole[:, :, 1:-1, 1:-1][:, 2:], ops.group_norm_silu(x, scale, shift, pad=False)
    )


def test_empty():  # law 8
    assert ops.group_moments(torch.empty(2, 0, 3, 3, 8), 4).shape == (2, 0, 4, 2)
    assert ops.group_moments(torch.empty(1, 2, 0, 3, 8), 4).isnan().all()  # the mean of nothing
    vectors = torch.ones(1, 8), torch.ones(1, 8)
    assert ops.group_norm_silu(torch.empty(1, 2, 0, 3, 8), *vectors, pad=False).shape == (
        1,
        2,
        0,
        3,
        8,
    )
    assert ops.group_norm_silu(
        torch.empty(0, 2, 3, 3, 8), torch.empty(0, 8), torch.empty(0, 8)
    ).shape == (0, 4, 5, 5, 8)
    for shape in ((0, 2, 3, 8), (1, 0, 3, 8), (1, 2, 0, 8)):
        out, lse = ops.frame_causal_attention(
            torch.empty(shape), *2 * [torch.empty(shape[0], 2, 3, 8)], return_lse=True
        )
        assert out.shape == shape and lse.shape == shape[:3]


def test_attention_merges_ranges_of_keys(simd):
    """Frames 2 to 4 of five: earlier frames seen whole, as one long frame, and their own causally;
    together the whole prefix."""
    inputs = made(frames(2, 3, 7, 16, first_frame=2))
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    whole, whole_lse = ops.frame_causal_attention(query, key, value, first_frame=2, return_lse=True)
    # [B, 1, T P, D]
    long_frames = (x.flatten(1, 2)[:, None] for x in (query, key[:, :2], value[:, :2]))
    early = ops.frame_causal_attention(*long_frames, return_lse=True)
    early = early[0].view(query.shape), early[1].view(query.shape[:3])
    late = ops.frame_causal_attention(query, key[:, 2:], value[:, 2:], return_lse=True)
    lse = torch.logaddexp(early[1], late[1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in (early, late))
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(out, whole)


def check_pieces(attention, query, key, value):
    """Every frame alone is bitwise what it is among the others, and a later frame's values reach no
    earlier one."""
    whole, lse = attention(query, key, value, 0, 0.2)
    for t in range(query.shape[1]):
        out, part = attention(query[:, t : t + 1], key, value, t, 0.2)
        assert torch.equal(out, whole[:, t : t + 1]) and torch.equal(part, lse[:, t : t + 1])
    value[:, 2] = math.nan
    out, _ = attention(query, key, value, 0, 0.2)
    assert torch.equal(out[:, :2], whole[:, :2]) and out[:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("P", [11, 70, 300])
def test_attention_frames_do_not_depend_on_the_piece(P, dtype, simd):  # law 12
    """Blocks of keys that end inside frames, frames of several tasks."""
    inputs = made(frames(1, 4, P, 24), dtype)
    check_pieces(torch.ops.kandinsky_kernels.frame_causal_attention, *inputs.values())


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_reference_attention_frames_do_not_depend_on_the_piece(rows, monkeypatch):  # law 12
    monkeypatch.setattr(reference, "_QUERIES", rows)
    check_pieces(reference.frame_causal_attention, *made(frames(1, 4, 11, 24)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_several_tasks(dtype, simd):  # law 1
    """Three tasks a frame, the last one short, and keys of several blocks; tokens apart in memory,
    as one projection gives them."""
    case = Case("frame_causal_attention", "tasks", frames(2, 2, 530, 24, lse=True), dtype)
    inputs = case.inputs()
    packed = torch.stack([inputs[name] for name in ("query", "key", "value")], 3)  # [B, T, P, 3, D]
    inputs |= dict(zip(("query", "key", "value"), packed.unbind(3), strict=True))
    case.check(case.run(inputs), inputs)


@pytest.mark.parametrize("poison", ["query", "key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_attention_of_non_finite_numbers(poison, value, simd):  # law 9
    """In a query they stay in its row; in a key or value they reach its frame and later ones as in
    the oracle."""
    case = Case("frame_causal_attention", "non_finite", frames(1, 3, 70, 24, lse=True), FP32)
    inputs = case.inputs()
    clean = case.run(inputs)
    inputs[poison][0, 1, 33, 5] = value
    dirty, exact = case.run(inputs), case.exact(inputs)
    touched = torch.zeros(1, 3, 70, dtype=torch.bool)
    touched[0, 1, 33 if poison == "query" else slice(None)] = True
    touched[0, 2] = poison != "query"
    for ours, oracle, before in zip(dirty, exact, clean, strict=True):
        assert torch.equal(ours.isnan(), oracle.isnan()) and torch.equal(
            ours.isinf(), oracle.isinf()
        )
        assert torch.equal(ours[~touched], before[~touched])
    assert not dirty[0][touched].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, 1e4])
# law 10: from uniform weights to one-hot ones, without overflow
def test_attention_of_extremes(scale, simd):
    case = Case("frame_causal_attention", "extreme", frames(1, 2, 70, 24, lse=True), FP32)
    inputs = case.inputs()
    inputs["query"] *= scale
    case.check(case.run(inputs), inputs)


def test_gradients_go_through_the_reference():
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 2, 3, 4), (4,), (4,))
    )
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: ops.group_norm_silu(
            x, *ops.group_affine(ops.group_moments(x, 2), weight, bias)
        ),
        (x, weight, bias),
    )
    query, key, value = (
        torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    assert torch.autograd.gradcheck(
        lambda *qkv: ops.frame_causal_attention(*qkv, return_lse=True), (query, key, value)
    )


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("limit", [2**31 - 1, 3 * 2 * 6 * 5 * 8, 1])
def test_convolution_in_pieces(stride, limit, monkeypatch):  # law 13
    monkeypatch.setattr(vae, "INDEXABLE", limit)
    x, weight, bias = torch.randn(2, 9, 6, 5, 8), torch.randn(4, 8, 3, 3, 3), torch.randn(4)
    calls = []
    monkeypatch.setattr(
        vae,
        "_conv3d",
        lambda *args, conv=vae._conv3d: calls.append(args[0].shape[2]) or conv(*args),
    )
    out = ops.causal_conv3d(x, weight, bias, stride)
    monkeypatch.undo()
    exact, peer = (
        F.conv3d(x.to(d).permute(0, 4, 1, 2, 3), weight.to(d), bias.to(d), stride)
        .permute(0, 2, 3, 4, 1)
        .contiguous()
        for d in (torch.float64, torch.float32)
    )
    assert_faithful(out, exact, peer)
    assert (calls == [9]) == (limit == 2**31 - 1) and (limit > 1 or set(calls) == {3})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_of_narrow_numbers_is_rounded_once(dtype):
    x, weight, bias = (
        torch.randn(shape).to(dtype) for shape in ((1, 4, 6, 5, 8), (4, 8, 3, 3, 3), (4,))
    )
    exact = ops.causal_conv3d(x.double(), weight.double(), bias.double())
    assert_faithful(ops.causal_conv3d(x, weight, bias), exact, exact.to(dtype))


X, V, Q = torch.zeros(2, 3, 4, 5, 8), torch.zeros(2, 8), torch.zeros(1, 2, 3, 8)
MISUSE = [
    (
        lambda: ops.group_moments(X[0], 2),
        ValueError,
        r"x must have shape \[B, T, Y, X, C\], got "
        r"\[3, 4, 5, 8\]",
    ),
    (lambda: ops.group_moments(X.int(), 2), TypeError, "x must be a float tensor, got torch.int32"),
    (
        lambda: ops.group_moments(X.transpose(3, 4), 5),
        ValueError,
        "x must be contiguous in its last dimension",
    ),
    (lambda: ops.group_moments(X, 3), ValueError, "groups must divide the 8 channels of x, got 3"),
    (
        lambda: ops.group_affine(torch.zeros(2, 0, 4, 2), V[0], V[0]),
        ValueError,
        r"moments must have shape \[B, T, G, 2\] with a frame",
    ),
    (
        lambda: ops.group_affine(torch.zeros(2, 1, 3, 2), V[0], V[0]),
        ValueError,
        r"weight and bias must share one shape \[C\]",
    ),
    (
        lambda: ops.group_norm_silu(X, V[:1], V),
        ValueError,
        r"scale must have shape \[B, C\] = "
        r"\[2, 8\], got \[1, 8\]",
    ),
    (lambda: ops.group_norm_silu(X, V, V.int()), TypeError, "shift must be a float tensor"),
    (
        lambda: ops.group_norm_silu(X[:, :0], V, V),
        ValueError,
        r"x must have a pixel to repeat, "
        r"got \[2, 0, 4, 5, 8\]; give "
        r"pad=False",
    ),
    (
        lambda: ops.group_norm_silu(X, V, V, X),
        ValueError,
        r"front must have shape .* = \[2, 2, 6, "
        r"7, 8\] and come with pad",
    ),
    (
        lambda: ops.group_norm_silu(X, V, V, torch.zeros(2, 2, 6, 7, 8).half()),
        TypeError,
        "front must have the dtype of x torch.float32",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q.half()),
        TypeError,
        "query, key and value must share one dtype",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q[:, :1]),
        ValueError,
        r"key and value must share "
        r"one shape \[B, T', P', D\]",
    ),
    (lambda: ops.frame_causal_attention(Q, Q[:, :, :0], Q[:, :, :0]), ValueError, "P' > 0"),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q, first_frame=1),
        ValueError,
        "first_frame >= 0 earlier ones, got 2 frames for 2 and 1",
    ),
    (
        lambda: ops.causal_conv3d(X, torch.zeros(4, 7, 3, 3, 3)),
        ValueError,
        r"weight must have "
        r"shape .* with C = 8",
    ),
    (
        lambda: ops.causal_conv3d(X[:, :2], torch.zeros(4, 8, 3, 3, 3)),
        ValueError,
        "fit into x_padded",
    ),
    (
        lambda: torch.ops.kandinsky_kernels.group_norm_silu(X, V, V, X, True, True),
        ValueError,
        r"front must have shape \[2, 2, 6, 7, 8\]",
    ),
    (
        lambda: torch.ops.kandinsky_kernels.group_moments(X, 3),
        ValueError,
        "groups must divide the 8 channels",
    ),
    (
        lambda: torch.ops.kandinsky_kernels.frame_causal_attention(Q, Q, Q[:, :, :2], 0, 1.0),
        ValueError,
        "value must have shape",
    ),
    (
        lambda: torch.ops.kandinsky_kernels.frame_causal_attention(Q, Q, Q, 1, 1.0),
        ValueError,
        "got 2 frames for 2 and 1",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), MISUSE)
def test_misuse_is_explained(call, error, text):  # law 20
    with pytest.raises(error, match=text) as caught:
        call()
    assert str(caught.value).count(". ") == 0 and "\n" not in str(caught.value)
