# SPDX-License-Identifier: Apache-2.0
"""What operators refuse, in the same words by kernels and references.

That is offsets and positions that point elsewhere, numbers whose products overflow, other shapes
and dtypes, and results that do not fit into memory.
"""

import math

import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import _library, reference

LIBRARY = torch.ops.kandinsky_kernels
HUGE = 2**63 - 1

X = torch.randn(1, 100, 1, 8)
ROWS = torch.randn(2, 3, 8)
V = torch.randn(2, 8)
TABLE = torch.randn(3, 4)
Q = torch.randn(1, 2, 1, 8)
FALLING = [0, 200_000, 100]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(offsets, **changed):
    N = len(offsets) - 1
    made = {"query": X, "key": X, "value": X} | changed
    selection = torch.full(
        (1, 1, N, -(-N // 32)),
        -1,
        dtype=torch.int32,
    )
    return *made.values(), selection, int32(*offsets), 0.3, math.inf


def attention_gradient(offsets, grad=X, lse_grad=None):
    query, key, value, selection, block_offsets, scale, _ = attention(offsets)
    lse = torch.zeros(1, 1, 100)
    return query, key, value, X, lse, selection, block_offsets, grad, lse_grad, scale


def choice(keep_mass=0.9, tiles=(), window=(), ties="all", N=1):
    means = torch.randn(1, 1, N, 8)
    return means, means, keep_mass, list(tiles), list(window), ties


def rope(positions=(0, 1, 2), pairs=(4,), axes=1, offsets=None):
    made = int32(*positions)[:, None].expand(-1, axes).contiguous()
    blocks = None if offsets is None else int32(*offsets)
    x = torch.randn(1, len(positions), 1, 8)
    return x, V[0], TABLE, TABLE, made, list(pairs), blocks, 1e-6


OFFSETS = "block_offsets must ascend from 0 to the number of tokens 100 without empty blocks"
BLOCKS = "block_offsets must ascend from 0 to S = 100 in blocks of 1 to 64 tokens"
PAIRS = r"pairs must be numbers from 0 on with sum D / 2 = 4, got \["
TILES = "tiles must be three numbers from 1 on with product N = "
PLACES = "positions must lie in the tables' rows 0 to 2"
REFUSED = {
    **{
        f"means of {offsets}": (
            "norm_rope",
            lambda offsets=offsets: (
                X,
                V[0],
                None,
                None,
                None,
                [],
                int32(*offsets),
                1e-6,
            ),
            ValueError,
            OFFSETS,
        )
        for offsets in (
            FALLING,
            [0, 60, 60, 100],
            [0, 99],
            [0, 101],
            [1, 100],
            [0, -5, 100],
            [0],
        )
    },
    **{
        f"attention over {offsets}": (
            "block_sparse_attention",
            lambda offsets=offsets: attention(offsets),
            ValueError,
            BLOCKS,
        )
        for offsets in (
            FALLING,
            [0, 100],
            [0, 50, 50, 100],
            [0, 50, 101],
            [0, 2**31 - 1, 100],
        )
    },
    "gradient over falling offsets": (
        "block_sparse_attention_backward",
        lambda: attention_gradient(FALLING),
        ValueError,
        BLOCKS,
    ),
    "negative position": ("norm_rope", lambda: rope((0, -1, 2)), ValueError, PLACES),
    "position beyond": ("norm_rope", lambda: rope((0, 1, 3)), ValueError, PLACES),
    "pairs whose sum overflows": (
        "norm_rope",
        lambda: rope(pairs=(HUGE, HUGE, 6), axes=3),
        ValueError,
        PAIRS,
    ),
    "negative pairs": ("norm_rope", lambda: rope(pairs=(-1, 5), axes=2), ValueError, PAIRS),
    "tiles whose product overflows": (
        "select_blocks",
        lambda: choice(tiles=(7, 0x6DB6DB6DB6DB6DB7, 1), window=[100] * 3),
        ValueError,
        TILES,
    ),
    "negative tiles": (
        "select_blocks",
        lambda: choice(tiles=(-1, -1, 6), window=[1] * 3, N=6),
        ValueError,
        TILES,
    ),
    "tiles of no blocks": (
        "select_blocks",
        lambda: choice(tiles=(1 << 32, 1 << 32, 1 << 32), window=[2] * 3, N=0),
        ValueError,
        TILES,
    ),
    "a window of nothing": (
        "select_blocks",
        lambda: choice(tiles=(1, 2, 3), window=(1, 0, 1), N=6),
        ValueError,
        TILES,
    ),
    **{
        f"mass {mass}": (
            "select_blocks",
            lambda mass=mass: choice(mass, ties="stable"),
            ValueError,
            r"keep_mass must be in \(0, 1\], got",
        )
        for mass in (-math.inf, -1e308, math.nan, math.inf, 0.0, 1.5)
    },
    "other ties": ("select_blocks", lambda: choice(ties="some"), ValueError, "ties must be"),
    "frames whose sum overflows": (
        "frame_causal_attention",
        lambda: (Q, Q, Q, 2**63 - 3, 0.3),
        ValueError,
        "key must have the frames of query and first_frame >= 0 earlier ones",
    ),
    "a gradient of another shape": (
        "gated_add_norm_backward",
        lambda: (ROWS, ROWS, V, V, None, ROWS[:, :1], 1e-5),
        ValueError,
        r"grad_normed must have shape \[2, 3, 8\], got \[2, 1, 8\]",
    ),
    "a scale of integers": (
        "modulated_norm",
        lambda: (ROWS, V.int(), V, 1e-5),
        TypeError,
        "scale must be .*, got int32; cast it first",
    ),
    "attention of integers": (
        "block_sparse_attention",
        lambda: attention(
            [0, 50, 100],
            query=X.int(),
            key=X.int(),
            value=X.int(),
        ),
        TypeError,
        "query must be .*, got int32; cast it first",
    ),
    "strided offsets": (
        "norm_rope",
        lambda: (
            X,
            V[0],
            None,
            None,
            None,
            [],
            int32(0, 9, 100, 9)[::2],
            1e-6,
        ),
        ValueError,
        "block_offsets must be contiguous",
    ),
    "no tensor": (
        "modulated_norm",
        lambda: (ROWS, None, V, 1e-5),
        (TypeError, ValueError),
        "scale",
    ),
}


@pytest.mark.parametrize("by", ["operator", "reference"])
@pytest.mark.parametrize(
    ("op", "args", "error", "text"),
    REFUSED.values(),
    ids=REFUSED.keys(),
)
def test_kernels_and_references_refuse(op, args, error, text, by):  # law 20
    function = getattr(LIBRARY if by == "operator" else reference, op)
    with pytest.raises(error, match=text):
        function(*args())


# every operator that takes a number which is no tensor, as a function of that number
EPSILONS = {
    "modulated_norm": lambda eps: (ROWS, V, V, eps),
    "gated_add_norm": lambda eps: (ROWS, ROWS, V, V, V, eps),
    "norm_rope": lambda eps: (*rope()[:-1], eps),
    "modulated_norm_backward": lambda eps: (ROWS, V, ROWS, eps),
    "gated_add_norm_backward": lambda eps: (ROWS, ROWS, V, V, None, ROWS, eps),
    "norm_rope_backward": lambda eps: (*rope()[:-2], rope()[0], eps),
}
SCALES = {
    "block_sparse_attention": lambda scale: (*attention([0, 50, 100])[:5], scale, math.inf),
    "block_sparse_attention_backward": lambda scale: (
        *attention_gradient([0, 50, 100])[:-1],
        scale,
    ),
    "frame_causal_attention": lambda scale: (Q, Q, Q, 0, scale),
}
BOUNDS = {"block_sparse_attention": lambda bound: (*attention([0, 50, 100])[:6], bound)}
NUMBERS = [
    (EPSILONS, "eps must be from 0 on and finite in float32", [-1.0, -1e-9, 1e39], [0.0, 3e38]),
    (SCALES, "scale must be finite in float32", [1e39, -1e300], [0.0, -0.3, 3e38]),
    (BOUNDS, "logit_bound must be a number from 0 on", [-1.0, -1e-300], [0.0, math.inf]),
]


@pytest.mark.parametrize(
    ("table", "text", "wrong", "right"), NUMBERS, ids=["eps", "scale", "bound"]
)
def test_numbers_that_are_refused_by_all_in_one_sentence(table, text, wrong, right):
    wrong = [*wrong, math.nan, -math.inf] + ([] if table is BOUNDS else [math.inf])
    for op, args in table.items():
        functions = [getattr(LIBRARY, op), getattr(reference, op)]
        for number in wrong:
            sentences = set()
            for function in functions:
                with pytest.raises(ValueError, match=text) as caught:
                    function(*args(number))
                sentences.add(str(caught.value))
            assert len(sentences) == 1 and f", got {number};" in sentences.pop()
        for number in right:
            for function in functions:
                function(*args(number))


def test_the_affine_of_a_group_refuses_an_epsilon():
    moments = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="eps must be from 0 on and finite in float32, got nan"):
        ops.group_affine(moments, torch.ones(4), torch.ones(4), math.nan)


@pytest.mark.parametrize(
    "offsets",
    [
        FALLING,
        [0, 60, 60, 100],
        [0, 99],
        [5, 100],
    ],
)
def test_block_means_refuses_offsets(offsets):
    with pytest.raises(ValueError, match=OFFSETS):
        ops.block_means(X, int32(*offsets))


def test_doubles_refuse_offsets():
    """For fp64 the public functions run the references, which refuse the same."""
    x = X.double()
    weight = V[0].double()
    with pytest.raises(ValueError, match=OFFSETS):
        ops.norm_rope_means(x, weight, None, int32(*FALLING))
    query, key, value, selection, offsets, *_ = attention(FALLING, query=x, key=x, value=x)
    with pytest.raises(ValueError, match=BLOCKS):
        ops.block_sparse_attention(query, key, value, selection, offsets)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.pack_selection(torch.ones(3, dtype=torch.int32)), TypeError, "keep must be"),
        (lambda: ops.pack_selection(torch.ones(3)), TypeError, "keep must be bool, got float32"),
        (lambda: ops.pack_selection(torch.tensor(True)), ValueError, "keep must have shape"),
        (lambda: ops.unpack_selection(int32(1, 2), 32), ValueError, "selection must have ceil"),
        (lambda: ops.unpack_selection(torch.ones(1), 9), TypeError, "selection must be int32"),
        (
            lambda: ops.unpack_selection(ops.pack_selection(torch.ones(1, 40) > 0), 39),
            ValueError,
            "selection must keep no block beyond N = 39; give",
        ),
        (
            lambda: ops.selection_density(ops.pack_selection(torch.ones(31, 32) > 0), 31),
            ValueError,
            "selection must keep no block beyond N = 31",
        ),
        (
            lambda: ops.selection_density(int32(*range(40))[:, None], 9),
            ValueError,
            "a row for each",
        ),
        (lambda: ops.selection_density(int32(1), 1), ValueError, "a row for each"),
        (
            lambda: ops.causal_conv3d(
                ROWS[None, None],
                torch.ones(1, 8, 1, 1, 1),
                None,
                (0, 1, 1),
            ),
            ValueError,
            "stride must be three numbers from 1 on",
        ),
        (
            lambda: ops.causal_conv3d(
                ROWS[None, None],
                torch.ones(2, 8, 1, 1, 1),
                torch.ones(3),
            ),
            ValueError,
            r"bias must have shape \[2\], got \[3\]",
        ),
        (
            lambda: ops.group_affine(
                torch.ones(1, 1, 0, 2),
                torch.ones(4),
                torch.ones(4),
            ),
            ValueError,
            "a multiple of 0 groups",
        ),
    ],
)
def test_public_functions_refuse(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_default_scale_of_any_query():
    """A head without numbers has no scale to divide by; a query without dimensions is refused."""
    empty = torch.empty(1, 100, 1, 0)
    out = ops.block_sparse_attention(
        *attention([0, 50, 100], query=empty, key=empty, value=empty)[:5]
    )
    assert out.shape == empty.shape
    assert ops.frame_causal_attention(empty, empty, empty).shape == empty.shape
    number = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"query must have shape \[B, T, P, D\], got \[\]"):
        ops.frame_causal_attention(number, number, number)
    with pytest.raises(ValueError, match=r"query must have shape \[B, S, H, D\], got \[\]"):
        ops.block_sparse_attention(number, number, number, int32(0), int32(0))


