# SPDX-License-Identifier: Apache-2.0
"""NABLA (arXiv 2507.13546): which blocks of keys each block of queries attends to, and attention
over those blocks.

A block is one 8 x 8 tile of patches of one latent frame, fewer at a ragged border: tokens come tile
by tile and block i owns tokens ``block_offsets[i]`` to ``block_offsets[i + 1]``. A selection is
packed: int32 [B, H, N, W] with W = ceil(N / 32); bit j % 32 of word j // 32 says that the block of
queries keeps key block j.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, tuning
from ._library import attach, declare, differentiate, in_double, on


def _empty_selection(query_means: Tensor, *_) -> Tensor:
    B, H, N, _ = query_means.shape
    return query_means.new_empty((B, H, N, (N + 31) // 32), dtype=torch.int32)


def _empty_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    B, S, H, _ = query.shape
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((B, H, S), dtype=lse_dtype)


def _empty_gradients(query: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


_select_blocks = declare(
    "select_blocks(Tensor query_means, Tensor key_means, float keep_mass, int[] tiles, int[] "
    "window, str ties) -> Tensor",
    reference.select_blocks,
    _empty_selection,
)
_block_sparse_attention = declare(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor selection, Tensor "
    "block_offsets, float scale,"
    " float logit_bound) -> (Tensor, Tensor)",
    reference.block_sparse_attention,
    _empty_attention,
)
_block_sparse_attention_backward = declare(
    "block_sparse_attention_backward(Tensor query, Tensor key, Tensor value, Tensor out, Tensor "
    "lse, Tensor selection,"
    " Tensor block_offsets, Tensor grad_out, Tensor? grad_lse, float scale) -> (Tensor, Tensor, "
    "Tensor)",
    reference.block_sparse_attention_backward,
    _empty_gradients,
)


def _check_alike(**tensors: Tensor) -> None:
    """The kernels read whole rows of floats: one shape of four dimensions, one float dtype, rows
    contiguous."""
    (first, x), *rest = tensors.items()
    names = ", ".join(tensors)
    if x.dim() != 4 or any(other.shape != x.shape for _, other in rest):
        raise ValueError(
            f"{names} must share one shape of four dimensions, got "
            f"{[list(t.shape) for t in tensors.values()]}."
        )
    if not x.is_floating_point() or any(other.dtype != x.dtype for _, other in rest):
        raise TypeError(
            f"{names} must share one float dtype, got "
            f"{[t.dtype for t in tensors.values()]}; cast them first."
        )
    for name, t in tensors.items():
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides "
                f"{list(t.stride())}; "
                "call .contiguous() first."
            )


def select_blocks(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    ties: str = "all",
) -> Tensor:
    """For every block of queries, the smallest set of key blocks that holds ``keep_mass`` of its
    probability.

    A row's masses are m_j = round(2^32 exp(s_j - max s)) with s = query_means key_means^T /
    sqrt(D). In ascending order of m, blocks are dropped while their running sum, the block itself
    included, stays below (1 - keep_mass) * sum(m): exact integer arithmetic, so no order of
    summation changes the set. Blocks as heavy as the lightest kept one are all kept
    (``ties="all"``), or dropped from the lowest index on as a stable sort would
    (``ties="stable"``). The largest is always kept; a row without a finite maximum keeps
    everything. keep_mass is the published P.

    query_means, key_means: [B, H, N, D] (fp32 from `norm_rope_means`), last dimension contiguous. tiles: (T, Y, X) grid of blocks with
    N = T * Y * X, and window: published full widths (wT, wY, wX), for the union with the local window
    |dt| <= wT // 2, |dy| <= wY // 2, |dx| <= wX // 2, truncated at borders; both or neither.
    Returns the packed selection, int32 [B, H, N, W]. Raises ValueError on other shapes, strides or values, TypeError on
    other dtypes.
    """
    _check_alike(query_means=query_means, key_means=key_means)
    if not 0.0 < keep_mass <= 1.0:
        raise ValueError(f"keep_mass must be in (0, 1], got {keep_mass}.")
    if ties not in ("all", "stable"):
        raise ValueError(f'ties must be "all" or "stable", got {ties!r}.')
    if (tiles is None) != (window is None):
        raise ValueError("tiles and window must be given together, got only one of them.")
    tiles, window = list(tiles or ()), list(window or ())
    with torch.no_grad():  # the choice has no gradient
        op = reference.select_blocks if in_double(query_means) else _select_blocks
        return op(query_means, key_means, keep_mass, tiles, window, ties)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    logit_bound: float = math.inf,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value over the kept blocks only.

    query, key, value: [B, S, H, D] of one dtype, last dimension contiguous, other strides free.
    selection: packed int32 [B, H, N, W]. block_offsets: int32 [N + 1] from 0 to S, blocks of 1 to
    64 tokens. scale: 1 / sqrt(D) by default.
    logit_bound: a number that no |scale * query . key| exceeds, where one is known, as after
    `norm_rope` with known weights. A kernel may then take it for every row's maximum and need not
    search; a false one can overflow or lose the row. Returns out [B, S, H, D], contiguous, in
    query's dtype; with return_lse also the natural log-sum-exp of the kept logits, fp32 [B, H, S].
    A block of queries that keeps nothing gives zeros and -inf. Raises ValueError on other shapes,
    strides and bounds and, except by GPU kernels, which do not look at them, on other
    block_offsets; TypeError on other dtypes.
    """
    _check_alike(query=query, key=key, value=value)
    if block_offsets.dim() != 1 or block_offsets.dtype != torch.int32:
        raise ValueError(
            f"block_offsets must be int32 [N + 1], got {block_offsets.dtype} "
            f"{list(block_offsets.shape)}."
        )
    N = block_offsets.shape[0] - 1
    wanted = (query.shape[0], query.shape[2], N, -(-N // 32))
    if selection.shape != wanted or selection.dtype != torch.int32:
        raise ValueError(
            f"selection must be int32 [B, H, N, ceil(N / 32)] = {list(wanted)}, got "
            f"{selection.dtype} "
            f"{list(selection.shape)}; make it with select_blocks or pack_selection."
        )
    if not logit_bound >= 0.0:
        raise ValueError(
            f"logit_bound must be a number from 0 on, got {logit_bound}; leave it "
            "out when none is known."
        )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    op = reference.block_sparse_attention if in_double(query) else _block_sparse_attention
    out, lse = op(query, key, value, selection, block_offsets, scale, logit_bound)
    return (out, lse) if return_lse else out


def selection_density(selection: Tensor, blocks: int) -> float:
    """Kept blocks over all blocks of a packed selection for ``blocks`` = N blocks: a number in
    0..1. Raises ValueError where it is of another number of blocks, TypeError on other dtypes."""
    if selection.dim() < 2 or selection.shape[-2] != blocks:
        raise ValueError(
            f"selection must have a row for each of N = {blocks} blocks, got "
            f"{list(selection.shape)}; give the number of blocks it was made for."
        )
    return reference.unpack_selection(selection, blocks).double().mean().item()


def transpose_selection(selection: Tensor) -> Tensor:
    """Which blocks of queries keep a block of keys: bit i of row j of the result is bit j of row i
    of ``selection``.

    selection: packed int32 [..., N, W], on any device. Returns the same shape. Tiles of 32 x 32
    bits are transposed in five rounds of swaps (Warren, Hacker's Delight, 7-3), so that the map of
    N x N never exists. Raises ValueError on other shapes and dtypes.
    """
    N = selection.shape[-2] if selection.dim() > 1 else 0
    if selection.dtype != torch.int32 or selection.dim() < 2 or selection.shape[-1] != -(-N // 32):
        raise ValueError(
            f"selection must be int32 [..., N, ceil(N / 32)], got {selection.dtype} "
            f"{list(selection.shape)}; "
            "make it with select_blocks or pack_selection."
        )
    W = selection.shape[-1]
    # [..., tile of rows, 32, word]
    bits = F.pad(selection, (0, 0, 0, 32 * W - N)).unflatten(-2, (W, 32))
    for width, mask in (
        (16, 0x0000FFFF),
        (8, 0x00FF00FF),
        (4, 0x0F0F0F0F),
        (2, 0x33333333),
        (1, 0x55555555),
    ):
        low, high = bits.unflatten(-2, (-1, 2, width)).unbind(-3)  # rows that lie `width` apart
        swapped = ((low >> width) ^ high) & mask
        bits = torch.stack((low ^ (swapped << width), high ^ swapped), -3).flatten(-4, -2)
    return bits.transpose(-3, -1).flatten(-3, -2)[..., :N, :].contiguous()


# ---- gradients


def _keep_attention(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
    query, key, value, selection, block_offsets, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradients = _block_sparse_attention_backward(
        query, key, value, out, lse, selection, block_offsets, grad_out, grad_lse, ctx.scale
    )
    return *gradients, None, None, None, None


differentiate("block_sparse_attention", _keep_attention, _attention_gradients)


# ---- on GPUs


def _refuse_selection(query_means: Tensor, *_) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    N = query_means.shape[2]
    if not query_means.numel():
        return "there is nothing to compute"
    return (
        None
        if N <= tuning.LONGEST_ROW
        else (f"it holds rows of up to {tuning.LONGEST_ROW} blocks, got {N}")
    )


def _refuse_compiled_selection(query_means: Tensor, *_) -> str | None:
    """Why the CUDA C++ kernel (csrc/cuda/select_blocks.cu) cannot take this call, or None."""
    N, D = query_means.shape[2:]
    if not query_means.numel():
        return "there is nothing to compute"
    if D % 8 or D > 128:
        return f"it takes head dims that are multiples of 8 up to 128, got {D}"
    return (
        None
        if N <= tuning.LONGEST_COMPILED_ROW
        else (f"it holds rows of up to {tuning.LONGEST_COMPILED_ROW} blocks, got {N}")
    )


def _thirds(x: float) -> list[float]:
    """Three fp32 numbers whose sum is x exactly: each has 24 of its 53 bits."""
    parts = []
    for _ in range(3):
        parts.append(torch.tensor(x, dtype=torch.float32).item())
        x -= parts[-1]
    return parts


def _launch_selection(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
) -> Tensor:
    """The map is made and used in pieces of `tuning.MAP_BYTES`: several heads at once, or some rows
    of one."""
    from .triton import nabla as kernels

    B, H, N, D = query_means.shape
    query, key = query_means.float().flatten(0, 1), key_means.float().flatten(0, 1).transpose(1, 2)
    selection = torch.empty(B, H, N, -(-N // 32), dtype=torch.int32, device=query.device)
    words, block = selection.shape[-1], tuning.padded(N, 32)
    heads, rows = (
        max(1, tuning.MAP_BYTES // (4 * N * N)),
        min(N, max(1, tuning.MAP_BYTES // (4 * N))),
    )
    near = [width // 2 for width in window] or [0, 0, 0]
    with on(query):
        for head in range(0, B * H, heads):
            for first in range(0, N, rows):
                # [heads, rows, N]
                logits = query[head : head + heads, first : first + rows] @ key[head : head + heads]
                kernels.select_blocks[(logits.shape[1], logits.shape[0])](
                    logits,
                    selection.view(B * H, N, words)[head:],
                    first,
                    N,
                    words,
                    logits.stride(0),
                    N * words,
                    math.sqrt(D),
                    *_thirds(1.0 - keep_mass),
                    *(tiles[1:] or [1, 1]),
                    *near,
                    WINDOW=bool(tiles),
                    STABLE=ties == "stable",
                    BLOCK=block,
                    num_warps=tuning.row(block).num_warps,
                )
    return selection


def _trial_selection(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
) -> tuple:
    """A row of forty blocks for each of two heads, whose masses differ by powers of two: no
    rounding can move the choice."""
    D, device = query_means.shape[-1], query_means.device
    query = torch.zeros(1, 2, 40, D, device=device)
    query[..., 0] = math.log(2.0) * math.sqrt(D)
    key = torch.zeros(1, 2, 40, D, device=device)
    key[..., 0] = -(torch.arange(40, device=device) * 7 % 40).float()
    return query.to(query_means.dtype), key.to(query_means.dtype), 0.9, [2, 4, 5], [3, 3, 1], ties


def _refuse_attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Tensor, *_
) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if not query.numel():
        return "there is nothing to compute"
    if query.dtype == torch.float64:
        return "its matrix products take float16, bfloat16 and float32, got float64"
    if query.shape[-1] > 128:
        return f"it holds head dims up to 128, got {query.shape[-1]}"
    return (
        None
        if selection.shape[2] < 1 << 16
        else (f"its lists hold 65,535 blocks, got {selection.shape[2]}")
    )


def _attention_kind(
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
    return full, logit_bound / math.log(2) <= tuning.BOUND_LOG2 and query.dtype == torch.bfloat16


def _describe(x: Tensor, block: int):
    """A tensor descriptor whose tiles are TOKENS rows of one (batch, head) of x [B, S, H, D], or
    None where the hardware cannot take it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [
        stride if size > 1 else x.shape[-1]
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in strides):
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, tuning.TOKENS, 1, block])


def _list_blocks(selection: Tensor, first: int, pairs: int) -> tuple[Tensor, Tensor]:
    """What the rows of so many (batch, head) pairs keep, in ascending order: int16 [pairs * N, N]
    and their numbers int32 [pairs * N]."""
    from .triton import nabla as kernels

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
        CHUNK=min(tuning.LIST_CHUNK, tuning.padded(N)),
        num_warps=tuning.LIST.num_warps,
    )
    return lists, counts


def _launch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
) -> tuple[Tensor, Tensor]:
    """Heads are taken in groups whose block lists fit into `tuning.LIST_BYTES`."""
    from .triton import nabla as kernels

    B, S, H, D = query.shape
    N, block = selection.shape[2], tuning.padded(D, 16)
    group, block_offsets = max(1, tuning.LIST_BYTES // (2 * N * N)), block_offsets.contiguous()
    out, lse = query.new_empty(B, S, H, D), query.new_empty((B, H, S), dtype=torch.float32)
    strides = [stride for x in (query, key, value) for stride in x.stride()[:3]]
    full, bounded = _attention_kind(query, key, value, selection, block_offsets, scale, logit_bound)
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    launch = tuning.attention(block, query.dtype, capability, full)
    tiles = [_describe(x, block) for x in (key, value)] if launch.descriptors else [None]
    descriptors = None not in tiles
    with on(query):
        for first in range(0, B * H, group):
            pairs = min(group, B * H - first)
            lists = _list_blocks(selection, first, pairs)
            kernels.block_sparse_attention[(N, pairs)](
                query,
                *(tiles if descriptors else (key, value)),
                *lists,
                block_offsets,
                out,
                lse,
                first,
                S,
                H,
                N,
                D,
                *strides,
                scale / math.log(2),
                logit_bound / math.log(2) if bounded else 0.0,
                FULL=full,
                BOUNDED=bounded,
                TMA=descriptors,
                PRECISION="ieee",
                BLOCK=block,
                TOKENS=tuning.TOKENS,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return out, lse


def _launch_gradients(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Seven products for a kept pair of blocks, in two kernels, and no sum that two programs add
    to: the same bits every time."""
    from .triton import nabla as kernels

    B, S, H, D = query.shape
    N, block, (full,) = (
        selection.shape[2],
        tuning.padded(D, 16),
        _gradients_kind(query, key, value, out, lse, selection),
    )
    group, transposed, offsets = (
        max(1, tuning.LIST_BYTES // (2 * N * N)),
        transpose_selection(selection),
        block_offsets.contiguous(),
    )
    out, lse, grad_out = out.contiguous(), lse.contiguous(), grad_out.contiguous()
    sums, common = lse if grad_lse is None else grad_lse.contiguous(), torch.empty_like(lse)
    gradients = [query.new_empty(B, S, H, D) for _ in range(3)]
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)
    of_queries, of_keys = tuning.attention_backward(block, query.dtype, capability, full)
    described = [
        [_describe(x, block) for x in pair] if of.descriptors else [None]
        for of, pair in ((of_queries, (key, value)), (of_keys, (query, grad_out)))
    ]
    by_tma = [None not in tiles for tiles in described]
    keys, queries = (
        tiles if tma else pair
        for tiles, tma, pair in zip(
            described, by_tma, ((key, value), (query, grad_out)), strict=True
        )
    )
    sizes = [
        S,
        H,
        N,
        D,
        *(stride for x in (query, key, value) for stride in x.stride()[:3]),
        scale,
        scale / math.log(2),
    ]
    constants = {"FULL": full, "PRECISION": "ieee", "BLOCK": block, "TOKENS": tuning.TOKENS}
    with on(query):
        for first in range(0, B * H, group):
            pairs = min(group, B * H - first)
            lists = _list_blocks(selection, first, pairs)
            kernels.block_sparse_attention_backward_query[(N, pairs)](
                query,
                *keys,
                out,
                grad_out,
                lse,
                sums,
                *lists,
                offsets,
                common,
                gradients[0],
                first,
                *sizes,
                TMA=by_tma[0],
                LSE=grad_lse is not None,
                **constants,
                num_warps=of_queries.num_warps,
                num_stages=of_queries.num_stages,
            )
            lists = _list_blocks(transposed, first, pairs)
            kernels.block_sparse_attention_backward_key[(N, pairs)](
                queries[0],
                key,
                value,
                queries[1],
                lse,
                common,
                *lists,
                offsets,
                *gradients[1:],
                first,
                *sizes,
                TMA=by_tma[1],
                **constants,
                num_warps=of_keys.num_warps,
                num_stages=of_keys.num_stages,
            )
    return tuple(gradients)


def _trial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float,
) -> tuple:
    """Three blocks, full ones like the caller's or ragged: one keeps itself, one all of them, one
    the first two."""
    full, bounded = _attention_kind(query, key, value, selection, block_offsets, scale, logit_bound)
    ends = [0, 64, 128, 192] if full else [0, 64, 69, 101]
    offsets = torch.tensor(ends, dtype=torch.int32, device=query.device)
    keep = torch.tensor([[[[0b001], [0b111], [0b011]]]], dtype=torch.int32, device=query.device)
    shape, like = (1, ends[-1], 1, query.shape[-1]), {"dtype": query.dtype, "device": query.device}
    query, key, value = (torch.randn(shape, **like) for _ in range(3))
    if bounded:  # and must be here as well
        scale = (
            logit_bound / (query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()).item()
        )
    return query, key, value, keep, offsets, scale, logit_bound


def _refuse_gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, selection: Tensor, *_
) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    return _refuse_attention(query, key, value, selection)


def _gradients_kind(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, selection: Tensor, *_
) -> tuple[bool]:
    """Whether every block is full."""
    return (query.shape[1] == tuning.TOKENS * selection.shape[2],)


def _trial_gradients(
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
    """The blocks of `_trial_attention`, its results as the reference has them, and random gradients
    of these."""
    *tensors, _ = _trial_attention(query, key, value, selection, block_offsets, scale, math.inf)
    out, lse = reference.block_sparse_attention(*tensors)
    grads = torch.randn_like(out), None if grad_lse is None else torch.randn_like(lse)
    return *tensors[:3], out, lse, *tensors[3:5], *grads, scale


attach(
    "select_blocks",
    _launch_selection,
    _refuse_selection,
    _trial_selection,
    refuse_compiled=_refuse_compiled_selection,
)
attach(
    "block_sparse_attention",
    _launch_attention,
    _refuse_attention,
    _trial_attention,
    _attention_kind,
)
attach(
    "block_sparse_attention_backward",
    _launch_gradients,
    _refuse_gradients,
    _trial_gradients,
    _gradients_kind,
)
