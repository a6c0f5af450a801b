# SPDX-License-Identifier: Apache-2.0
"""The table of cases. One row is an operator's inputs at one size: its tests and its benchmark.

``exact`` is the operator's reference on fp64 inputs. ``peer`` is the usual expression, from
`peers`, in the working dtype: it sets the error that is allowed and the time to beat.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import kandinsky_kernels as ops
from kandinsky_model.config import LITE_DIT, PRO_DIT
from kandinsky_model.dit.geometry import Grid, block_offsets, local_window

from .compare import assert_faithful, assert_same_blocks
from .peers import (
    block_sparse_attention_peer,
    frame_causal_attention_peer,
    frame_mask,
    gated_add_norm_peer,
    group_moments_peer,
    group_norm_silu_peer,
    head_first,
    modulated_norm_peer,
    norm_rope_means_peer,
    norm_rope_peer,
    select_blocks_peer,
)

FP32 = torch.float32
BF16 = torch.bfloat16
FP16 = torch.float16


def as_tuple(result) -> tuple[Tensor, ...]:
    return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x is not None)


def tensors(inputs: dict) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def faithful(
    actual: tuple,
    exact: tuple,
    peer: tuple,
    _: dict,
) -> None:
    assert len(actual) == len(exact) == len(peer)
    for outputs in zip(actual, exact, peer, strict=True):
        assert_faithful(*outputs)


def same_blocks(
    actual: tuple,
    _exact: tuple,
    _peer: tuple,
    inputs: dict,
) -> None:
    query = inputs["query_means"].double()
    key = inputs["key_means"].double()
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    near = local_window(inputs["tiles"], inputs["window"]) if inputs["tiles"] else None
    assert_same_blocks(actual[0], scores, inputs["keep_mass"], near, inputs["ties"])


@dataclass(frozen=True)
class Operator:
    """What all cases of one operator share. ``narrow`` names the inputs in the working dtype."""

    call: Callable
    peer: Callable
    narrow: tuple[str, ...]
    check: Callable = faithful
    flops: Callable[[dict], int] = lambda inputs: 0
    # Makes a function that runs the dense operator in place of a sparse one, where there is one.
    dense: Callable | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table: an operator, the name of a size, and how its inputs are made."""

    op: str
    size: str
    make: Callable[[Generator], dict]
    dtype: torch.dtype
    bench: bool = False  # a size for the clock, too long for a test

    @property
    def id(self) -> str:
        return f"{self.op}-{self.size}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.op]

    def inputs(self, seed: int = 0) -> dict:
        made = self.make(torch.Generator().manual_seed(seed))
        return {
            name: x.to(self.dtype) if name in self.operator.narrow else x
            for name, x in made.items()
        }

    def ready(self, function: Callable, inputs: dict) -> Callable:
        """A function without arguments, which benchmarks time: ``function`` on these inputs."""
        return lambda: function(**inputs)

    def run(self, inputs: dict) -> tuple[Tensor, ...]:
        return as_tuple(self.ready(self.operator.call, inputs)())

    def exact(self, inputs: dict) -> tuple[Tensor, ...]:
        return self.run(
            {
                name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in inputs.items()
            }
        )

    def check(self, actual: tuple[Tensor, ...], inputs: dict) -> None:
        """Law 1 for these outputs of these inputs."""
        operator = self.operator
        known = operator.check is same_blocks
        exact, peer = (
            ((), ())
            if known
            else (self.exact(inputs), as_tuple(self.ready(operator.peer, inputs)()))
        )
        operator.check(actual, exact, peer, inputs)


def bytes_moved(inputs: dict, outputs: tuple[Tensor, ...]) -> int:
    """Every input read once, every output written once."""
    return sum(x.numel() * x.element_size() for x in (*tensors(inputs).values(), *outputs))


def rotary(cos=None, sin=None, positions=None, pairs=()):
    return None if cos is None else ops.Rotary(cos, sin, positions, pairs)


def norm_rope(x, weight, **tables):
    return ops.norm_rope(x, weight, rotary(**tables))


def norm_rope_means(x, weight, block_offsets, **tables):
    return ops.norm_rope_means(x, weight, rotary(**tables), block_offsets)


def dense_attention(
    query,
    key,
    value,
    **_,
) -> Callable:
    """PyTorch's dense attention, ready to run, in the layout it likes best."""
    inputs = head_first(query, key, value)
    return lambda: F.scaled_dot_product_attention(*inputs)


