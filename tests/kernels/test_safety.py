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


@pytest.mark.skipif(_library.extension is None, reason="the compiled extension is not built")
@pytest.mark.parametrize(
    ("call", "size"),
    [
        (lambda x, v: ops.modulated_norm(x, v, v), 4 * 8 << 40),
        (lambda x, v: ops.norm_rope(x[..., None, :], v[0]), 4 * 8 << 40),
        (lambda x, v: ops.group_norm_silu(x[None, None], v, v, pad=False), 4 * 8 << 40),
    ],
)
def test_missing_memory_is_told_with_its_size(call, size):
    x = torch.zeros(1, 1, 8).expand(1, 1 << 40, 8)
    v = torch.zeros(1, 8)
    with pytest.raises(torch.OutOfMemoryError, match=f"needs {size} bytes of memory, which this"):
        call(x, v)


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
