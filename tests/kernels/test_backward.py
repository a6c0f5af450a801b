# SPDX-License-Identifier: Apache-2.0
"""The gradients of the operators.

Their formulas are the derivatives of the references; kernels compute them faithfully and with the
same bits every time.
"""

import math
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import Library, opcheck
from torch.profiler import ProfilerActivity, profile

import kandinsky_kernels as ops
from kandinsky_kernels import _guard, _library, nabla, reference, tuning
from kandinsky_kernels.launch import nabla as launch_nabla
from kandinsky_model.dit.geometry import Grid

from ..cases import BF16, FP32, OPERATORS, attention, heads, rows, tensors
from ..conftest import needs_triton
from ..support import laws
from ..support.backward import BACKWARDS, INPUTS, Backward, without_gradients
from ..support.laws import NOT_ARITHMETIC, permuted, same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIBRARY = torch.ops.kandinsky_kernels
ODD = {case.op: case for case in BACKWARDS if case.dtype == FP32 and case.size in ("odd", "ragged")}
by_op = pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
needs_extension = pytest.mark.skipif(
    _library.extension is None, reason="the compiled extension is not built"
)


def kernel_of(case):
    return case.op.replace("_means", "")


@pytest.fixture
def references():
    """Let the references run in both directions on the CPU, in place of the kernels.

    Fp64 inputs go through the backward references too, instead of PyTorch's own derivatives.
    """
    library = Library("kandinsky_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for case in ODD.values():
            for op in {kernel_of(case), kernel_of(case.forward)}:
                library.impl(op, getattr(reference, op), "CPU", allow_override=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "in_double", lambda *_: False)
        yield
    library._destroy()


@pytest.mark.parametrize(
    "case", [case for case in BACKWARDS if case.dtype == FP32], ids=lambda case: case.id
)
def test_formulas_are_the_derivatives_of_the_references(case, request):
    """They agree to the last digits with PyTorch's own derivatives of the references, in fp64."""
    inputs = case.inputs()
    inputs = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    exact = case.run(inputs)
    request.getfixturevalue("references")
    for actual, wanted in zip(case.run(inputs), exact, strict=True):
        assert actual.dtype == torch.float64
        assert (actual - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max())


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_formulas_are_the_numerical_derivatives(references):
    x, branch, *vectors = doubles(
        (1, 3, 6),
        (1, 3, 6),
        (1, 6),
        (1, 6),
        (1, 6),
    )
    assert torch.autograd.gradcheck(ops.modulated_norm, (x, *vectors[:2]))
    assert torch.autograd.gradcheck(ops.gated_add_norm, (x, branch, *vectors))
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.gated_add_norm(*inputs)[0], (x, branch, vectors[0])
    )
    q, weight = doubles((1, 3, 2, 4), (4,))
    angles = torch.rand(3, 2)
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    rotary = ops.Rotary.per_token(angles.cos(), angles.sin())
    assert torch.autograd.gradcheck(lambda *inputs: ops.norm_rope(*inputs, rotary), (q, weight))
    assert torch.autograd.gradcheck(
        lambda *inputs: ops.norm_rope_means(*inputs, rotary, offsets), (q, weight)
    )


# The second row is empty, and so is the third column.
EMPTY_ROWS = torch.tensor(
    [
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 0, 1],
    ],
    dtype=torch.bool,
)


def test_attention_with_empty_rows_and_columns_is_the_numerical_derivative(references):
    inputs = doubles(*[(1, 9, 1, 3)] * 3)
    offsets = torch.tensor([0, 3, 5, 6, 9], dtype=torch.int32)
    selection = ops.pack_selection(EMPTY_ROWS[None, None])

    def outputs(*inputs):
        out, lse = ops.block_sparse_attention(*inputs, selection, offsets, return_lse=True)
        return out, lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("case", BACKWARDS, ids=lambda case: case.id)
def test_faithful(case, simd):  # laws 1 and 3
    inputs = case.inputs()
    case.check(case.run(inputs), inputs)