@pytest.mark.parametrize("sizes", [(2**31, 0, 8), (2**31, 3, 0), (0, 2**31, 8)])
def test_nothing_is_done_for_nothing(sizes):  # law 8: however many empty rows there are
    x = torch.empty(sizes)
    B, _, C = sizes
    vector = torch.zeros(1, C).expand(B, C)
    if not B * C:
        assert LIBRARY.modulated_norm_backward(x, vector, x, 1e-5)[1].shape == (B, C)
    assert LIBRARY.modulated_norm(x, vector, vector, 1e-5).shape == sizes
    heads = torch.empty(2**31, 0, 2**20, 8)
    selection = torch.empty(2**31, 2**20, 0, 0, dtype=torch.int32)
    lse = torch.empty(2**31, 2**20, 0)
    for op in (LIBRARY, reference):
        out, _ = op.block_sparse_attention(
            heads,
            heads,
            heads,
            selection,
            int32(0),
            1.0,
            math.inf,
        )
        assert out.shape == heads.shape
        gradients = op.block_sparse_attention_backward(
            heads, heads, heads, heads, lse, selection, int32(0), heads, None, 1.0
        )
        assert all(gradient.shape == heads.shape for gradient in gradients)


S = 1 << 40  # tokens of a tensor of 32 TB, without memory behind them
LONG = torch.zeros(1, 1, 8).expand(1, S, 8)
LONG_DOUBLE = torch.zeros(1, 1, 8, dtype=torch.float64).expand(1, S, 8)
HEADS = LONG[:, :, None]
FRAMES = LONG[None]
PIXELS = LONG[None, None]
SHORT = {
    "modulated_norm": lambda: (LONG, V[:1], V[:1], 1e-5),
    "gated_add_norm": lambda: (LONG, LONG, V[:1], None, None, 1e-5),
    "norm_rope": lambda: (HEADS, V[0], None, None, None, [], None, 1e-5),
    "modulated_norm_backward": lambda: (LONG, V[:1], LONG, 1e-5),
    "gated_add_norm_backward": lambda: (LONG, LONG, V[:1], V[:1], None, LONG, 1e-5),
    "norm_rope_backward": lambda: (HEADS, V[0], None, None, None, [], HEADS, 1e-5),
    "select_blocks": lambda: (
        *[V[:1, None, None].expand(1, 1, 1 << 25, 8)] * 2,
        0.9,
        [],
        [],
        "all",
    ),
    "group_norm_silu": lambda: (PIXELS, V[:1], V[:1], None, False, True),
    "frame_causal_attention": lambda: (FRAMES, Q, Q, 0, 0.3),
    "causal_conv3d": lambda: (PIXELS, torch.ones(1, 8, 1, 1, 1), None, [1, 1, 1]),
}


