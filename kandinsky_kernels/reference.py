# SPDX-License-Identifier: Apache-2.0
"""The meaning of every operator, in plain PyTorch.

A reference computes in the wider of fp32 and its inputs' dtype, also under autocast and where TF32
is allowed. On fp64 inputs it is the oracle of the tests; elsewhere it is the fallback and, where it
can be, the fake kernel. It refuses what kernels refuse, by the check of its name in `checks`.

Sizes are one letter everywhere:

    B  samples      S  tokens     H  heads                D  numbers of a head
    C  channels     G  groups     N  blocks of tokens     W  = ceil(N / 32), words of a selection
    T, Y, X         the grid of frames, rows and columns: of pixels, or of blocks
    P               rows of a table of angles, or tokens of a frame
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks
from ._derivatives import derives
from ._memory import explained
from ._precision import double, full_precision
from .selections import pack_selection, unpacked

# The mass of a block is an integer, in units of 2^-32 of the row's largest: sums are exact in any
# order.
MASS_BITS = 32
# Elements of the map of N x N blocks that exist at once, so that it is never whole in memory.
_MAP_ELEMENTS = 1 << 22
# The most elements of an operand of a convolution, because cuDNN counts them in 32 bits.
INDEXABLE = 2**31 - 1
# Rows of queries at once in `frame_causal_attention`, and the most logits at once. With fewer rows,
# a matrix product reads more than it computes.
_QUERIES = 512
_LOGITS = 1 << 25


def _meaning_of(function: Callable) -> Callable:
    """Let the check of its name precede a reference, run it in full precision, and let it say in
    one sentence where memory is short."""
    name = function.__name__
    check = getattr(checks, name)

    @functools.wraps(function)
    @explained(name)
    def run(x: Tensor, *args, **options):
        check(x, *args, **options, values=True)
        with full_precision(x.device, convolutions=name == "causal_conv3d"):
            return function(x, *args, **options)

    return run


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@_meaning_of
def modulated_norm(
    x: Tensor,  # [B, S, C]
    scale: Tensor,  # [B, C]
    shift: Tensor,  # [B, C]
    eps: float,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift."""
    normed = F.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    factor = 1 + _wide(scale)[:, None]  # [B, 1, C]
    y = normed * factor + _wide(shift)[:, None]
    return y.to(x.dtype).contiguous()


@_meaning_of
def gated_add_norm(
    x: Tensor,  # [B, S, C]
    branch: Tensor,  # [B, S, C]
    gate: Tensor,  # [B, C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(y, modulated_norm(y)) with y = x + gate * branch, rounded to x's dtype.

    Without scale the second result is empty.
    """
    y = _wide(x) + _wide(gate)[:, None] * _wide(branch)
    y = y.to(x.dtype).contiguous()
    if scale is None or shift is None:
        return y, y.new_empty(0)
    return y, modulated_norm(y, scale, shift, eps)


def _layer_norm_backward(
    x: Tensor,  # [B, S, C]
    scale: Tensor,  # [B, C]
    grad: Tensor,  # [B, S, C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift of `modulated_norm`, before any is rounded."""
    wide = _wide(x)
    grad = _wide(grad)
    shape = x.shape[-1:]
    normed, mean, inverse = torch.native_layer_norm(wide, shape, None, None, eps)
    grad_normed = grad * (1 + _wide(scale)[:, None])
    grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normed, wide, shape, mean, inverse, None, None, [True, False, False]
    )
    grad_scale = (grad * normed).sum(1)  # [B, C]
    grad_shift = grad.sum(1)  # [B, C]
    return grad_x, grad_scale, grad_shift


