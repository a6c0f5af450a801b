# SPDX-License-Identifier: Apache-2.0
"""Launchers of the Triton kernels for NABLA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference, tuning
from .._library import attach, on
from ..cards import capability
from ..selections import pack_selection, transpose_selection
from . import gathered
from .trials import Draw, alike, block_ends


def refuse_selection(query_means: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    N = query_means.shape[2]
    if not query_means.numel():
        return "there is nothing to compute"
    if N <= tuning.LONGEST_ROW:
        return None
    return f"it holds rows of up to {tuning.LONGEST_ROW} blocks, got {N}"


def refuse_compiled_selection(query_means: Tensor, *_) -> str | None:
    """Why the CUDA C++ kernel (csrc/cuda/select_blocks.cu) cannot take this call, or None."""
    N, D = query_means.shape[2:]
    if not query_means.numel():
        return "there is nothing to compute"
    if D % 8 or D > 128:
        return f"it takes head dims that are multiples of 8 up to 128, got {D}"
    if N <= tuning.LONGEST_COMPILED_ROW:
        return None
    return f"it holds rows of up to {tuning.LONGEST_COMPILED_ROW} blocks, got {N}"


def thirds(x: float) -> list[float]:
    """Three fp32 numbers whose sum is x exactly: each has 24 of its 53 bits."""
    parts = []
    for _ in range(3):
        part = torch.tensor(x, dtype=torch.float32).item()
        parts.append(part)
        x -= part
    return parts


def launch_selection(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
    block: int | None = None,
) -> Tensor:
    """The packed selection int32 [B, H, N, words]. A row is padded to `block`, by default the next
    power of two.

    The block map is made and used in pieces of `tuning.MAP_BYTES`: several heads at once, or some
    rows of one. Its rows begin at multiples of 64 bytes, so that a lane reads four logits at once.
    """
    from ..triton import selection as kernels

    B, H, N, D = query_means.shape
    query = query_means.float().flatten(0, 1)  # [BH, N, D]
    key = key_means.float().flatten(0, 1).transpose(1, 2)  # [BH, D, N]
    words = -(-N // 32)
    selection = torch.empty(B, H, N, words, dtype=torch.int32, device=query.device)
    of_heads = selection.view(B * H, N, words)
    block = block or tuning.padded(N, 32)
    columns = -(-N // 16) * 16
    row_bytes = 4 * columns
    head_bytes = N * row_bytes
    heads = min(B * H, max(1, tuning.MAP_BYTES // head_bytes))
    rows = min(N, max(1, tuning.MAP_BYTES // row_bytes))
    near = [width // 2 for width in window] or [0, 0, 0]
    drop = thirds(1.0 - keep_mass)
    launch = tuning.row(block, ties == "stable")
    with on(query):
        block_map = torch.empty(heads, rows, columns, device=query.device)
        block_map[..., N:].fill_(-math.inf)
        for head in range(0, B * H, heads):
            some_heads = slice(head, head + heads)
            for first in range(0, N, rows):
                some_queries = query[some_heads, first : first + rows]
                grid = (some_queries.shape[1], some_queries.shape[0])
                logits = block_map[: grid[1], : grid[0]]  # [heads, rows, columns]
                torch.bmm(some_queries, key[some_heads], out=logits[..., :N])
                kernels.select_blocks[grid](
                    logits,
                    of_heads[head:],
                    first,
                    N,
                    words,
                    logits.stride(0),
                    columns,
                    N * words,
                    math.sqrt(D),
                    *drop,
                    *(tiles[1:] or [1, 1]),
                    *near,
                    WINDOW=bool(tiles),
                    STABLE=ties == "stable",
                    BLOCK=block,
                    **launch.options,
                )
    return selection


def selection_constants(query_means: Tensor, *_) -> dict[str, int]:
    """What the caller's binary pads rows to."""
    return {"block": tuning.padded(query_means.shape[2], 32)}