def attention_flops(inputs: dict) -> int:
    """Two products over the kept pairs of tokens."""
    lengths = inputs["block_offsets"].diff().double()
    keep = ops.unpack_selection(inputs["selection"], len(lengths)).double()
    return int(4 * inputs["query"].shape[-1] * (keep * lengths[:, None] * lengths).sum())


def frame_attention_flops(inputs: dict) -> int:
    return 4 * inputs["query"].shape[0] * inputs["query"].shape[-1] * int(frame_mask(inputs).sum())


def map_flops(inputs: dict) -> int:
    B, H, N, D = inputs["query_means"].shape
    return 2 * B * H * N * N * D


OPERATORS = {
    "modulated_norm": Operator(ops.modulated_norm, modulated_norm_peer, ("x",)),
    "gated_add_norm": Operator(ops.gated_add_norm, gated_add_norm_peer, ("x", "branch")),
    "norm_rope": Operator(norm_rope, norm_rope_peer, ("x",)),
    "norm_rope_means": Operator(norm_rope_means, norm_rope_means_peer, ("x",)),
    "select_blocks": Operator(ops.select_blocks, select_blocks_peer, (), same_blocks, map_flops),
    "block_sparse_attention": Operator(
        ops.block_sparse_attention,
        block_sparse_attention_peer,
        ("query", "key", "value"),
        flops=attention_flops,
        dense=dense_attention,
    ),
    "group_moments": Operator(ops.group_moments, group_moments_peer, ("x",)),
    "group_norm_silu": Operator(ops.group_norm_silu, group_norm_silu_peer, ("x", "front")),
    "frame_causal_attention": Operator(
        ops.frame_causal_attention,
        frame_causal_attention_peer,
        ("query", "key", "value"),
        flops=frame_attention_flops,
    ),
}


def rows(
    B: int,
    S: int,
    C: int,
    branch: bool = False,
    norm: bool = True,
) -> Callable:
    def make(g: Generator) -> dict:
        inputs = {"x": 3 * torch.randn(B, S, C, generator=g) + 0.5}
        if branch:
            inputs |= {
                "branch": torch.randn(B, S, C, generator=g),
                "gate": torch.randn(B, C, generator=g),
            }
        if norm:
            inputs |= {
                "scale": torch.randn(B, C, generator=g),
                "shift": torch.randn(B, C, generator=g),
            }
        return inputs

    return make