@needs_extension
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nothing_flows_into_empty_rows_and_columns(dtype, simd):  # law 9
    case = Backward(
        "block_sparse_attention_backward", "empty", attention(1, 2, Grid(1, 12, 20), 64, 1.0), dtype
    )
    inputs = case.inputs()
    keep = torch.rand(1, 2, 6, 6) < 0.6
    keep[:, 1, 2] = False
    keep[:, 1, :, 4] = False
    inputs["selection"] = ops.pack_selection(keep)
    gradients = case.run(inputs)
    exact = case.exact(inputs)
    starts = inputs["block_offsets"].tolist()
    empty = slice(*starts[2:4])
    unseen = slice(*starts[4:6])
    assert not gradients[0][:, empty, 1].any()
    assert not gradients[1][:, unseen, 1].any()
    assert not gradients[2][:, unseen, 1].any()
    for actual, wanted in zip(gradients, exact, strict=True):
        assert wanted[:, :, 1].any()
        assert (actual - wanted).abs().max() <= (
            2e-6 if dtype == FP32 else 2e-2
        ) * wanted.abs().max()


@by_op
def test_kernels_run_in_both_directions(case, simd):  # law 2
    assert ops.kernels()[kernel_of(case)]["cpu"] == f"cpp ({simd})"
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        backward = case.ready(case.operator.call, case.inputs())
        backward()
    ran = {event.key for event in trace.key_averages()}
    assert {
        f"kandinsky_kernels::{kernel_of(case)}",
        f"kandinsky_kernels::{kernel_of(case.forward)}",
    } <= ran
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        backward()
    ran = {
        event.key.removeprefix("aten::")
        for event in trace.key_averages()
        if event.key.startswith("aten::")
    }
    # PyTorch's own operators spread the gradients of means over their blocks.
    if case.op != "norm_rope_means_backward":
        assert ran <= NOT_ARITHMETIC | {"to"}, "the reference ran"  # which changes nothing


@by_op
def test_views(case):  # law 5
    laws.views(case)


@by_op
def test_guard_bands(case):  # law 7
    laws.guard_bands(case)


@by_op
def test_deterministic(case):  # law 11
    laws.determinism(case)


@by_op
def test_a_gradient_of_any_layout(case):  # as sums and transposes make them
    inputs = case.inputs()
    plain = case.run(inputs | {"grad_0": torch.ones_like(inputs["grad_0"])})
    same(case.run(inputs | {"grad_0": torch.ones(()).expand(inputs["grad_0"].shape)}), plain)
    same(case.run(inputs | {"grad_0": torch.ones_like(inputs["grad_0"].mT).mT}), plain)


@needs_extension
def test_attention_in_strips(simd):
    """More pairs of blocks than fit into one strip of stored changes.

    A head's bits do not depend on where in the strips it comes.
    """
    N = 60
    offsets = torch.arange(0, 2 * N + 1, 2, dtype=torch.int32)
    keep = torch.rand(1, 2, N, N) < 0.9
    assert keep.sum() > 4 * 1024
    case = Backward(
        "block_sparse_attention_backward",
        "strips",
        lambda g: {
            **{
                name: torch.randn(1, 2 * N, 2, 20, generator=g)
                for name in ("query", "key", "value")
            },
            "selection": ops.pack_selection(keep),
            "block_offsets": offsets,
        },
        FP32,
    )
    inputs = case.inputs()
    together = case.run(inputs)
    case.check(together, inputs)
    for head in range(2):
        one = {name: x[:, :, head : head + 1] if x.dim() == 4 else x for name, x in inputs.items()}
        one["selection"] = inputs["selection"][:, head : head + 1]
        same(case.run(one), [x[:, :, head : head + 1] for x in together])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, 1e4])
def test_extremes(scale, simd):  # law 10
    """From uniform weights to one-hot ones.

    Besides the peer's error, that of the rounded log-sum-exp is allowed.
    """
    case = ODD["block_sparse_attention_backward"]
    inputs = case.inputs()
    inputs["query"] = inputs["query"] * scale
    *_, lse = case.forward.run(without_gradients(inputs))
    rounding = torch.finfo(FP32).eps * (8 + lse.abs().max())
    gradients = case.run(inputs)
    exact = case.exact(inputs)
    peer = case.ready(case.operator.peer, inputs)()
    for actual, wanted, other in zip(gradients, exact, peer, strict=True):
        assert actual.isfinite().all()
        assert (actual - wanted).abs().max() <= 2 * (
            other - wanted
        ).abs().max() + rounding * wanted.abs().max()


