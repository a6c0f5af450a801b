# SPDX-License-Identifier: Apache-2.0
"""The laws that every operator keeps on the CPU, for every case of the table.

The numbers of laws are those of tests/README.md.
"""

import math
import pkgutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import kandinsky_kernels as ops
from kandinsky_kernels import tuning
from kandinsky_model.dit.geometry import Grid

from ..cases import (
    CASES,
    FP32,
    OPERATORS,
    Case,
    as_tuple,
    attention,
    frames,
    heads,
    means,
    normed,
    rows,
    tensors,
    video,
)

by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ODD = {
    case.op: case
    for case in CASES
    if case.dtype == FP32 and case.size in ("odd", "ragged", "peaked")
}
by_op = pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
NORMS = ("modulated_norm", "gated_add_norm", "norm_rope")
NOT_ARITHMETIC = {
    "new_empty",
    "new_zeros",
    "empty",
    "empty_like",
    "empty_strided",
    "fill_",
    "zero_",
    "contiguous",
    "clone",
    "copy_",
    "select",
    "slice",
    "narrow",
    "as_strided",
    "transpose",
}
LIBRARY = torch.ops.kandinsky_kernels


def same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(1e30), e.nan_to_num(1e30)), (
            f"differ by up to {(a.double() - e.double()).abs().amax():.3g}"
        )


def framed(x, sentinel=-7.0):
    """A copy of x inside a larger buffer of sentinels, and that buffer.

    The copy has an odd storage offset and padded outer strides; its last dimension is contiguous.
    """
    if not x.is_floating_point() or x.dim() < 2:
        return x, None
    shape = [size + 2 for size in x.shape]
    flat = torch.full((math.prod(shape) + 3,), sentinel, dtype=x.dtype)
    view = flat[3:].view(shape)[tuple(slice(1, -1) for _ in shape)]
    view.copy_(x)
    return view, flat


@by_id
def test_faithful(case, simd):  # laws 1 and 3
    inputs = case.inputs()
    case.check(case.run(inputs), inputs)


@pytest.mark.parametrize("case", ODD.values(), ids=ODD.keys())
def test_right_kernel_ran(case, simd):  # law 2
    name = case.op.removesuffix("_means")
    assert ops.kernels()[name]["cpu"] == f"cpp ({simd})"
    inputs = case.inputs()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        case.run(inputs)
    ran = [
        event.key
        for event in trace.key_averages()
        if event.key.startswith(("kandinsky_kernels::", "aten::"))
    ]
    assert f"kandinsky_kernels::{name}" in ran
    assert {op.removeprefix("aten::") for op in ran if op.startswith("aten::")} <= NOT_ARITHMETIC, (
        "the reference ran"
    )