def heads(
    B: int, S: int, H: int, D: int, rotate: bool = True, block: int = 0, axes: int = 3
) -> Callable:
    """block > 0: blocks of that many tokens, the last one shorter, and their means. The last axis
    has the pairs that are left over."""

    def make(g: Generator) -> dict:
        inputs = {
            "x": 2 * torch.randn(B, S, H, D, generator=g),
            "weight": 1 + 0.2 * torch.randn(D, generator=g),
        }
        angles = 6.3 * torch.rand(S, D // 2, generator=g)
        if rotate:
            share = D // 2 // axes
            inputs |= {
                "cos": angles.cos(),
                "sin": angles.sin(),
                "positions": torch.randint(
                    max(S, 1),
                    (S, axes),
                    generator=g,
                    dtype=torch.int32,
                ),
                "pairs": (share,) * (axes - 1) + (D // 2 - share * (axes - 1),),
            }
        if block:
            inputs["block_offsets"] = torch.tensor([*range(0, S, block), S], dtype=torch.int32)
        return inputs

    return make


def means(
    B: int,
    H: int,
    tiles: tuple[int, int, int],
    D: int,
    keep_mass: float,
    window=None,
    ties="all",
    sharp=1.0,
) -> Callable:
    def make(g: Generator) -> dict:
        shape = (B, H, math.prod(tiles), D)
        return {
            "query_means": sharp * torch.randn(shape, generator=g),
            "key_means": torch.randn(shape, generator=g),
            "keep_mass": keep_mass,
            "tiles": tiles if window else None,
            "window": window,
            "ties": ties,
        }

    return make


def attention(
    B: int,
    H: int,
    grid: Grid,
    D: int,
    density: float,
    lse: bool = False,
) -> Callable:
    """Every block of queries keeps itself and others at random, density * N in all; tokens in tile
    order."""

    def make(g: Generator) -> dict:
        N = grid.blocks
        offsets = block_offsets(grid)
        rank = torch.rand(B, H, N, N, generator=g) - 2 * torch.eye(N)
        keep = rank.argsort(-1).argsort(-1) < max(1, round(density * N))
        qkv = {
            name: torch.randn(B, grid.tokens, H, D, generator=g)
            for name in ("query", "key", "value")
        }
        return {
            **qkv,
            "selection": ops.pack_selection(keep),
            "block_offsets": offsets,
            **({"return_lse": True} if lse else {}),
        }

    return make


def video(
    B: int,
    T: int,
    Y: int,
    X: int,
    C: int,
    groups: int,
) -> Callable:
    return lambda g: {
        "x": 2 * torch.randn(B, T, Y, X, C, generator=g) + 3 * torch.randn(C, generator=g),
        "groups": groups,
    }


def normed(
    B: int,
    T: int,
    Y: int,
    X: int,
    C: int,
    front: bool = False,
    **options,
) -> Callable:
    def make(g: Generator) -> dict:
        inputs = {"x": 2 * torch.randn(B, T, Y, X, C, generator=g) + 0.5}
        inputs |= {"scale": torch.randn(B, C, generator=g), "shift": torch.randn(B, C, generator=g)}
        return (
            inputs
            | ({"front": torch.randn(B, 2, Y + 2, X + 2, C, generator=g)} if front else {})
            | options
        )

    return make


def frames(
    B: int, T: int, P: int, D: int, first_frame: int = 0, keys: int = 0, lse: bool = False
) -> Callable:
    """One more key frame than the queries see, each of `keys` tokens or of P."""

    def make(g: Generator) -> dict:
        inputs = {"query": torch.randn(B, T, P, D, generator=g)}
        inputs |= {
            name: torch.randn(
                B,
                first_frame + T + bool(first_frame),
                keys or P,
                D,
                generator=g,
            )
            for name in ("key", "value")
        }
        return (
            inputs
            | ({"first_frame": first_frame} if first_frame else {})
            | ({"return_lse": True} if lse else {})
        )

    return make


LITE = (LITE_DIT.model_dim, LITE_DIT.num_heads)
PRO = (PRO_DIT.model_dim, PRO_DIT.num_heads)
WIDTHS = {
    "one": (1, 1, 2),
    "odd": (2, 3, 63),
    "edge": (3, 7, 64),
    "past": (1, 63, 65),
    "prime": (2, 61, 509),
    "lite": (1, 32, LITE[0]),
    "pro": (1, 16, PRO[0]),
}
HEADS = {
    "one": (1, 1, 1, 2),
    "six": (1, 63, 1, 6),
    "odd": (2, 65, 3, 64),
    "prime": (1, 127, 5, 22),
    "lite": (1, 64, LITE[1], 64),
    "pro": (1, 16, PRO[1], 128),
}
VIDEOS = {
    "one": (1, 1, 1, 1, 2, 1),
    "odd": (2, 3, 5, 7, 32, 8),
    "column": (1, 2, 9, 1, 24, 4),
    "row": (1, 2, 1, 17, 32, 16),
    "prime": (1, 2, 5, 3, 21, 7),
    "slabs": (1, 2, 70, 40, 64, 32),
}

_TABLE = [
    *(("modulated_norm", size, rows(*shape)) for size, shape in WIDTHS.items()),
    *(
        (
            "gated_add_norm",
            size,
            rows(*shape, branch=True),
        )
        for size, shape in WIDTHS.items()
    ),
    *(
        ("gated_add_norm", f"{size}_add_only", rows(*WIDTHS[size], branch=True, norm=False))
        for size in ("odd", "lite")
    ),
    *(("norm_rope", size, heads(*shape)) for size, shape in HEADS.items()),
    *(
        (
            "norm_rope",
            f"odd_{axes}_axes",
            heads(*HEADS["odd"], axes=axes),
        )
        for axes in (1, 2)
    ),
    *(
        ("norm_rope", f"{size}_unrotated", heads(*HEADS[size], rotate=False))
        for size in ("odd", "lite")
    ),
    *(
        ("norm_rope_means", size, heads(*shape, block=block))
        for (size, shape), block in zip(
            HEADS.items(),
            (1, 64, 64, 17, 64, 1),
            strict=True,
        )
    ),
    (
        "block_sparse_attention",
        "one",
        attention(1, 1, Grid(1, 1, 1), 64, 1.0, lse=True),
    ),
    (
        "block_sparse_attention",
        "ragged",
        attention(2, 3, Grid(2, 9, 17), 64, 0.4, lse=True),
    ),
    (
        "block_sparse_attention",
        "wide",
        attention(1, 2, Grid(2, 12, 15), 128, 0.5),
    ),
    (
        "block_sparse_attention",
        "narrow",
        attention(1, 2, Grid(3, 7, 5), 22, 0.6, lse=True),
    ),
    (
        "block_sparse_attention",
        "all",
        attention(1, 2, Grid(1, 24, 16), 64, 1.0),
    ),
    *(("group_moments", size, video(*shape)) for size, shape in VIDEOS.items()),
    *(
        (
            "group_norm_silu",
            size,
            normed(*shape[:-1]),
        )
        for size, shape in VIDEOS.items()
    ),
    ("group_norm_silu", "front", normed(2, 2, 4, 3, 32, front=True)),
    (
        "group_norm_silu",
        "norm_alone",
        normed(1, 3, 4, 5, 40, pad=False, silu=False),
    ),
    ("frame_causal_attention", "one", frames(1, 1, 1, 16, lse=True)),
    (
        "frame_causal_attention",
        "odd",
        frames(2, 3, 13, 24, first_frame=1, keys=11, lse=True),
    ),
    ("frame_causal_attention", "edge", frames(1, 2, 65, 64, lse=True)),
    ("frame_causal_attention", "wide", frames(1, 3, 24, 512)),
]
_SELECTIONS = [
    ("one", means(1, 1, (1, 1, 1), 64, 0.5)),
    (
        "peaked",
        means(
            2,
            3,
            (3, 5, 7),
            64,
            0.9,
            (3, 3, 3),
            sharp=4.0,
        ),
    ),
    (
        "flat",
        means(
            1,
            2,
            (5, 4, 4),
            128,
            0.6,
            (11, 3, 3),
            sharp=0.1,
        ),
    ),
    ("stable", means(1, 3, (1, 6, 11), 22, 0.3, ties="stable")),
    ("everything", means(1, 2, (2, 5, 5), 64, 1.0)),
]
SPARSE_GRID = Grid(8, 32, 32)  # S = 8,192 in 128 blocks
# Tensors of the norms have 28 MiB in fp32: more than a cache, and less than what the allocator
# returns to the system after each use.
_BENCHES = [
    *(
        (
            op,
            "lite",
            rows(1, 4096, LITE[0], branch=op == "gated_add_norm"),
            FP32,
        )
        for op in ("modulated_norm", "gated_add_norm")
    ),
    ("modulated_norm", "lite", rows(1, 4096, LITE[0]), BF16),
    ("gated_add_norm", "lite", rows(1, 4096, LITE[0], branch=True), BF16),
    ("norm_rope", "lite", heads(1, 4096, LITE[1], 64), FP32),
    (
        "norm_rope_means",
        "lite",
        heads(1, 4096, LITE[1], 64, block=64),
        FP32,
    ),
    (
        "norm_rope_means",
        "lite",
        heads(1, 4096, LITE[1], 64, block=64),
        BF16,
    ),
    *(
        (
            "block_sparse_attention",
            f"{percent}_percent",
            attention(1, 4, SPARSE_GRID, 64, percent / 100),
            FP32,
        )
        for percent in (10, 20, 100)
    ),
    (
        "select_blocks",
        "128_blocks",
        means(
            1,
            4,
            SPARSE_GRID.tiles,
            64,
            0.9,
            (11, 3, 3),
            sharp=4.0,
        ),
        FP32,
    ),
    ("group_moments", "video", video(1, 5, 128, 128, 128, 32), FP32),
    ("group_norm_silu", "video", normed(1, 5, 128, 128, 128), FP32),
    ("group_norm_silu", "video", normed(1, 5, 128, 128, 128), BF16),
    ("frame_causal_attention", "latent", frames(1, 5, 1024, 512), FP32),
    (
        "select_blocks",
        "1464_blocks",
        means(1, 4, (61, 4, 6), 64, 0.9, (11, 3, 3), sharp=4.0),
        FP32,
    ),
]

CASES = [
    *(Case(op, f"{size}", make, dtype) for op, size, make in _TABLE for dtype in (FP32, BF16)),
    *(Case(op, size, make, FP16) for op, size, make in _TABLE if size in ("odd", "ragged")),
    *(Case("select_blocks", size, make, FP32) for size, make in _SELECTIONS),
]
BENCHES = [Case(op, size, make, dtype, bench=True) for op, size, make, dtype in _BENCHES]