@_meaning_of
def modulated_norm_backward(
    x: Tensor,  # [B, S, C]
    scale: Tensor,  # [B, C]
    grad: Tensor,  # [B, S, C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, and of scale and shift in at least fp32."""
    grad_x, grad_scale, grad_shift = _layer_norm_backward(x, scale, grad, eps)
    return grad_x.to(x.dtype).contiguous(), grad_scale, grad_shift


@_meaning_of
def gated_add_norm_backward(
    y: Tensor,  # [B, S, C]
    branch: Tensor,  # [B, S, C]
    gate: Tensor,  # [B, C]
    scale: Tensor,  # [B, C]
    grad_y: Tensor | None,  # [B, S, C]
    grad_normed: Tensor,  # [B, S, C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and branch in their dtype, and of gate, scale and shift.

    y is the sum that the forward pass returned, and grad_y its gradient, where it was used. The
    gradients of the vectors are in at least fp32.
    """
    grad, grad_scale, grad_shift = _layer_norm_backward(y, scale, grad_normed, eps)
    if grad_y is not None:
        grad = grad + _wide(grad_y)
    grad_branch = grad * _wide(gate)[:, None]
    grad_gate = (grad * _wide(branch)).sum(1)  # [B, C]
    return (
        grad.to(y.dtype).contiguous(),
        grad_branch.to(y.dtype).contiguous(),
        grad_gate,
        grad_scale,
        grad_shift,
    )


def block_of_token(
    block_offsets: Tensor,  # int32 [N + 1]
    tokens: int,
) -> Tensor:
    """The block that each token belongs to: int64 [S].

    It is a block's number whatever the offsets are, so that nothing is indexed beyond the blocks.
    """
    ends = block_offsets[1:-1].contiguous()  # of all blocks but the last
    token = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, token, right=True)


@_meaning_of
def block_means(
    x: Tensor,
    block_offsets: Tensor,
) -> Tensor:
    """Mean over each block's tokens: [B, H, N, D] in at least fp32, contiguous.

    Raises ValueError on other shapes and on offsets that do not ascend from 0 to S, TypeError on
    other dtypes.
    """
    B, S, H, D = x.shape
    wide = _wide(x)
    lengths = block_offsets.diff()  # [N]
    sums = wide.new_zeros(B, lengths.shape[0], H, D)
    sums = sums.index_add(1, block_of_token(block_offsets, S), wide)  # [B, N, H, D]
    means = sums / lengths.to(wide.dtype)[:, None, None]
    return means.transpose(1, 2).contiguous()  # [B, H, N, D]


def _rotate(
    x: Tensor,  # [B, S, H, D]
    cos: Tensor,  # [P, D / 2]
    sin: Tensor,  # [P, D / 2]
    positions: Tensor,  # int32 [S, axes]
    pairs: list[int],  # of each axis
    sign: int,
) -> Tensor:
    """Turn pairs of neighbours of x by sign times the angles of the tables."""
    cos = _of_tokens(cos, positions, pairs).to(x.dtype)
    sin = _of_tokens(sin, positions, pairs).to(x.dtype)
    cos = cos[:, None]  # [S, 1, D / 2]
    sin = sign * sin[:, None]  # [S, 1, D / 2]
    x = x.unflatten(-1, (-1, 2))  # [B, S, H, D / 2, 2]
    even, odd = x.unbind(-1)  # [B, S, H, D / 2] each
    first = even * cos - odd * sin
    second = even * sin + odd * cos
    return torch.stack((first, second), -1).flatten(-2)  # [B, S, H, D]


def _of_tokens(
    table: Tensor,  # [P, D / 2]
    positions: Tensor,  # int32 [S, axes]
    pairs: list[int],
) -> Tensor:
    """The rows of a table that belong to each token's positions: [S, D / 2]."""
    columns = table.split(list(pairs), -1)  # [P, pairs of an axis] each
    rows = positions.long().unbind(-1)  # [S] for each axis
    parts = [part[row] for part, row in zip(columns, rows, strict=True)]
    return torch.cat(parts, -1)


@_meaning_of
def norm_rope(
    x: Tensor,  # [B, S, H, D]
    weight: Tensor,  # [D]
    cos: Tensor | None,  # [P, D / 2]
    sin: Tensor | None,  # [P, D / 2]
    positions: Tensor | None,  # int32 [S, axes]
    pairs: list[int],  # of each axis
    block_offsets: Tensor | None,  # int32 [N + 1]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over D, then a rotation of pairs; with offsets also the block means of the result.

    Returns y [B, S, H, D] in x's dtype, and means [B, H, N, D] in at least fp32, empty without
    offsets.
    """
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * inverse * weight.to(wide.dtype)
    if cos is not None and sin is not None and positions is not None:
        y = _rotate(y, cos, sin, positions, pairs, 1)
    y = y.to(x.dtype).contiguous()
    if block_offsets is None:
        return y, wide.new_empty(0)
    return y, block_means(y, block_offsets)


@_meaning_of
def norm_rope_backward(
    x: Tensor,  # [B, S, H, D]
    weight: Tensor,  # [D]
    cos: Tensor | None,  # [P, D / 2]
    sin: Tensor | None,  # [P, D / 2]
    positions: Tensor | None,  # int32 [S, axes]
    pairs: list[int],  # of each axis
    grad: Tensor,  # [B, S, H, D]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x in its dtype and of weight in at least fp32.

    grad is the gradient of the rotated tensor; the angles are constants.
    """
    wide = _wide(x)
    grad = _wide(grad)
    if cos is not None and sin is not None and positions is not None:
        grad = _rotate(grad, cos, sin, positions, pairs, -1)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    grad_normed = grad * weight.to(wide.dtype)
    along = (grad_normed * normed).mean(-1, keepdim=True)
    grad_x = inverse * (grad_normed - normed * along)
    grad_weight = (grad * normed).sum((0, 1, 2))  # [D]
    return grad_x.to(x.dtype).contiguous(), grad_weight


def _top_mass(
    mass: Tensor,  # int64 [R, N]
    keep_mass: float,
    ties: str,
) -> Tensor:
    """Keep a row's largest masses until they hold keep_mass of it: bool [R, N] for R rows."""
    ascending, order = mass.sort(dim=-1, stable=True)
    below = ascending.cumsum(-1)
    least = (1.0 - keep_mass) * double(below[:, -1:])
    kept = below >= least.ceil().long().to(mass.device)
    if ties == "stable":
        return torch.zeros_like(kept).scatter(-1, order, kept)
    first_kept = kept.int().argmax(-1, keepdim=True)
    smallest = ascending.gather(-1, first_kept)
    return mass >= smallest


def _near(
    rows: Tensor,  # int64 [R]
    blocks: int,
    tiles: list[int],
    window: list[int],
) -> Tensor:
    """The blocks at most window // 2 away from each row's along every axis: bool [R, N]."""
    _, Y, X = tiles

    def coordinates(index: Tensor) -> Tensor:
        t = index // (Y * X)
        y = index // X % Y
        x = index % X
        return torch.stack((t, y, x), -1)

    query = coordinates(rows)[:, None]  # [R, 1, 3]
    key = coordinates(torch.arange(blocks, device=rows.device))  # [N, 3]
    radius = torch.tensor(window, device=rows.device) // 2
    distance = (query - key).abs()  # [R, N, 3]
    return (distance <= radius).all(-1)


@_meaning_of
def select_blocks(
    query_means: Tensor,  # [B, H, N, D]
    key_means: Tensor,  # [B, H, N, D]
    keep_mass: float,
    tiles: list[int],  # T, Y, X
    window: list[int],  # three widths
    ties: str,
) -> Tensor:
    """NABLA's choice of blocks (arXiv 2507.13546), packed: int32 [B, H, N, W].

    `kandinsky_kernels.nabla.select_blocks` states the rule.
    """
    B, H, N, D = query_means.shape
    packed = query_means.new_empty((B, H, N, -(-N // 32)), dtype=torch.int32)
    rows_at_once = max(1, _MAP_ELEMENTS // max(1, N))
    for head in range(B * H if N else 0):  # without blocks, not even the loop over many heads
        b, h = divmod(head, H)
        query = _wide(query_means[b, h])  # [N, D]
        key = _wide(key_means[b, h])  # [N, D]
        for start in range(0, N, rows_at_once):
            rows = slice(start, start + rows_at_once)  # R of them
            logits = query[rows] @ key.T / math.sqrt(D)  # [R, N]
            top = logits.amax(-1, keepdim=True)
            share = torch.exp(logits - top).nan_to_num(0.0)
            mass = (share * 2.0**MASS_BITS).round().long()  # a power of two, so nothing is lost
            keep = _top_mass(mass, keep_mass, ties)
            if window:
                stop = start + logits.shape[0]
                numbers = torch.arange(start, stop, device=logits.device)
                keep = keep | _near(numbers, N, tiles, window)
            packed[b, h, rows] = pack_selection(keep)
    return packed


@_meaning_of
def block_sparse_attention(
    query: Tensor,  # [B, S, H, D]
    key: Tensor,  # [B, S, H, D]
    value: Tensor,  # [B, S, H, D]
    selection: Tensor,  # int32 [B, H, N, W]
    block_offsets: Tensor,  # int32 [N + 1]
    scale: float,
    logit_bound: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept blocks.

    Returns out [B, S, H, D] in query's dtype, and the natural log-sum-exp of the kept logits
    [B, H, S] in at least fp32.
    """
    B, S, H, D = query.shape
    offsets = block_offsets.tolist()
    owner = block_of_token(block_offsets, S)  # [S]
    keep = unpacked(selection, len(offsets) - 1)  # [B, H, N, N]
    # one piece for each block of queries; the empty ones serve inputs without any
    outs = [query.new_empty(0, D)]
    sums = [_wide(query).new_empty(0)]
    for b in range(B if S and H else 0):
        for h in range(H):
            q = _wide(query[b, :, h])  # [S, D]
            k = _wide(key[b, :, h])  # [S, D]
            v = _wide(value[b, :, h])  # [S, D]
            for block, (start, stop) in enumerate(itertools.pairwise(offsets)):
                kept = keep[b, h, block][owner].nonzero()[:, 0]  # tokens of the kept blocks
                logits = q[start:stop] @ k[kept].T * scale  # [queries, kept tokens]
                out = logits.softmax(-1) @ v[kept]  # zeros where no token is kept
                outs.append(out.to(query.dtype))
                sums.append(logits.logsumexp(-1))
    out = torch.cat(outs).view(B, H, S, D)
    out = out.transpose(1, 2).contiguous()  # [B, S, H, D]
    lse = torch.cat(sums).view(B, H, S)
    return out, lse


@_meaning_of
def block_sparse_attention_backward(
    query: Tensor,  # [B, S, H, D]
    key: Tensor,  # [B, S, H, D]
    value: Tensor,  # [B, S, H, D]
    out: Tensor,  # [B, S, H, D]
    lse: Tensor,  # [B, H, S]
    selection: Tensor,  # int32 [B, H, N, W]
    block_offsets: Tensor,  # int32 [N + 1]
    grad_out: Tensor,  # [B, S, H, D]
    grad_lse: Tensor | None,  # [B, H, S]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (arXiv 2205.14135, appendix B.2).

    out and lse are what the forward pass returned; grad_lse is None where lse was not used. The
    selection is a choice and has no gradient.
    """
    B, S, H = query.shape[:3]
    offsets = block_offsets.tolist()
    owner = block_of_token(block_offsets, S)  # [S]
    keep = unpacked(selection, len(offsets) - 1)  # [B, H, N, N]
    grad_query = torch.zeros_like(_wide(query), memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(grad_query)
    grad_value = torch.zeros_like(grad_query)
    for b in range(B if S and H else 0):
        for h in range(H):
            q = _wide(query[b, :, h])  # [S, D]
            k = _wide(key[b, :, h])  # [S, D]
            v = _wide(value[b, :, h])  # [S, D]
            g = _wide(grad_out[b, :, h])  # [S, D]
            # what the softmax of a row takes off the gradient of each of its logits
            common = (_wide(out[b, :, h]) * g).sum(-1, keepdim=True)  # [S, 1]
            if grad_lse is not None:
                common = common - grad_lse[b, h, :, None]
            for block, (start, stop) in enumerate(itertools.pairwise(offsets)):
                rows = slice(start, stop)
                kept = keep[b, h, block][owner].nonzero()[:, 0]  # tokens of the kept blocks
                logits = q[rows] @ k[kept].T * scale  # [queries, kept tokens]
                share = (logits - lse[b, h, rows, None]).exp()
                grad_share = g[rows] @ v[kept].T
                change = share * (grad_share - common[rows]) * scale
                grad_query[b, rows, h] = change @ k[kept]
                grad_key[b, :, h].index_add_(0, kept, change.T @ q[rows])
                grad_value[b, :, h].index_add_(0, kept, share.T @ g[rows])
    return grad_query.to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


@_meaning_of
def group_moments(
    x: Tensor,  # [B, T, Y, X, C]
    groups: int,
) -> Tensor:
    """Mean and biased variance of every group of channels in every frame: fp64 [B, T, G, 2]."""
    B, T = x.shape[:2]
    moments = double(x.new_empty((B, T, groups, 2)))
    if not x.numel():
        return moments.fill_(math.nan)  # the mean of nothing
    for b in range(B):
        for t in range(T):  # one by one, so that other frames cannot change a frame's bits
            wide = double(x[b, t]).unflatten(-1, (groups, -1))  # [Y, X, G, C / G]
            mean = wide.mean((0, 1, 3))  # [G]
            apart = wide - mean[:, None]
            variance = apart.square().mean((0, 1, 3))  # [G]
            moments[b, t] = torch.stack((mean, variance), -1)
    return moments


@_meaning_of
def group_norm_silu(
    x: Tensor,  # [B, T, Y, X, C]
    scale: Tensor,  # [B, C]
    shift: Tensor,  # [B, C]
    front: Tensor | None,  # [B, 2, Y + 2, X + 2, C]
    pad: bool,
    silu: bool,
) -> Tensor:
    """silu(x * scale + shift); with pad inside a border of repeated pixels and behind two frames.

    Returns x's shape, or [B, T + 2, Y + 2, X + 2, C] with pad.
    """
    factor = _wide(scale)[:, None, None, None]  # [B, 1, 1, 1, C]
    term = _wide(shift)[:, None, None, None]  # [B, 1, 1, 1, C]
    y = _wide(x) * factor + term
    if silu:
        y = F.silu(y)
    y = y.to(x.dtype).contiguous()
    if not pad:
        return y
    Y, X = x.shape[2:4]
    rows = torch.arange(-1, Y + 1, device=x.device).clamp(0, Y - 1)
    columns = torch.arange(-1, X + 1, device=x.device).clamp(0, X - 1)
    y = y[:, :, rows]  # [B, T, Y + 2, X, C]
    y = y[:, :, :, columns]  # [B, T, Y + 2, X + 2, C]
    if front is None:
        front = y[:, :1].expand(-1, 2, -1, -1, -1)  # [B, 2, Y + 2, X + 2, C]
    return torch.cat((front, y), 1).contiguous()  # [B, T + 2, Y + 2, X + 2, C]


@_meaning_of
def frame_causal_attention(
    query: Tensor,  # [B, T, P, D]
    key: Tensor,  # [B, T', P', D]
    value: Tensor,  # [B, T', P', D]
    first_frame: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every frame to the keys of frames up to its own.

    Returns out [B, T, P, D] in query's dtype, and the natural log-sum-exp of the logits [B, T, P]
    in at least fp32.
    """
    B, T, P = query.shape[:3]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((B, T, P), dtype=lse_dtype)
    for b in range(B if lse.numel() else 0):
        keys = _wide(key[b])  # [T', P', D]
        values = _wide(value[b])  # [T', P', D]
        for t in range(T):
            seen = first_frame + t + 1  # frames of keys
            k = keys[:seen].flatten(0, 1)  # [seen P', D]
            v = values[:seen].flatten(0, 1)  # [seen P', D]
            most = _LOGITS // max(1, k.shape[0])
            rows_at_once = max(1, min(_QUERIES, most))
            for start in range(0, P, rows_at_once):
                rows = slice(start, start + rows_at_once)  # R of them
                logits = _wide(query[b, t, rows]) * scale @ k.T  # [R, seen P']
                top = logits.amax(-1, keepdim=True)  # [R, 1]
                share = (logits - top).exp_()
                total = share.sum(-1, keepdim=True)  # [R, 1]
                out[b, t, rows] = (share @ v / total).to(query.dtype)
                sums = torch.where(top.isinf(), top, top + total.log())  # [R, 1]
                lse[b, t, rows] = sums[:, 0]
    return out, lse


@_meaning_of
def causal_conv3d(
    x_padded: Tensor,  # [B, T + 2, Y + 2, X + 2, C], for example
    weight: Tensor,  # [C', C, 3, 3, 3], for example
    bias: Tensor | None,  # [C']
    stride: list[int],  # T, Y, X
) -> Tensor:
    """F.conv3d of a channels-last video that brings its padding: [B, T', Y', X', C'].

    Frames go through in several calls where one would have an operand of 2^31 elements.
    """
    x = x_padded.permute(0, 4, 1, 2, 3)  # [B, C, T + 2, Y + 2, X + 2]
    taps = weight.shape[2]
    step = stride[0]
    frames = (x.shape[2] - taps) // step + 1
    frames_at_once = _frames_at_once(x_padded, weight, stride)
    # oneDNN is 100 times slower in 16 bits on processors without units for them
    narrow = x.device.type == "cpu" and x.dtype.itemsize == 2
    dtype = torch.float32 if narrow else x.dtype
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    pieces = []
    for t in range(0, frames, frames_at_once):
        last = min(t + frames_at_once, frames) - 1
        piece = x[:, :, step * t : step * last + taps].to(dtype)
        pieces.append(_conv3d(piece, weight, bias, stride).to(x.dtype))
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)  # [B, C', T', Y', X']
    y = y.permute(0, 2, 3, 4, 1)  # [B, T', Y', X', C']
    return y.contiguous()


def _frames_at_once(
    x_padded: Tensor,  # as for causal_conv3d
    weight: Tensor,  # [C', C, kT, kY, kX]
    stride: list[int],
) -> int:
    """How many frames one convolution may make without an operand of 2^31 elements."""
    B, _, Y, X, C = x_padded.shape
    out_channels, _, *taps = weight.shape
    rows = (Y - taps[1]) // stride[1] + 1
    columns = (X - taps[2]) // stride[2] + 1
    read = INDEXABLE // max(1, B * Y * X * C)
    written = INDEXABLE // max(1, B * out_channels * rows * columns)
    return max(1, min(written, (read - taps[0]) // stride[0] + 1))


def _conv3d(
    x: Tensor,  # [B, C, T, Y, X]
    weight: Tensor,  # [C', C, kT, kY, kX]
    bias: Tensor | None,  # [C']
    stride: list[int],
) -> Tensor:
    """F.conv3d through oneDNN wherever that can be.

    PyTorch's own choice for small inputs is up to seven times slower. It stays PyTorch's where no
    call to oneDNN can be recorded: for derivatives, under torch.compile and of fake tensors.
    """
    elsewhere = (
        derives(x, weight, bias)
        or torch.compiler.is_compiling()
        or is_fake(x)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
    )
    if elsewhere or not torch.backends.mkldnn.is_available():
        return F.conv3d(x, weight, bias, stride)
    padding = [0, 0, 0]
    dilation = [1, 1, 1]
    groups = 1
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
