# SPDX-License-Identifier: Apache-2.0
"""What the operators of the video VAE keep beyond the laws of every operator.

Streaming a video in pieces relies on it: a piece has the bits that the whole would have.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import kandinsky_kernels as ops
from kandinsky_kernels import reference

from ..cases import FP32, Case, frames, normed, video
from ..compare import assert_faithful


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
    groups = shape[-1]
    whole = ops.group_moments(x, groups)
    pieces = [ops.group_moments(piece, groups) for piece in halves(x)]
    assert torch.equal(torch.cat(pieces, 1), whole)
    frames_alone = [frame.clone() for frame in x.split(1, dim=1)]
    moments = [ops.group_moments(frame, groups) for frame in frames_alone]
    assert torch.equal(torch.cat(moments, 1), whole)
    alone = reference.group_moments(x[:, 2:3], groups)
    among_others = reference.group_moments(x, groups)[:, 2:3]
    assert torch.equal(alone, among_others)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_moments_far_from_zero(offset, simd):  # law 10
    x = made(video(1, 2, 40, 33, 32, 8))["x"] + offset
    moments = ops.group_moments(x, 8)
    exact = ops.group_moments(x.double(), 8)
    torch.testing.assert_close(moments, exact, rtol=1e-7, atol=0)


EXTREMES = {
    "constant": lambda x: x.fill_(1234.567),
    "huge": lambda x: x.mul_(1e38 / x.abs().amax()),
    "zero": lambda x: x.zero_(),
    "overflowing squares": lambda x: x.mul_(1e25),
    "an outlier first": lambda x: x[..., 0, 0, :].fill_(1e6),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(
    "size",
    [(1, 2, 3, 5, 16, 4), (1, 2, 20, 30, 16, 4)],
    ids=["few", "many"],
)
def test_moments_of_extremes(extreme, size, simd):  # law 10
    x = made(video(*size))["x"]
    EXTREMES[extreme](x)
    moments = ops.group_moments(x, 4)
    exact = ops.group_moments(x.double(), 4)
    torch.testing.assert_close(moments, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "place",
    [(0, 0), (2, 3)],
    ids=["first pixel", "inside"],
)
def test_non_finite_stays_in_its_group(value, place, simd):  # law 9
    case = Case(
        "group_moments",
        "non_finite",
        video(1, 3, 20, 17, 32, 8),
        FP32,
    )
    inputs = case.inputs()
    clean = ops.group_moments(**inputs)
    inputs["x"][0, 1, place[0], place[1], 5] = value
    dirty = ops.group_moments(**inputs)
    (exact,) = case.exact(inputs)
    assert torch.equal(dirty.isnan(), exact.isnan())
    assert torch.equal(dirty.isinf(), exact.isinf())
    assert not dirty[0, 1, 1].isfinite().all()
    dirty[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        88.8,
        -88.8,
        -200.0,
        3e38,
        -3e38,
    ],
)
def test_silu_of_anything(value, simd):  # laws 9 and 10
    x = torch.full((1, 1, 1, 1, 19), value)
    ones = torch.ones(1, 19)
    out = ops.group_norm_silu(x, ones, 0 * ones, pad=False)
    exact = F.silu(x.double()).float()
    torch.testing.assert_close(
        out,
        exact,
        equal_nan=True,
        atol=1e-36,
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_affine_is_group_norm(dtype):
    """From the input to the padded output, ours is as faithful as PyTorch's own way.

    That is group norm, SiLU and padding, which read the video three times more often.
    """
    x = made(video(2, 3, 18, 17, 32, 8), dtype)["x"]
    weight = torch.randn(32).to(dtype)
    bias = torch.randn(32).to(dtype)

    def torch_way(x, weight, bias):
        planes = x.permute(0, 4, 1, 2, 3)  # [B, C, T, Y, X]
        y = F.silu(F.group_norm(planes, 8, weight, bias, eps=1e-6))
        padded = F.pad(y, (1, 1, 1, 1, 2, 0), mode="replicate")  # [B, C, T + 2, Y + 2, X + 2]
        return padded.permute(0, 2, 3, 4, 1).contiguous()  # [B, T + 2, Y + 2, X + 2, C]

    def our_way(x, weight, bias):
        moments = ops.group_moments(x, 8)
        scale, shift = ops.group_affine(moments, weight, bias)
        return ops.group_norm_silu(x, scale, shift)

    wide = [tensor.double() for tensor in (x, weight, bias)]
    exact = our_way(*wide)
    torch.testing.assert_close(exact, torch_way(*wide), rtol=1e-9, atol=1e-9)
    assert_faithful(our_way(x, weight, bias), exact, torch_way(x, weight, bias))


def test_affine_weighs_frames_in_order():
    of_frames = [[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]]  # mean and variance
    moments = torch.tensor(of_frames, dtype=torch.float64)[None, :, None]  # [1, 3, 1, 2]
    ones = torch.ones(2, dtype=torch.float64)
    scale, shift = ops.group_affine(moments, ones, 0 * ones, eps=0.0)
    variance = (2 + 9 + 4 + 1 + 0 + 16) / 3  # around the mean 4
    assert scale.dtype == shift.dtype == torch.float64
    inverse = variance**-0.5
    torch.testing.assert_close(scale, inverse * ones[None])
    torch.testing.assert_close(shift, -4 * inverse * ones[None])
    narrow = ones.bfloat16()
    assert ops.group_affine(moments, narrow, 0 * narrow)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_continue_exactly(dtype, simd):
    inputs = made(normed(2, 6, 5, 4, 24), dtype)
    x, scale, shift = (inputs[name] for name in ("x", "scale", "shift"))
    whole = ops.group_norm_silu(x, scale, shift)
    parts = []
    front = None
    for piece in halves(x):
        parts.append(ops.group_norm_silu(piece, scale, shift, front))
        front = parts[-1][:, -2:]
    later = [part[:, 2:] for part in parts[1:]]  # without the frames in front
    assert torch.equal(torch.cat([parts[0], *later], 1), whole)
    no_frames = x[:, :0]
    assert torch.equal(ops.group_norm_silu(no_frames, scale, shift, front), front)
    strided = F.pad(front, (0, 3))[..., :24]  # pixels apart in memory
    continued = ops.group_norm_silu(x, scale, shift, front)
    assert torch.equal(ops.group_norm_silu(x, scale, shift, strided), continued)
    inside = whole[:, 2:, 1:-1, 1:-1]
    assert torch.equal(inside, ops.group_norm_silu(x, scale, shift, pad=False))


def test_empty():  # law 8
    assert ops.group_moments(torch.empty(2, 0, 3, 3, 8), 4).shape == (2, 0, 4, 2)
    assert ops.group_moments(torch.empty(1, 2, 0, 3, 8), 4).isnan().all()  # the mean of nothing
    vector = torch.ones(1, 8)
    no_rows = torch.empty(1, 2, 0, 3, 8)
    out = ops.group_norm_silu(no_rows, vector, vector, pad=False)
    assert out.shape == no_rows.shape
    no_vector = torch.empty(0, 8)
    no_samples = torch.empty(0, 2, 3, 3, 8)
    out = ops.group_norm_silu(no_samples, no_vector, no_vector)
    assert out.shape == (0, 4, 5, 5, 8)
    for shape in ((0, 2, 3, 8), (1, 0, 3, 8), (1, 2, 0, 8)):
        query = torch.empty(shape)
        key = torch.empty(shape[0], 2, 3, 8)
        out, lse = ops.frame_causal_attention(query, key, key, return_lse=True)
        assert out.shape == shape
        assert lse.shape == shape[:3]


def test_attention_merges_ranges_of_keys(simd):
    """Two results over parts of the keys merge into one over all of them, by log-sum-exp.

    The queries are frames 2 to 4 of five. One result sees the two earlier frames whole, as one long
    frame; the other sees frames 2 to 4 causally.
    """
    inputs = made(frames(2, 3, 7, 16, first_frame=2))
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    whole, whole_lse = ops.frame_causal_attention(query, key, value, first_frame=2, return_lse=True)
    earlier = (query, key[:, :2], value[:, :2])
    long_frames = [x.flatten(1, 2)[:, None] for x in earlier]  # [B, 1, T * P, D]
    early, early_lse = ops.frame_causal_attention(*long_frames, return_lse=True)
    early = early.view(query.shape)  # [B, T, P, D]
    early_lse = early_lse.view(query.shape[:3])  # [B, T, P]
    late, late_lse = ops.frame_causal_attention(
        query,
        key[:, 2:],
        value[:, 2:],
        return_lse=True,
    )
    lse = torch.logaddexp(early_lse, late_lse)
    early_share = (early_lse - lse).exp()[..., None]
    late_share = (late_lse - lse).exp()[..., None]
    out = early * early_share + late * late_share
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(out, whole)


def check_pieces(attention, query, key, value):
    """A frame alone has the bits that it has among others; later values reach no earlier frame."""
    whole, lse = attention(query, key, value, 0, 0.2)
    for t in range(query.shape[1]):
        out, part = attention(query[:, t : t + 1], key, value, t, 0.2)
        assert torch.equal(out, whole[:, t : t + 1])
        assert torch.equal(part, lse[:, t : t + 1])
    value[:, 2] = math.nan
    out, _ = attention(query, key, value, 0, 0.2)
    assert torch.equal(out[:, :2], whole[:, :2])
    assert out[:, 2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("P", [11, 70, 300])
def test_attention_frames_do_not_depend_on_the_piece(P, dtype, simd):  # law 12
    """Blocks of keys end inside frames, and a frame is several tasks."""
    inputs = made(frames(1, 4, P, 24), dtype)
    check_pieces(torch.ops.kandinsky_kernels.frame_causal_attention, *inputs.values())


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_reference_attention_frames_do_not_depend_on_the_piece(rows, monkeypatch):  # law 12
    monkeypatch.setattr(reference, "_QUERIES", rows)
    check_pieces(reference.frame_causal_attention, *made(frames(1, 4, 11, 24)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_several_tasks(dtype, simd):  # law 1
    """A frame is three tasks, the last one short, and has several blocks of keys.

    Tokens lie apart in memory, as one projection to query, key and value leaves them.
    """
    case = Case(
        "frame_causal_attention",
        "tasks",
        frames(2, 2, 530, 24, lse=True),
        dtype,
    )
    inputs = case.inputs()
    packed = torch.stack([inputs[name] for name in ("query", "key", "value")], 3)  # [B, T, P, 3, D]
    inputs |= dict(
        zip(
            ("query", "key", "value"),
            packed.unbind(3),
            strict=True,
        )
    )
    case.check(case.run(inputs), inputs)


@pytest.mark.parametrize("poison", ["query", "key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_attention_of_non_finite_numbers(poison, value, simd):  # law 9
    """In a query they stay in its row; in a key or value they reach its frame and later ones."""
    case = Case(
        "frame_causal_attention",
        "non_finite",
        frames(1, 3, 70, 24, lse=True),
        FP32,
    )
    inputs = case.inputs()
    clean = case.run(inputs)
    inputs[poison][0, 1, 33, 5] = value
    dirty = case.run(inputs)
    exact = case.exact(inputs)
    touched = torch.zeros(1, 3, 70, dtype=torch.bool)
    touched[0, 1, 33 if poison == "query" else slice(None)] = True
    touched[0, 2] = poison != "query"
    for ours, oracle, before in zip(dirty, exact, clean, strict=True):
        assert torch.equal(ours.isnan(), oracle.isnan())
        assert torch.equal(ours.isinf(), oracle.isinf())
        assert torch.equal(ours[~touched], before[~touched])
    assert not dirty[0][touched].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, 1e4])
def test_attention_of_extremes(scale, simd):  # law 10
    """From uniform weights to one-hot ones, without overflow."""
    case = Case(
        "frame_causal_attention",
        "extreme",
        frames(1, 2, 70, 24, lse=True),
        FP32,
    )
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
        torch.randn(
            1,
            2,
            3,
            4,
            dtype=torch.float64,
            requires_grad=True,
        )
        for _ in range(3)
    )
    assert torch.autograd.gradcheck(
        lambda *qkv: ops.frame_causal_attention(*qkv, return_lse=True), (query, key, value)
    )


@pytest.mark.parametrize(
    "stride",
    [
        (1, 1, 1),
        (2, 2, 2),
        (1, 2, 2),
    ],
)
@pytest.mark.parametrize("limit", [2**31 - 1, 3 * 2 * 6 * 5 * 8, 1])
def test_convolution_in_pieces(stride, limit, monkeypatch):  # law 13
    monkeypatch.setattr(reference, "INDEXABLE", limit)
    x = torch.randn(2, 9, 6, 5, 8)
    weight = torch.randn(4, 8, 3, 3, 3)
    bias = torch.randn(4)
    calls = []
    monkeypatch.setattr(
        reference,
        "_conv3d",
        lambda *args, conv=reference._conv3d: calls.append(args[0].shape[2]) or conv(*args),
    )
    out = ops.causal_conv3d(x, weight, bias, stride)
    monkeypatch.undo()

    def torch_way(x, weight, bias):
        planes = x.permute(0, 4, 1, 2, 3)  # [B, C, T, Y, X]
        return F.conv3d(planes, weight, bias, stride).permute(0, 2, 3, 4, 1).contiguous()

    exact, peer = (
        torch_way(x.to(dtype), weight.to(dtype), bias.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert_faithful(out, exact, peer)
    assert (calls == [9]) == (limit == 2**31 - 1)
    assert limit > 1 or set(calls) == {3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_of_narrow_numbers_is_rounded_once(dtype):
    x, weight, bias = (
        torch.randn(shape).to(dtype)
        for shape in (
            (1, 4, 6, 5, 8),
            (4, 8, 3, 3, 3),
            (4,),
        )
    )
    exact = ops.causal_conv3d(x.double(), weight.double(), bias.double())
    assert_faithful(ops.causal_conv3d(x, weight, bias), exact, exact.to(dtype))


X = torch.zeros(2, 3, 4, 5, 8)
V = torch.zeros(2, 8)
Q = torch.zeros(1, 2, 3, 8)
MISUSE = [
    (
        lambda: ops.group_moments(X[0], 2),
        ValueError,
        r"x must have shape \[B, T, Y, X, C\], got \[3, 4, 5, 8\]",
    ),
    (
        lambda: ops.group_moments(X.int(), 2),
        TypeError,
        "x must be float32, .*, got int32; cast it first",
    ),
    (
        lambda: ops.group_moments(X.transpose(3, 4), 5),
        ValueError,
        "x must be contiguous in its last dimension",
    ),
    (
        lambda: ops.group_moments(X, 3),
        ValueError,
        "groups must divide the 8 channels of x, got 3",
    ),
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
        r"scale must have shape \[2, 8\], got \[1, 8\]",
    ),
    (
        lambda: ops.group_norm_silu(X, V, V.int()),
        TypeError,
        "shift must be float32, .*, got int32",
    ),
    (
        lambda: ops.group_norm_silu(X[:, :0], V, V),
        ValueError,
        r"x must have a pixel to repeat, got \[2, 0, 4, 5, 8\]; give pad=False",
    ),
    (
        lambda: ops.group_norm_silu(X, V, V, X),
        ValueError,
        r"front must have shape \[2, 2, 6, 7, 8\], got \[2, 3, 4, 5, 8\]",
    ),
    (
        lambda: ops.group_norm_silu(X, V, V, torch.zeros(2, 2, 6, 7, 8).half()),
        TypeError,
        "front must be float32, got float16",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q.half()),
        TypeError,
        "value must be float32, got float16",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q[:, :1]),
        ValueError,
        r"value must have shape \[1, 2, 3, 8\], got \[1, 1, 3, 8\]",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q[:, :, :0], Q[:, :, :0]),
        ValueError,
        r"key must have a token in every frame, got \[1, 2, 0, 8\]",
    ),
    (
        lambda: ops.frame_causal_attention(Q, Q, Q, first_frame=1),
        ValueError,
        "first_frame >= 0 earlier ones, got 2 frames for 2 and 1",
    ),
    (
        lambda: ops.causal_conv3d(X, torch.zeros(4, 7, 3, 3, 3)),
        ValueError,
        r"weight must have shape .* with C = 8",
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
    assert str(caught.value).count(". ") == 0
    assert "\n" not in str(caught.value)