@pytest.mark.parametrize("D, full", [(64, True), (96, False)])
def test_triton_of_strided_inputs_with_empty_rows_and_columns(D, full, monkeypatch):
    """Two launches of one head each, by descriptors where blocks are full, repeat their bits."""
    needs_triton()
    monkeypatch.setattr(tuning, "LIST_BYTES", 1)
    launch = tuning.Launch(4, 2, descriptors=full)
    monkeypatch.setattr(tuning, "attention_backward", lambda *_: (launch, launch))
    inputs = attention(
        1,
        2,
        Grid(1, 8, 24) if full else Grid(1, 9, 20),
        D,
        0.7,
    )(torch.Generator().manual_seed(2))
    # [B, S, 3, H, D], as one projection gives
    packed = torch.stack([inputs[name] for name in ("query", "key", "value")], 2).to(DEVICE)
    keep = torch.ones(
        1,
        2,
        *[len(inputs["block_offsets"]) - 1] * 2,
        dtype=torch.bool,
    )
    keep[0, 1, 1] = False
    keep[0, 0, :, 2] = False
    selection = ops.pack_selection(keep).to(DEVICE)
    offsets = inputs["block_offsets"].to(DEVICE)
    out, lse = nabla.reference.block_sparse_attention(*packed.unbind(2), selection, offsets, 0.2)
    args = (
        *packed.unbind(2),
        out,
        lse,
        selection,
        offsets,
        torch.randn_like(out),
        torch.randn_like(lse),
        0.2,
    )
    gradients = launch_nabla.launch_gradients(*args)
    exact = nabla.reference.block_sparse_attention_backward(*(_guard._double(x) for x in args))
    for actual, wanted in zip(gradients, exact, strict=True):
        assert (actual - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    assert all(
        torch.equal(*pair)
        for pair in zip(gradients, launch_nabla.launch_gradients(*args), strict=True)
    )
    empty = slice(*offsets[1:3].tolist())
    unseen = slice(*offsets[2:4].tolist())
    assert not gradients[0][:, empty, 1].any()
    assert not any(gradient[:, unseen, 0].any() for gradient in gradients[1:])


EMPTY = {
    "modulated_norm": rows(2, 0, 8),
    "gated_add_norm": rows(2, 0, 8, branch=True),
    "norm_rope": heads(2, 0, 3, 8),
}


@pytest.mark.parametrize("op", EMPTY)
def test_empty(op):  # law 8
    case = Backward(f"{op}_backward", "empty", EMPTY[op], FP32)
    inputs = case.inputs()
    for name, gradient in zip(
        (name for name in INPUTS[op] if name in inputs), case.run(inputs), strict=True
    ):
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()


def test_attention_without_tokens_or_samples():  # law 8
    for B, S in ((2, 0), (0, 4)):
        x = torch.empty(B, S, 2, 16, requires_grad=True)
        N = S // 4
        selection = torch.empty(B, 2, N, N, dtype=torch.int32)
        offsets = torch.arange(0, S + 1, 4, dtype=torch.int32)
        ops.block_sparse_attention(x, x, x, selection, offsets).sum().backward()
        assert x.grad.shape == x.shape


def test_only_what_is_asked_for_is_recorded():
    q, k, v = (torch.randn(1, 64, 1, 8) for _ in range(3))
    args = torch.ones(1, 1, 1, 1, dtype=torch.int32), torch.tensor([0, 64], dtype=torch.int32)
    assert not ops.block_sparse_attention(q, k, v, *args).requires_grad
    k.requires_grad_()
    out, lse = ops.block_sparse_attention(q, k, v, *args, return_lse=True)
    (gradient,) = torch.autograd.grad(lse.sum(), k)
    assert out.requires_grad
    assert gradient.any()
    assert q.grad is None
    assert not ops.select_blocks(q.transpose(1, 2), k.transpose(1, 2), 0.5).requires_grad
    with torch.no_grad():
        assert not ops.block_sparse_attention(q, k, v, *args).requires_grad


def backward_arguments(case, inputs):
    """The arguments of the backward operator's schema."""
    outputs = case.forward.run(without_gradients(inputs))
    given = {
        "cos": None,
        "sin": None,
        "positions": None,
        "pairs": (),
        "eps": 1e-5,
        "y": outputs[0],
        "out": outputs[0],
        "lse": outputs[-1],
    }
    given |= {
        "grad": inputs["grad_0"],
        "grad_y": inputs["grad_0"],
        "grad_normed": inputs.get("grad_1"),
    } | inputs
    if "attention" in case.op:
        given |= {"grad_out": inputs["grad_0"], "grad_lse": inputs.get("grad_1"), "scale": 0.125}
    schema = getattr(LIBRARY, kernel_of(case)).default._schema
    return tuple(given[argument.name] for argument in schema.arguments)


@by_op
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(case, layout):  # law 16
    inputs = case.inputs()
    if layout == "permuted":
        inputs |= {name: permuted(x) for name, x in tensors(inputs).items()}
    operator = getattr(LIBRARY, kernel_of(case)).default
    assert set(opcheck(operator, backward_arguments(case, inputs)).values()) == {"SUCCESS"}


@by_op
def test_opcheck_of_what_is_differentiated(case):  # law 16
    inputs = case.inputs()
    leaves = {name: inputs[name].requires_grad_() for name in INPUTS[case.forward.op]}
    names = [
        argument.name
        for argument in getattr(LIBRARY, kernel_of(case.forward)).default._schema.arguments
    ]
    given = {
        "cos": None,
        "sin": None,
        "positions": None,
        "pairs": (),
        "block_offsets": None,
        "eps": 1e-5,
        "logit_bound": math.inf,
    }
    given |= inputs | leaves | ({"scale": 0.125} if "attention" in case.op else {})
    operator = getattr(LIBRARY, kernel_of(case.forward)).default
    assert set(opcheck(operator, tuple(given[name] for name in names)).values()) == {"SUCCESS"}


LENGTHS = (40, 56, 70)
TRAINED = {
    "modulated_norm": [rows(1, S, 64) for S in LENGTHS],
    "gated_add_norm": [rows(1, S, 64, branch=True) for S in LENGTHS],
    "norm_rope": [heads(1, S, 3, 16) for S in LENGTHS],
    "norm_rope_means": [heads(1, S, 3, 16, block=7) for S in LENGTHS],
    "block_sparse_attention": [attention(1, 3, Grid(T, 9, 5), 16, 0.5) for T in (4, 10, 14)],
}


@pytest.mark.parametrize("op", TRAINED)
def test_compiles_once_for_all_lengths(op):  # law 17
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        OPERATORS[op].call,
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    graphs = []
    for make in TRAINED[op]:
        case = Backward(f"{op}_backward", "compiled", make, FP32)
        inputs = case.inputs()
        with torch._functorch.config.patch(donated_buffer=False):  # the graph is kept
            same(case.ready(compiled, inputs)(), case.run(inputs))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "another length compiled again"


Q = torch.zeros(1, 70, 2, 8)
BITS = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
OFFSETS = torch.tensor([0, 64, 70], dtype=torch.int32)
LSE = torch.zeros(1, 2, 70)


@needs_extension
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"block_offsets": torch.tensor([0, 65, 70], dtype=torch.int32)},
            "in blocks of 1 to 64 tokens",
        ),
        ({"value": Q[:, :69]}, r"value must have shape \[1, 70, 2, 8\]"),
        ({"grad_out": Q[..., :7]}, r"grad_out must have shape"),
        ({"out": Q[:, :1]}, "out must have shape"),
        (
            {"lse": LSE[..., 1:]},
            r"lse must have shape "
            r"\[1, 2, 70\]",
        ),
        ({"grad_lse": LSE[:, 1:]}, "grad_lse must have shape"),
        ({"selection": BITS[..., :1, :]}, r"selection must have shape \[1, 2, 2, 1\]"),
    ],
)
def test_the_kernel_refuses_what_would_corrupt_memory(change, text):  # law 20
    given = {
        "query": Q,
        "key": Q,
        "value": Q,
        "out": Q,
        "lse": LSE,
        "selection": BITS,
        "block_offsets": OFFSETS,
        "grad_out": Q,
        "grad_lse": None,
        "scale": 1.0,
    }
    with pytest.raises((ValueError, TypeError), match=text):
        LIBRARY.block_sparse_attention_backward(**given | change)