def trial_selection(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
) -> tuple:
    """Some forty blocks for each of two heads, whose masses differ by powers of two: no rounding
    can move the choice."""
    B, H, N, D = query_means.shape

    def derived(blocks: int) -> tuple[int, ...]:
        words = -(-blocks // 32)
        return words, blocks * words, blocks * blocks

    if tiles:
        _, Y, X = tiles
        Y = alike(2, Y)
        X = alike(3, X)
        area = Y * X
        fewest = -(-min(40, N) // area)
        candidates = [T * area for T in range(fewest, -(-N // area))]
        N = alike(40, N, derived, candidates)
        tiles = [N // area, Y, X] if N in candidates else tiles
    else:
        N = alike(40, N, derived)
    draw = Draw(query_means.device)
    heads = min(2, B * H)
    query = draw.like(query_means, 1, heads, N, D).zero_()
    query[..., 0] = math.log(2.0) * math.sqrt(D)
    key = draw.like(key_means, 1, heads, N, D).zero_()
    powers = torch.arange(N, device=key.device) * 7 % 40
    key[..., 0] = -powers.float()
    return query, key, 0.9, tiles, window, ties


def refuse_attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Tensor, *_
) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not query.numel():
        return "there is nothing to compute"
    if query.dtype == torch.float64:
        return "its matrix products take float16, bfloat16 and float32, got float64"
    if query.shape[-1] > 128:
        return f"it holds head dims up to 128, got {query.shape[-1]}"
    if selection.shape[2] < 1 << 16:
        return None
    return f"its lists hold 65,535 blocks, got {selection.shape[2]}"


def attention_kind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
) -> tuple[bool, bool]:
    """Whether every block is full, and whether the bound replaces the running maximum.

    It does in bf16 alone: an exponent near -40 is rounded to 2^-19, which shows beside fp32, and
    fp16 ends at 2^-24.
    """
    full = query.shape[1] == tuning.TOKENS * selection.shape[2]
    low = logit_bound / math.log(2) <= tuning.BOUND_LOG2
    return full, low and query.dtype == torch.bfloat16


def descriptor(x: Tensor, width: int):
    """A tensor descriptor whose tiles are TOKENS rows and `width` columns of one (batch, head) of
    x [B, S, H, D], or None where the hardware cannot take x."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [
        stride if size > 1 else x.shape[-1]
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in strides):
        return None
    tile = [1, tuning.TOKENS, 1, width]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], tile)


def described(first: Tensor, second: Tensor, launch: tuning.Launch, width: int) -> tuple:
    """(first, second, True) as tensor descriptors, where `launch` reads by them and the hardware
    can; otherwise (first, second, False) as they are."""
    if launch.descriptors:
        of_first = descriptor(first, width)
        of_second = descriptor(second, width)
        if of_first is not None and of_second is not None:
            return of_first, of_second, True
    return first, second, False


def list_chunk(N: int) -> int:
    """How many of N blocks `list_blocks` looks at at a time."""
    return min(tuning.LIST_CHUNK, tuning.padded(N))


def list_blocks(selection: Tensor, first: int, pairs: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The kept blocks of the rows of `pairs` (batch, head) pairs from `first` on, in ascending
    order and found `chunk` at a time: int16 [pairs * N, N], and their numbers int32 [pairs * N]."""
    from ..triton import nabla as kernels

    N, words = selection.shape[2:]
    rows = selection.reshape(-1, words)[first * N :]
    lists = torch.empty(pairs * N, N, dtype=torch.int16, device=selection.device)
    counts = torch.empty(pairs * N, dtype=torch.int32, device=selection.device)
    kernels.list_blocks[(pairs * N,)](
        rows,
        lists,
        counts,
        N,
        words,
        CHUNK=chunk,
        **tuning.LIST.options,
    )
    return lists, counts


def launch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
    chunk: int | None = None,
    bounded: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] and the natural log-sum-exp fp32 [B, H, S].

    `chunk` is what `list_blocks` takes, and `bounded` says whether logit_bound replaces the running
    maximum; by default both are what suits the inputs. Heads are taken in groups whose block lists
    fit into `tuning.LIST_BYTES`.
    """
    from ..triton import nabla as kernels

    B, S, H, D = query.shape
    N = selection.shape[2]
    block = tuning.padded(D, 16)
    head_bytes = 2 * N * N  # of a head's block lists, int16 [N, N]
    group = max(1, tuning.LIST_BYTES // head_bytes)
    chunk = chunk or list_chunk(N)
    block_offsets = block_offsets.contiguous()
    out = query.new_empty(B, S, H, D)
    lse = query.new_empty((B, H, S), dtype=torch.float32)
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    full, usable = attention_kind(query, key, value, selection, block_offsets, scale, logit_bound)
    bounded = usable if bounded is None else bounded
    scale_log2 = scale / math.log(2)
    bound_log2 = logit_bound / math.log(2) if bounded else 0.0
    launch = tuning.attention(block, query.dtype, capability(query), full)
    width = block // 2 if launch.split else block
    key, value, tma = described(key, value, launch, width)
    with on(query):
        for first in range(0, B * H, group):
            pairs = min(group, B * H - first)
            lists, counts = list_blocks(selection, first, pairs, chunk)
            kernels.block_sparse_attention[(N, pairs)](
                query,
                key,
                value,
                lists,
                counts,
                block_offsets,
                out,
                lse,
                first,
                S,
                H,
                N,
                D,
                *strides,
                scale_log2,
                bound_log2,
                FULL=full,
                BOUNDED=bounded,
                TMA=tma,
                SPLIT=launch.split,
                PRECISION="ieee",
                WIDTH=width,
                TOKENS=tuning.TOKENS,
                **launch.options,
            )
    return out, lse


def launch_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seven products for a kept pair of blocks, in two kernels, and no sum that two programs add
    to: the same bits every time."""
    from ..triton import nabla as kernels

    B, S, H, D = query.shape
    N = selection.shape[2]
    block = tuning.padded(D, 16)
    (full,) = gradients_kind(query, key, value, out, lse, selection)
    head_bytes = 2 * N * N  # of a head's block lists, int16 [N, N]
    group = max(1, tuning.LIST_BYTES // head_bytes)
    chunk = chunk or list_chunk(N)
    transposed = transpose_selection(selection)
    offsets = block_offsets.contiguous()
    out = out.contiguous()
    lse = lse.contiguous()
    grad_out = grad_out.contiguous()
    grad_sums = lse if grad_lse is None else grad_lse.contiguous()
    common = torch.empty_like(lse)  # fp32 [B, H, S], from the first kernel to the second
    grad_query, grad_key, grad_value = (query.new_empty(B, S, H, D) for _ in range(3))
    of_queries, of_keys = tuning.attention_backward(block, query.dtype, capability(query), full)
    query_width = block // 2 if of_queries.split else block
    key_width = block // 2 if of_keys.split else block
    keys, values, keys_tma = described(key, value, of_queries, query_width)
    queries, grads, queries_tma = described(query, grad_out, of_keys, key_width)
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    sizes = [S, H, N, D, *strides, scale, scale / math.log(2)]
    constants = {"FULL": full, "PRECISION": "ieee", "TOKENS": tuning.TOKENS}
    with on(query):
        for first in range(0, B * H, group):
            pairs = min(group, B * H - first)
            lists, counts = list_blocks(selection, first, pairs, chunk)
            kernels.block_sparse_attention_backward_query[(N, pairs)](
                query,
                keys,
                values,
                out,
                grad_out,
                lse,
                grad_sums,
                lists,
                counts,
                offsets,
                common,
                grad_query,
                first,
                *sizes,
                TMA=keys_tma,
                SPLIT=of_queries.split,
                LSE=grad_lse is not None,
                WIDTH=query_width,
                **constants,
                **of_queries.options,
            )
            lists, counts = list_blocks(transposed, first, pairs, chunk)
            kernels.block_sparse_attention_backward_key[(N, pairs)](
                queries,
                key,
                value,
                grads,
                lse,
                common,
                lists,
                counts,
                offsets,
                grad_key,
                grad_value,
                first,
                *sizes,
                TMA=queries_tma,
                SPLIT=of_keys.split,
                WIDTH=key_width,
                **constants,
                **of_keys.options,
            )
    return grad_query, grad_key, grad_value


def attention_constants(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
) -> dict[str, int]:
    """The chunk of the caller's binary of `list_blocks`, and whether its bound is used."""
    _, bounded = attention_kind(query, key, value, selection, block_offsets, scale, logit_bound)
    return {"chunk": list_chunk(selection.shape[2]), "bounded": bounded}


def small_attention(query: Tensor, key: Tensor, value: Tensor, selection: Tensor) -> tuple:
    """query, key, value, selection and offsets of some blocks, full ones like the caller's or
    ragged, of its kinds of sizes: a block keeps itself and about a fifth of the others, the second
    one all."""
    _, S, H, D = query.shape
    N = selection.shape[2]
    full = S == tuning.TOKENS * N
    N = alike(33 if N > 32 else 3, N, lambda blocks: (-(-blocks // 32),))
    H = alike(2, H)
    ends = [tuning.TOKENS * i for i in range(N + 1)] if full else block_ends(N, S)
    draw = Draw(query.device)
    tensors = [draw.like(x, 1, ends[-1], H, D) for x in (query, key, value)]
    itself = torch.eye(N, dtype=torch.bool, device=query.device)
    others = draw.integers(5, 1, H, N, N) == 0
    keep = others | itself
    keep[:, :, 1:2] = True
    offsets = torch.tensor(ends, dtype=torch.int32, device=query.device)
    return *tensors, pack_selection(keep), offsets


def trial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
) -> tuple:
    """`small_attention`, by the caller's bound where it has one that is used."""
    _, bounded = attention_kind(query, key, value, selection, block_offsets, scale, logit_bound)
    query, key, *rest = small_attention(query, key, value, selection)
    if bounded:
        # no logit of the small inputs may exceed the caller's bound either
        longest_query = query.float().norm(dim=-1).max()
        longest_key = key.float().norm(dim=-1).max()
        largest = longest_query * longest_key
        scale = logit_bound / largest.item()
    return query, key, *rest, scale, logit_bound


def refuse_gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, selection: Tensor, *_
) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    return refuse_attention(query, key, value, selection)


def gradients_kind(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, selection: Tensor, *_
) -> tuple[bool]:
    """(Whether every block is full,)."""
    return (query.shape[1] == tuning.TOKENS * selection.shape[2],)


def gradients_constants(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, selection: Tensor, *_
) -> dict[str, int]:
    """The chunk of the caller's binary of `list_blocks`."""
    return {"chunk": list_chunk(selection.shape[2])}


def trial_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
) -> tuple:
    """`small_attention`, its results as the reference has them, and random gradients of these."""
    tensors = small_attention(query, key, value, selection)
    out, lse = reference.block_sparse_attention(*tensors, scale)
    draw = Draw(query.device)
    small_grad_out = draw.normal(*out.shape, dtype=grad_out.dtype)
    small_grad_lse = None if grad_lse is None else draw.normal(*lse.shape)
    query, key, value, selection, block_offsets = tensors
    return (
        query,
        key,
        value,
        out,
        lse,
        selection,
        block_offsets,
        small_grad_out,
        small_grad_lse,
        scale,
    )


attach(
    "select_blocks",
    launch_selection,
    refuse_selection,
    trial_selection,
    selection_constants,
    refuse_compiled=refuse_compiled_selection,
)
attach(
    "block_sparse_attention",
    launch_attention,
    refuse_attention,
    trial_attention,
    attention_constants,
    fallback=gathered.block_sparse_attention,
)
attach(
    "block_sparse_attention_backward",
    launch_gradients,
    refuse_gradients,
    trial_gradients,
    gradients_constants,
    fallback=gathered.block_sparse_attention_backward,
)