@pytest.mark.parametrize("by", ["operator", "reference"])
@pytest.mark.parametrize("op", SHORT)
def test_missing_memory_is_told_with_its_size(op, by):
    """In one sentence, by kernels and by references alike."""
    function = getattr(LIBRARY if by == "operator" else reference, op)
    with pytest.raises(torch.OutOfMemoryError, match=SENTENCE) as caught:
        function(*SHORT[op]())
    assert "\n" not in str(caught.value) and caught.value.__context__ is None


SENTENCE = r"^.* needs \d{13,} bytes of memory, which this machine does not give; compute fewer"
NO_SIZE = r"^\S* needs more memory, which this machine does not give; compute fewer"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.unpack_selection(int32(1).expand(S, 1), 20), SENTENCE),
        (lambda: ops.pack_selection(torch.ones(1, dtype=torch.bool).expand(S, 1)), SENTENCE),
        (lambda: ops.transpose_selection(int32(1).expand(S, 1, 1)), SENTENCE),
        (lambda: ops.modulated_norm(LONG_DOUBLE, V[:1], V[:1]), SENTENCE),
        (lambda: ops.pack_selection(torch.ones(1, dtype=torch.bool).expand(2**62, 1)), NO_SIZE),
    ],
)
def test_missing_memory_of_what_is_plain_torch(call, text):
    with pytest.raises(torch.OutOfMemoryError, match=text):
        call()


