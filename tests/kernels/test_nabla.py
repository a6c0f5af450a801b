# SPDX-License-Identifier: Apache-2.0
"""What NABLA's attention keeps beyond the laws of the common table, and what its operators refuse.

The choice of blocks is in `test_selections`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import kandinsky_kernels as ops
from kandinsky_kernels import _library, reference
from kandinsky_model.dit.geometry import Grid, block_offsets

from ..compare import assert_faithful
from ..conftest import shared_data
from ..peers import token_mask

LIBRARY = torch.ops.kandinsky_kernels
RAGGED = Grid(2, 11, 19)  # 12 blocks of 9 to 64 tokens
WHOLE = Grid(2, 16, 16)  # 8 blocks of 64 tokens


def qkv(grid, B=1, H=2, D=64, scale=1.0):
    return tuple(scale * torch.randn(B, grid.tokens, H, D) for _ in range(3))


def selection_of(kind, grid, B=1, H=2):
    N = grid.blocks
    keep = {
        "random": torch.rand(B, H, N, N) < 0.4,
        "diagonal": torch.eye(N).bool(),
        "one block": torch.arange(N) == N // 2,
        "all but one": torch.arange(N) != N - 1,
        "all": torch.ones(N).bool(),
        "empty rows": (torch.rand(B, H, N, N) < 0.5) & (torch.arange(N) % 3 > 0)[:, None],
    }[kind]
    return ops.pack_selection(keep.expand(B, H, N, N))


def dense_oracle(query, key, value, mask, dtype=torch.float64):
    """Attention and log-sum-exp in ``dtype`` under an explicit mask [B, H, S, S].

    Rows without any key give zeros.
    """
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    weights = torch.where(
        mask.any(-1, keepdim=True),
        logits.softmax(-1),
        0.0,
    )
    return (weights @ v).transpose(1, 2), logits.logsumexp(-1)


def dense_peer(query, key, value, mask=None, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def same(actual, expected):
    assert torch.equal(actual.nan_to_num(1e30), expected.nan_to_num(1e30))


@pytest.mark.parametrize("grid", [RAGGED, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize(
    "kind", ["random", "diagonal", "one block", "all but one", "all", "empty rows"]
)
def test_equals_dense_attention_under_the_expanded_mask(kind, grid, simd):  # law 26
    q, k, v = qkv(grid)
    selection = selection_of(kind, grid)
    offsets = block_offsets(grid)
    mask = token_mask(selection, offsets)
    out, lse = ops.block_sparse_attention(q, k, v, selection, offsets, return_lse=True)
    exact, exact_lse = dense_oracle(q, k, v, mask)
    assert_faithful(out, exact, dense_peer(q, k, v, mask).nan_to_num(0.0))
    assert_faithful(lse, exact_lse, dense_oracle(q, k, v, mask, torch.float32)[1])
    if kind == "empty rows":
        alone = ~mask.any(-1)
        assert (
            alone.any()
            and (out.transpose(1, 2)[alone] == 0).all()
            and (lse[alone] == -math.inf).all()
        )


@pytest.mark.parametrize("D", [8, 32, 40, 96, 128, 256, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_size(D, dtype, simd):  # laws 1 and 3
    q, k, v = (x.to(dtype) for x in qkv(RAGGED, H=1, D=D))
    selection = selection_of("random", RAGGED, H=1)
    offsets = block_offsets(RAGGED)
    mask = token_mask(selection, offsets)
    out = ops.block_sparse_attention(q, k, v, selection, offsets)
    assert_faithful(
        out,
        dense_oracle(q, k, v, mask)[0],
        dense_peer(q, k, v, mask),
    )


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64],
        [1, 64, 1],
        [3, 17, 33, 63, 2],
        [1] * 70,
    ],
)
def test_blocks_of_any_length(lengths, simd):  # law 3; 70 blocks are three words
    N = len(lengths)
    S = sum(lengths)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (torch.randn(2, S, 3, 32) for _ in range(3))
    selection = ops.pack_selection((torch.rand(2, 3, N, N) < 0.5) | torch.eye(N).bool())
    mask = token_mask(selection, offsets)
    out = ops.block_sparse_attention(q, k, v, selection, offsets)
    assert_faithful(
        out,
        dense_oracle(q, k, v, mask)[0],
        dense_peer(q, k, v, mask),
    )


def test_unused_bits_of_the_last_word_mean_nothing(simd):
    q, k, v = qkv(RAGGED)
    selection = selection_of("random", RAGGED)
    offsets = block_offsets(RAGGED)
    polluted = selection | torch.tensor(-1 << RAGGED.blocks, dtype=torch.int32)
    assert (polluted != selection).all()
    same(
        ops.block_sparse_attention(q, k, v, polluted, offsets),
        ops.block_sparse_attention(q, k, v, selection, offsets),
    )


def test_heads_beyond_the_packing_budget(simd):
    """The kernel packs keys and values by groups of heads.

    With 2 MB for a head and 16 MB for a group, ten heads make two groups.
    """
    grid = Grid(4, 32, 32)
    q, k, v = (torch.randn(1, grid.tokens, 10, 64).expand(2, -1, -1, -1) for _ in range(3))
    selection = selection_of("diagonal", grid, B=2, H=10)
    offsets = block_offsets(grid)
    out = ops.block_sparse_attention(q, k, v, selection, offsets)
    # [B, H, N, 64, D]
    blocks = [x.transpose(1, 2).unflatten(2, (grid.blocks, 64)) for x in (q, k, v)]
    peer = F.scaled_dot_product_attention(*blocks).flatten(2, 3).transpose(1, 2)  # [B, S, H, D]
    assert (out - peer).abs().max() < 1e-5


def test_keeping_all_mass_is_dense_attention(simd):  # law 25
    q, k, v = qkv(RAGGED)
    offsets = block_offsets(RAGGED)
    means = [ops.block_means(x, offsets) for x in (q, k)]
    for ties in ("all", "stable"):
        selection = ops.select_blocks(*means, 1.0, ties=ties)
        assert (
            ops.unpack_selection(selection, RAGGED.blocks).all()
            and ops.selection_density(selection, RAGGED.blocks) == 1.0
        )
    out = ops.block_sparse_attention(q, k, v, selection, offsets)
    assert_faithful(
        out, dense_oracle(q, k, v, torch.ones(1, dtype=torch.bool))[0], dense_peer(q, k, v)
    )


def test_non_finite_queries_stay_in_their_rows(simd):  # law 9
    q, k, v = qkv(RAGGED)
    selection = selection_of("random", RAGGED) | selection_of("diagonal", RAGGED)
    offsets = block_offsets(RAGGED)
    clean = ops.block_sparse_attention(q, k, v, selection, offsets)
    for row, value in (
        (3, math.nan),
        (70, math.inf),
        (200, -math.inf),
    ):
        q[0, row, 1, 5] = value
    dirty, lse = ops.block_sparse_attention(q, k, v, selection, offsets, return_lse=True)
    exact, exact_lse = dense_oracle(q, k, v, token_mask(selection, offsets))
    assert_faithful(dirty, exact, clean)
    assert torch.equal(lse.isnan(), exact_lse.isnan()) and torch.equal(
        lse.isinf(), exact_lse.isinf()
    )
    others = torch.ones(RAGGED.tokens, 2, dtype=torch.bool)
    others[[3, 70, 200], 1] = False
    same(dirty[0][others], clean[0][others])


@pytest.mark.parametrize("poison", ["key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_keys_reach_only_who_keeps_their_block(poison, value, simd):  # law 9
    inputs = dict(zip(("query", "key", "value"), qkv(RAGGED), strict=True))
    selection = selection_of("random", RAGGED) | selection_of("diagonal", RAGGED)
    offsets = block_offsets(RAGGED)
    clean = ops.block_sparse_attention(**inputs, selection=selection, block_offsets=offsets)
    inputs[poison][0, offsets[4] + 2, 0, 7] = value
    dirty = ops.block_sparse_attention(**inputs, selection=selection, block_offsets=offsets)
    keepers = token_mask(selection, offsets)[0, 0, :, offsets[4] + 2]
    assert 0 < keepers.sum() < RAGGED.tokens
    clean[0, keepers, 0] = dirty[0, keepers, 0]
    same(dirty, clean)
    exact, _ = reference.block_sparse_attention(
        *(x.double() for x in inputs.values()), selection, offsets, 0.125
    )
    assert torch.equal(dirty.isnan(), exact.isnan()) and torch.equal(dirty.isinf(), exact.isinf())


@pytest.mark.parametrize(
    "scale",
    [0.0, 1e-30, 1e-3, 30.0, 1e4, 1e15],
    ids=str,
)
def test_extremes(scale, simd):  # law 10: from uniform weights to one-hot ones, without overflow
    q, k, v = qkv(RAGGED, scale=scale)
    selection = selection_of("random", RAGGED) | selection_of("diagonal", RAGGED)
    offsets = block_offsets(RAGGED)
    mask = token_mask(selection, offsets)
    out, lse = ops.block_sparse_attention(q, k, v, selection, offsets, return_lse=True)
    exact, exact_lse = dense_oracle(q, k, v, mask)
    assert_faithful(out, exact, dense_peer(q, k, v, mask))
    assert_faithful(lse, exact_lse, dense_oracle(q, k, v, mask, torch.float32)[1])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3])
def test_other_scales(scale, simd):
    q, k, v = qkv(RAGGED)
    selection = selection_of("all", RAGGED)
    offsets = block_offsets(RAGGED)
    out = ops.block_sparse_attention(q, k, v, selection, offsets, scale)
    exact, _ = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, offsets, scale
    )
    assert_faithful(out, exact, dense_peer(q, k, v, scale=scale))


def test_a_row_depends_on_its_values_alone(simd):  # law 12
    """It depends neither on its neighbours, nor on the dtype that held its values."""
    q, k, v = qkv(RAGGED)
    selection = selection_of("random", RAGGED)
    offsets = block_offsets(RAGGED)
    others = torch.randn_like(q)
    others[:, 100:108] = q[:, 100:108]
    same(
        ops.block_sparse_attention(others, k, v, selection, offsets)[:, 100:108],
        ops.block_sparse_attention(q, k, v, selection, offsets)[:, 100:108],
    )
    query, key = (torch.randn(1, 2, 90, 24) for _ in range(2))
    others = torch.randn_like(query)
    others[..., 40:43, :] = query[..., 40:43, :]
    same(
        ops.select_blocks(others, key, 0.6)[..., 40:43, :],
        ops.select_blocks(query, key, 0.6)[..., 40:43, :],
    )
    narrow = query.bfloat16(), key.bfloat16()
    same(ops.select_blocks(*narrow, 0.6), ops.select_blocks(*(x.float() for x in narrow), 0.6))


def test_a_row_does_not_depend_on_where_its_block_lies(simd):  # law 12
    """Its lane, panel and task change, and its bits do not."""
    offsets = torch.tensor([0, 5, 69, 100], dtype=torch.int32)
    swapped = torch.tensor([0, 31, 36, 100], dtype=torch.int32)
    order = torch.tensor([*range(69, 100), *range(69)])
    q, k, v = (torch.randn(1, 100, 1, 40) for _ in range(3))
    # Every block keeps the one of 64 tokens.
    keep = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.bool)
    out = ops.block_sparse_attention(
        q,
        k,
        v,
        ops.pack_selection(keep[None, None]),
        offsets,
    )
    moved = ops.block_sparse_attention(
        *(x[:, order] for x in (q, k, v)),
        ops.pack_selection(keep[:, [0, 2, 1]][None, None]),
        swapped,
    )
    same(moved, out[:, order])


def test_permuting_heads_permutes_results(simd):  # law 28
    q, k, v = qkv(RAGGED, H=3)
    selection = selection_of("random", RAGGED, H=3)
    offsets = block_offsets(RAGGED)
    order = [2, 0, 1]
    out = ops.block_sparse_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], selection[:, order].contiguous(), offsets
    )
    same(out, ops.block_sparse_attention(q, k, v, selection, offsets)[:, :, order])


@pytest.mark.parametrize(
    ("B", "grid", "H"),
    [
        (0, RAGGED, 2),
        (2, None, 2),
        (2, RAGGED, 0),
    ],
    ids=["samples", "tokens", "heads"],
)
def test_empty(B, grid, H):  # law 8
    offsets = block_offsets(grid) if grid else torch.zeros(1, dtype=torch.int32)
    S = int(offsets[-1])
    N = len(offsets) - 1
    x = torch.empty(B, S, H, 16)
    selection = torch.empty(B, H, N, -(-N // 32), dtype=torch.int32)
    out, lse = ops.block_sparse_attention(x, x, x, selection, offsets, return_lse=True)
    assert (out.shape, lse.shape, out.dtype, lse.dtype) == (
        x.shape,
        (B, H, S),
        torch.float32,
        torch.float32,
    )
    means = torch.empty(B, H, N, 16)
    chosen = ops.select_blocks(means, means, 0.5)
    assert (chosen.shape, chosen.dtype) == (selection.shape, torch.int32)


@pytest.mark.parametrize("keep_mass", [0.3, 0.6, 0.9])
def test_golden_blocks_and_outputs(keep_mass, simd):
    """The official code chose the same blocks and has the same output, on a CPU."""
    golden = load_file(shared_data() / "golden" / "nabla.safetensors")
    q, k, v = (golden[name].transpose(1, 2) for name in "qkv")  # [B, S, H, D]
    offsets = torch.arange(0, q.shape[1] + 1, 64, dtype=torch.int32)
    means = [ops.block_means(x, offsets) for x in (q, k)]
    selection = ops.select_blocks(*means, keep_mass, (2, 2, 2), (1, 1, 1))
    assert torch.equal(ops.unpack_selection(selection, 8), golden[f"keep_{keep_mass}"])
    exact, _ = dense_oracle(q, k, v, token_mask(selection, offsets))
    assert_faithful(
        ops.block_sparse_attention(q, k, v, selection, offsets),
        exact,
        golden[f"out_{keep_mass}"].transpose(1, 2),
    )


M = torch.zeros(1, 2, 6, 8)
Q = torch.zeros(1, 70, 2, 8)
BITS = torch.zeros(1, 2, 2, 1, dtype=torch.int32)
OFFSETS = torch.tensor([0, 64, 70], dtype=torch.int32)
MISUSE = [
    (
        lambda: ops.select_blocks(M, M[:, :1], 0.5),
        ValueError,
        r"key_means must have shape \[1, 2, 6, 8\], got \[1, 1, 6, 8\]",
    ),
    (
        lambda: ops.select_blocks(M[0], M[0], 0.5),
        ValueError,
        r"query_means must have shape \[B, H, N, D\], got \[2, 6, 8\]",
    ),
    (
        lambda: ops.select_blocks(M, M.double(), 0.5),
        TypeError,
        "key_means must be float32, got float64",
    ),
    (
        lambda: ops.select_blocks(M.int(), M.int(), 0.5),
        TypeError,
        "query_means must be float32, .*, got int32",
    ),
    (
        lambda: ops.select_blocks(M, M.mT.contiguous().mT, 0.5),
        ValueError,
        "key_means must be contiguous in its last dimension",
    ),
    (
        lambda: ops.select_blocks(M, M, 1.2),
        ValueError,
        r"keep_mass must be in \(0, 1\], got 1.2",
    ),
    (
        lambda: ops.select_blocks(M, M, 0.0),
        ValueError,
        "keep_mass must be in",
    ),
    (
        lambda: ops.select_blocks(M, M, math.nan),
        ValueError,
        "keep_mass must be in",
    ),
    (
        lambda: ops.select_blocks(M, M, 0.5, ties="some"),
        ValueError,
        'ties must be "all" or "stable"',
    ),
    (
        lambda: ops.select_blocks(M, M, 0.5, (1, 2, 3)),
        ValueError,
        "tiles and window must be given together",
    ),
    (
        lambda: ops.select_blocks(M, M, 0.5, (1, 2, 4), (1, 1, 1)),
        ValueError,
        "product N = 6",
    ),
    (
        lambda: ops.select_blocks(M, M, 0.5, (1, 2, 3), (1, 0, 1)),
        ValueError,
        "widths from 1 on",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q[:, :60], Q, BITS, OFFSETS),
        ValueError,
        r"key must have shape \[1, 70, 2, 8\], got \[1, 60, 2, 8\]",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q.bfloat16(), Q, BITS, OFFSETS),
        TypeError,
        "key must be float32, got bfloat16",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q, Q.mT.contiguous().mT, BITS, OFFSETS),
        ValueError,
        "value must be contiguous in its last",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q, Q, BITS, OFFSETS.long()),
        TypeError,
        "block_offsets must be int32, got int64",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q, Q, BITS[:, :1], OFFSETS),
        ValueError,
        r"selection must have shape \[1, 2, 2, 1\], got \[1, 1, 2, 1\]",
    ),
    (
        lambda: ops.block_sparse_attention(Q, Q, Q, BITS.long(), OFFSETS),
        TypeError,
        "selection must be int32, got int64",
    ),
]
CORRUPTING = [
    *[
        (
            lambda offsets=offsets: LIBRARY.block_sparse_attention(
                Q, Q, Q, BITS, torch.tensor(offsets, dtype=torch.int32), 1.0, 9.0
            ),
            "block_offsets must ascend from 0 to S = 70 in blocks of 1 to 64 tokens",
        )
        for offsets in (
            [0, 70, 70],
            [0, 65, 70],
            [0, 60, 71],
            [1, 64, 70],
            [0, 72, 70],
            [0, -6, 70],
        )
    ],
    (
        lambda: LIBRARY.block_sparse_attention(Q, Q[:, :69], Q, BITS, OFFSETS, 1.0, 9.0),
        r"key must have shape \[1, 70, 2, 8\]",
    ),
    (
        lambda: LIBRARY.block_sparse_attention(
            Q,
            Q,
            Q,
            BITS[..., :1, :],
            OFFSETS,
            1.0,
            9.0,
        ),
        r"selection must have shape \[1, 2, 2, 1\]",
    ),
    (
        lambda: LIBRARY.select_blocks(M, M[..., :5, :], 0.5, [], [], "all"),
        r"key_means must have shape \[1, 2, 6, 8\]",
    ),
    (
        lambda: LIBRARY.select_blocks(M, M, 0.5, [1, 2, 4], [1, 1, 1], "all"),
        "tiles must be three numbers from 1 on with product N = 6",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), MISUSE)
def test_misuse_is_explained(call, error, text):  # law 20
    with pytest.raises(error, match=text):
        call()


@pytest.mark.skipif(_library.extension is None, reason="the compiled extension is not built")
@pytest.mark.parametrize(("call", "text"), CORRUPTING)
def test_kernels_refuse_what_would_corrupt_memory(call, text):  # law 20
    with pytest.raises((ValueError, TypeError), match=text):
        call()