@by_op
def test_views(case):  # law 5
    inputs = case.inputs()
    views = {name: framed(x)[0] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert any(not x.is_contiguous() for x in tensors(views).values())
    same(case.run(views), case.run(inputs))


def test_fresh_memory_is_poisoned():  # law 6 holds in every test if it holds here
    assert torch.empty(1000).isnan().all()


@by_op
def test_guard_bands(case):  # law 7
    inputs = case.inputs()
    frames = {name: framed(x) for name, x in tensors(inputs).items()}
    before = {name: flat.clone() for name, (_, flat) in frames.items() if flat is not None}
    case.run({**inputs, **{name: view for name, (view, _) in frames.items()}})
    for name, flat in before.items():
        assert torch.equal(frames[name][1], flat), f"{name} or its surroundings were written to"


EMPTY = {
    "modulated_norm": rows(2, 0, 8),
    "gated_add_norm": rows(2, 0, 8, branch=True),
    "norm_rope": heads(2, 0, 3, 8),
}


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty(op, dtype):  # law 8
    for make in (
        EMPTY[op],
        rows(0, 3, 8, branch=op == "gated_add_norm") if op != "norm_rope" else heads(0, 3, 2, 8),
    ):
        case = Case(op, "empty", make, dtype)
        inputs = case.inputs()
        for out in case.run(inputs):
            assert out.shape == inputs["x"].shape and out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_stays_in_its_row(op, value, simd):  # law 9
    case = ODD[op]
    inputs = case.inputs()
    clean = case.run(inputs)
    inputs["x"][1, 2].view(-1)[5] = value
    dirty = case.run(inputs)
    case.check(dirty, inputs)  # the same NaN and infinities as the oracle
    others = torch.ones(inputs["x"].shape[:2], dtype=torch.bool)
    others[1, 2] = False
    same([x[others] for x in dirty], [x[others] for x in clean])
    assert not dirty[-1][1, 2].isfinite().all()


EXTREMES = {
    "constant": lambda x: x.fill_(1234.567),
    "huge constant": lambda x: x.fill_(-3e38),
    "largest": lambda x: x.mul_(3.3e38 / x.abs().amax()),
    "overflowing squares": lambda x: x.mul_(1e25),
    "denormal": lambda x: x.mul_(1e-41),
    "zero": lambda x: x.zero_(),
    "far from zero": lambda x: x.mul_(1e-2).add_(1000.0),
    "tiny variance": lambda x: x.mul_(1e-6),
    "one outlier": lambda x: x[..., 3].fill_(1e6),
}


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(op, extreme, dtype, simd):  # law 10
    make = {
        "modulated_norm": rows(1, 4, 200),
        "gated_add_norm": rows(1, 4, 200, branch=True),
        "norm_rope": heads(1, 4, 2, 64),
    }[op]
    case = Case(op, extreme, make, dtype)
    inputs = case.inputs()
    EXTREMES[extreme](inputs["x"])
    inputs["x"] = inputs["x"].clamp(-3.38e38, 3.38e38)  # the largest bfloat16 and below
    if op == "gated_add_norm":
        inputs["gate"].zero_()  # the sum must not leave the range either
    operator = case.operator
    peer = as_tuple(operator.peer(**inputs))
    # Where the peer's squares overflow, it takes x scaled down: eps matters as little there.
    if not peer[-1].isfinite().all():
        exponent = math.frexp(inputs["x"].abs().amax().item())[1]
        peer = (
            *peer[:-1],
            as_tuple(operator.peer(**{**inputs, "x": inputs["x"] * 2.0 ** (20 - exponent)}))[-1],
        )
    operator.check(case.run(inputs), case.exact(inputs), peer, inputs)


@by_op
def test_deterministic(case):  # law 11
    inputs = case.inputs()
    threads = torch.get_num_threads()
    first = case.run(inputs)
    try:
        for attempt in range(10):
            torch.set_num_threads(1 + attempt % 3)
            same(case.run(inputs), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("piece", [slice(0, 1), slice(2, 3), slice(17, 40)])
def test_row_does_not_depend_on_its_neighbours(op, piece, simd):  # law 12
    make = {
        "modulated_norm": rows(1, 50, 133),
        "gated_add_norm": rows(1, 50, 133, branch=True),
        "norm_rope": heads(1, 50, 3, 38),
    }[op]
    case = Case(op, "sliced", make, FP32)
    inputs = case.inputs()
    whole = case.run(inputs)
    part = {
        name: x[:, piece] if name in ("x", "branch") else x[piece] if name == "positions" else x
        for name, x in inputs.items()
    }
    same(case.run(part), [x[:, piece] for x in whole])


@by_op
def test_sample_does_not_depend_on_its_batch(case, simd):  # law 12
    inputs = case.inputs()
    shared = ("weight", "cos", "sin", "positions", "block_offsets")
    second = {
        name: x[1:] if isinstance(x, torch.Tensor) and name not in shared else x
        for name, x in inputs.items()
    }
    same(case.run(second), [x[1:] for x in case.run(inputs)])


def schema_arguments(op, inputs):
    """The arguments of an operator's schema, from the inputs of its public function."""
    optional = ("scale", "shift", "cos", "sin", "positions", "block_offsets")
    given = {**dict.fromkeys(optional), "pairs": (), "eps": 1e-5, **inputs}
    given |= {"tiles": list(inputs.get("tiles") or ()), "window": list(inputs.get("window") or ())}
    given |= {
        "front": inputs.get("front"),
        "pad": inputs.get("pad", True),
        "silu": True,
        "first_frame": inputs.get("first_frame", 0),
    }
    if op.endswith("attention"):
        given |= {"scale": 0.125, "logit_bound": 100.0}
    schema = getattr(LIBRARY, op.removesuffix("_means")).default._schema
    return tuple(given[argument.name] for argument in schema.arguments)


def permuted(x):
    """The same values, dense, with the outer dimensions in another order in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


EMPTY_NABLA = {
    "select_blocks": means(0, 2, (1, 2, 2), 8, 0.5, (1, 3, 3)),
    "norm_rope_means": heads(0, 65, 2, 8, block=64),
}
EMPTY_VAE = {
    "group_moments": video(1, 0, 3, 4, 8, 2),
    "group_norm_silu": normed(0, 2, 3, 4, 8),
    "frame_causal_attention": frames(2, 0, 3, 8, 1),
}


@by_op
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "empty"])
def test_opcheck(case, layout):  # law 16
    inputs = case.inputs()
    if layout == "empty":
        if case.op == "block_sparse_attention":
            inputs = {
                name: x[:0] if isinstance(x, torch.Tensor) and x.dim() > 1 else x
                for name, x in inputs.items()
            }
        else:
            inputs = Case(
                case.op, layout, {**EMPTY, **EMPTY_NABLA, **EMPTY_VAE}[case.op], FP32
            ).inputs()
    if layout == "permuted":
        inputs |= {name: permuted(x) for name, x in tensors(inputs).items()}
    op = getattr(LIBRARY, case.op.removesuffix("_means")).default
    assert set(opcheck(op, schema_arguments(case.op, inputs)).values()) == {"SUCCESS"}


LENGTHS = (40, 56, 70)  # more than 32 blocks: one word per row would be a constant of the graph
COMPILED = {
    "modulated_norm": [rows(1, S, 64) for S in LENGTHS],
    "gated_add_norm": [rows(1, S, 64, branch=True) for S in LENGTHS],
    "norm_rope": [heads(1, S, 3, 16) for S in LENGTHS],
    "norm_rope_means": [heads(1, S, 3, 16, block=7) for S in LENGTHS],
    # Without a local window, whose tiles would be constants of the graph.
    "select_blocks": [means(1, 3, (1, 1, N), 16, 0.7) for N in LENGTHS],
    "block_sparse_attention": [attention(1, 3, Grid(T, 9, 5), 16, 0.5) for T in (4, 10, 14)],
    "group_moments": [video(1, 2, Y, 3, 8, 2) for Y in LENGTHS],
    "group_norm_silu": [normed(1, T, 3, 4, 8, front=True) for T in LENGTHS],
    "frame_causal_attention": [frames(1, T, 5, 16) for T in LENGTHS],
}


@pytest.mark.parametrize("op", COMPILED)
def test_compiles_once_for_all_lengths(op):  # law 17
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPERATORS[op].call, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for make in COMPILED[op]:
        case = Case(op, "compiled", make, FP32)
        same(as_tuple(compiled(**case.inputs())), case.run(case.inputs()))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "another length compiled again"


X = torch.zeros(2, 3, 8)
V = torch.zeros(2, 8)
Q = torch.zeros(2, 3, 4, 8)
ANGLE = torch.zeros(3, 4)
ROTARY = ops.Rotary.per_token(ANGLE, ANGLE)
MISUSE = [
    (
        lambda: ops.modulated_norm(X[0], V, V),
        ValueError,
        r"x must have shape \[B, S, C\], got \[3, 8\]",
    ),
    (
        lambda: ops.modulated_norm(X, V[:1], V),
        ValueError,
        r"scale must have shape \[2, 8\], got \[1, 8\]",
    ),
    (
        lambda: ops.modulated_norm(X, V, V[:, :7]),
        ValueError,
        r"shift must have shape \[2, 8\], got \[2, 7\]",
    ),
    (
        lambda: ops.modulated_norm(X.int(), V, V),
        TypeError,
        "x must be float32, .*, got int32; cast it first",
    ),
    (
        lambda: ops.modulated_norm(torch.zeros(2, 8, 3).mT, V, V),
        ValueError,
        "x must be contiguous in its last dimension",
    ),
    (
        lambda: ops.modulated_norm(X, torch.zeros(8, 2).mT, V),
        ValueError,
        "scale must be contiguous in its last dimension",
    ),
    (
        lambda: ops.gated_add_norm(X, X[:, :2], V),
        ValueError,
        r"branch must have shape \[2, 3, 8\], got \[2, 2, 8\]",
    ),
    (
        lambda: ops.gated_add_norm(X, X.bfloat16(), V),
        TypeError,
        "branch must be float32, got bfloat16",
    ),
    (
        lambda: ops.gated_add_norm(X, torch.zeros(2, 8, 3).mT, V),
        ValueError,
        "branch must be contiguous",
    ),
    (
        lambda: ops.gated_add_norm(X, X, V, scale=V),
        ValueError,
        "scale and shift must be given together",
    ),
    (
        lambda: ops.norm_rope(X, V[0]),
        ValueError,
        r"x must have shape \[B, S, H, D\] with even D",
    ),
    (
        lambda: ops.norm_rope(Q[..., :7], V[0, :7]),
        ValueError,
        "even D",
    ),
    (
        lambda: ops.norm_rope(Q, V[0, :4]),
        ValueError,
        r"weight must have shape \[8\], got \[4\]",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(cos=ANGLE[:, :3])),
        ValueError,
        r"cos must have shape \[3, 4\], got \[3, 3\]",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(sin=ANGLE[:2])),
        ValueError,
        r"sin must have shape \[3, 4\], got \[2, 4\]",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(cos=ANGLE.bfloat16())),
        TypeError,
        "cos must be float32",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(pairs=(1, 2))),
        ValueError,
        r"numbers from 0 on with sum D / 2 = 4, got \[1, 2\]",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(pairs=(1, 3))),
        ValueError,
        r"positions must have shape \[3, 2\], got \[3, 1\]",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(positions=ROTARY.positions.long())),
        TypeError,
        "positions must be int32, got int64",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(positions=ROTARY.positions + 1)),
        ValueError,
        "tables' rows 0 to 2",
    ),
    (
        lambda: ops.norm_rope(Q, V[0], ROTARY._replace(pairs=(1, 1, 1, 1))),
        ValueError,
        r"pairs must be 1 to 3 numbers, one for each axis, got \[1, 1, 1, 1\]",
    ),
    (
        lambda: ops.norm_rope_means(Q, V[0], None, torch.tensor([0, 3])),
        TypeError,
        "block_offsets must be int32, got int64",
    ),
    *[
        (
            lambda offsets=offsets: ops.norm_rope_means(
                Q, V[0], None, torch.tensor(offsets, dtype=torch.int32)
            ),
            ValueError,
            "block_offsets must ascend from 0 to the number of tokens 3",
        )
        for offsets in ([0, 2], [0, 2, 2, 3], [0, 4, 3], [1, 3], [0, 2, 4])
    ],
    (
        lambda: LIBRARY.modulated_norm(X, V[:, :4], V, 1e-5),
        ValueError,
        r"scale must have shape \[2, 8\], got \[2, 4\]",
    ),
    (
        lambda: LIBRARY.norm_rope(Q, V[0], ANGLE, ANGLE[:2], ROTARY.positions, (4,), None, 1e-5),
        ValueError,
        r"sin must have shape \[3, 4\]",
    ),
    (
        lambda: LIBRARY.norm_rope(Q, V[0], ANGLE, ANGLE, None, (), None, 1e-5),
        ValueError,
        "positions must be given together",
    ),
    (
        lambda: LIBRARY.norm_rope(Q, V[0], ANGLE, ANGLE, ROTARY.positions, (-1, 5), None, 1e-5),
        ValueError,
        "numbers from 0 on with sum D / 2 = 4, got",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), MISUSE)
def test_misuse_is_explained(call, error, text):  # law 20
    with pytest.raises(error, match=text):
        call()


def test_every_operator_has_cases():
    """The table, the schemas and the public functions have the same operators.

    Those whose kernel is PyTorch's own have no rows in the table.
    """
    declared = set(ops.kernels()) - tuning.PYTORCH
    assert {case.op.removesuffix("_means") for case in CASES} == {
        op for op in declared if not op.endswith("_backward")
    }
    assert all(callable(getattr(ops, name)) for name in OPERATORS)
    assert {module.name for module in pkgutil.iter_modules(ops.__path__)} >= {
        "norm",
        "nabla",
        "vae",
        "reference",
    }