def test_other_failures_keep_their_words(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the card is on fire")

    monkeypatch.setattr(reference, "_rotate", fail)
    with pytest.raises(RuntimeError, match="^the card is on fire$"):
        reference.norm_rope(*rope())


@pytest.mark.skipif(_library.extension is None, reason="the compiled library is not built")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_wrong_dtype_is_a_type_error_in_every_mode(mode):
    """The library throws what C++ has; Python's type of error is made of it."""
    x, v = torch.zeros(1, 2, 8, dtype=torch.int32), torch.zeros(1, 8)
    with mode(), pytest.raises(TypeError, match="cast it first"):
        ops.modulated_norm(x, v, v)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16, got float64"):
        torch.ops.kandinsky_kernels.modulated_norm(v[None].double(), v, v, 1e-6)


def test_the_block_of_a_token_is_a_block_whatever_the_offsets():
    """Nothing is indexed beyond the blocks where values cannot be read, on a GPU or in a graph."""
    for offsets in (
        FALLING,
        [0, -7, 3, 100],
        [5, 2**31 - 1, -(2**31), 100],
        [0, 100],
    ):
        owner = reference.block_of_token(int32(*offsets), 100)
        assert owner.shape == (100,)
        assert owner.min() >= 0
        assert owner.max() < len(offsets) - 1
    lengths = torch.tensor([3, 1, 60, 36])
    offsets = int32(0, *lengths.cumsum(0).tolist())
    wanted = torch.arange(4).repeat_interleave(lengths)
    assert torch.equal(reference.block_of_token(offsets, 100), wanted)


@pytest.mark.parametrize("name", ["tiles", "window"])
def test_tiles_and_window_of_floats_are_a_type_error_in_one_sentence(name):
    means = torch.randn(1, 1, 6, 8)
    grid = {"tiles": [1, 1, 6], "window": [1, 1, 1], name: [1.0, 1, 6]}
    with pytest.raises(TypeError, match=f"{name} must be whole numbers, got float 1.0"):
        ops.select_blocks(means, means, 0.9, **grid)