X = torch.zeros(1, 3, 8)
HEADS_4 = torch.zeros(1, 3, 2, 4)
VECTOR = torch.zeros(1, 8)


@needs_extension
@pytest.mark.parametrize(
    ("op", "change", "text"),
    [
        (
            "modulated_norm",
            {"scale": VECTOR[:, 1:]},
            r"scale must have shape \[1, 8\], got \[1, 7\]",
        ),
        ("modulated_norm", {"grad": X[:, 1:]}, r"grad must have shape \[1, 3, 8\]"),
        ("modulated_norm", {"grad": X.half()}, "grad must have the dtype"),
        (
            "modulated_norm",
            {"x": X.mT.contiguous().mT},
            "x must be contiguous in its last dimension",
        ),
        ("gated_add_norm", {"branch": X[..., 1:]}, "branch must have shape"),
        ("gated_add_norm", {"gate": VECTOR[0]}, "gate must have shape"),
        ("gated_add_norm", {"grad_y": X.double()}, "grad_y must have the dtype of y"),
        ("gated_add_norm", {"y": X[0]}, r"y must have shape \[B, S, C\]"),
        ("norm_rope", {"weight": VECTOR[0]}, r"weight must have shape \[4\]"),
        ("norm_rope", {"grad": HEADS_4[:, :2]}, "grad must have shape"),
        (
            "norm_rope",
            {"positions": torch.full((3, 1), 5, dtype=torch.int32)},
            "positions must lie in the tables' rows 0 to 4",
        ),
        ("norm_rope", {"sin": None}, "must be given together"),
    ],
)
def test_the_kernels_of_norms_refuse_what_would_corrupt_memory(op, change, text):  # law 20
    table = torch.zeros(5, 2)
    positions = torch.zeros(3, 1, dtype=torch.int32)
    given = {
        "modulated_norm": {"x": X, "scale": VECTOR, "grad": X},
        "gated_add_norm": {
            "y": X,
            "branch": X,
            "gate": VECTOR,
            "scale": VECTOR,
            "grad_y": None,
            "grad_normed": X,
        },
        "norm_rope": {
            "x": HEADS_4,
            "weight": VECTOR[0, :4],
            "cos": table,
            "sin": table,
            "positions": positions,
            "pairs": [2],
            "grad": HEADS_4,
        },
    }[op]
    with pytest.raises((ValueError, TypeError), match=text):
        getattr(LIBRARY, f"{op}_backward")(**given | change, eps=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e18, 1e25])
def test_gradients_of_rows_of_any_size(size, simd):  # law 10
    """Squares overflow and underflow; the last row is constant, and its deviation is eps."""
    x = torch.cat([torch.randn(1, 5, 24) * size, torch.full((1, 1, 24), 3.0)], 1)
    scale = torch.randn(1, 24)
    grad = torch.randn(1, 6, 24)
    exact = reference.modulated_norm_backward(
        x.double(),
        scale.double(),
        grad.double(),
        1e-5,
    )
    for actual, wanted in zip(
        LIBRARY.modulated_norm_backward(x, scale, grad, 1e-5), exact, strict=True
    ):
        if actual.shape == x.shape:  # row by row, as they differ by many powers of ten
            assert (
                (actual - wanted).abs().amax(-1)
                <= 4e-6 * wanted.abs().amax(-1) + torch.finfo(FP32).tiny
            ).all()
        else:
            assert (actual - wanted).abs().max() <= 4e-6 * wanted.abs().max()
