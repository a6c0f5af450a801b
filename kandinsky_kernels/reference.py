# SPDX-License-Identifier: Apache-2.0
"""The meaning of every operator, in plain PyTorch.

Each function computes in ``max(fp32, input dtype)``, also under autocast and where TF32 is allowed:
on fp64 inputs it is the oracle of the tests, elsewhere it is the fallback and the fake kernel. It
refuses what the kernels refuse, by the check of its name in `checks`. Shapes: B batch, S tokens, H
heads, D head dim, C channels, N blocks, W = ceil(N / 32).
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks
from ._derivatives import derives
from ._precision import full_precision

# block masses are integers in units of 2**-32 of the row's largest: their sums are exact in any
# order
MASS_BITS = 32
# rows of the block map handled at once, so that it is never whole in memory
_CHUNK_ELEMENTS = 1 << 22
# elements of one operand of a convolution: cuDNN counts them in 32 bits
INDEXABLE = 2**31 - 1
# of frame_causal_attention at once; with fewer rows a product of matrices reads more than it
# computes
_QUERIES, _LOGITS = 512, 1 << 25


def _meaning_of(function: Callable) -> Callable:
    """The function after the check of its name, in full precision."""
    check = getattr(checks, function.__name__)

    @functools.wraps(function)
    def run(x: Tensor, *args, **options):
        check(x, *args, **options, values=True)
        with full_precision(x.device, convolutions=function.__name__ == "causal_conv3d"):
            return function(x, *args, **options)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@_meaning_of
def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift. x [B, S, C]; scale, shift [B, C]."""
    normed = F.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    return (normed * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]).to(x.dtype).contiguous()


@_meaning_of
def gated_add_norm(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, modulated_norm(y)) with y = x + gate * branch rounded to x's dtype; the second is empty
    without scale."""
    y = (_wide(x) + _wide(gate)[:, None] * _wide(branch)).to(x.dtype).contiguous()
    if scale is None or shift is None:
        return y, y.new_empty(0)
    return y, modulated_norm(y, scale, shift, eps)


def _layer_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, S, C], scale and shift [B, C] of `modulated_norm`, before any is
    rounded."""
    wide, grad, shape = _wide(x), _wide(grad), x.shape[-1:]
    normed, mean, inverse = torch.native_layer_norm(wide, shape, None, None, eps)
    inner = grad * (1 + _wide(scale)[:, None])
    inner_x = torch.ops.aten.native_layer_norm_backward(
        inner, wide, shape, mean, inverse, None, None, [True, False, False]
    )[0]
    return inner_x, (grad * normed).sum(1), grad.sum(1)


@_meaning_of
def modulated_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype and of scale and shift, at least fp32."""
    grad_x, grad_scale, grad_shift = _layer_norm_backward(x, scale, grad, eps)
    return grad_x.to(x.dtype).contiguous(), grad_scale, grad_shift


@_meaning_of
def gated_add_norm_backward(
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and branch in their dtype, and of gate, scale and shift, at least fp32. y:
    what the forward pass returned."""
    grad, grad_scale, grad_shift = _layer_norm_backward(y, scale, grad_normed, eps)
    grad = grad if grad_y is None else grad + _wide(grad_y)
    grad_branch, grad_gate = grad * _wide(gate)[:, None], (grad * _wide(branch)).sum(1)
    return (
        grad.to(y.dtype).contiguous(),
        grad_branch.to(y.dtype).contiguous(),
        grad_gate,
        grad_scale,
        grad_shift,
    )


def block_of_token(block_offsets: Tensor, tokens: int) -> Tensor:
    """Which block each token belongs to: int64 [tokens]. A number of a block for any offsets
    whatever, so that it cannot index beyond the blocks."""
    ends = block_offsets[1:-1].contiguous()  # the last block's is not needed
    each = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, each, right=True)


@_meaning_of
def block_means(x: Tensor, block_offsets: Tensor) -> Tensor:
    """Mean over each block's tokens. x [B, S, H, D], block_offsets int32 [N + 1] -> [B, H, N, D],
    at least fp32."""
    lengths, wide = block_offsets.diff(), _wide(x)
    sums = wide.new_zeros(x.shape[0], lengths.shape[0], *x.shape[2:])  # [B, N, H, D]
    sums = sums.index_add(1, block_of_token(block_offsets, x.shape[1]), wide)
    # [B, H, N, D]
    return (sums / lengths.to(wide.dtype)[:, None, None]).transpose(1, 2).contiguous()


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, pairs: list[int], sign: int
) -> Tensor:
    """Turn adjacent pairs of x [B, S, H, D] by sign times the angles of the tables."""
    axes = [
        (slice(sum(pairs[:i]), sum(pairs[: i + 1])), positions[:, i].long())
        for i in range(len(pairs))
    ]
    # [S, D/2]
    cos, sin = (
        torch.cat([table[rows, columns] for columns, rows in axes], -1) for table in (cos, sin)
    )
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, D/2] each
    cos, sin = cos.to(x.dtype)[:, None], sign * sin.to(x.dtype)[:, None]  # [S, 1, D/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@_meaning_of
def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    block_offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over D, then rotate adjacent pairs; also the block means of the result when offsets
    are given."""
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    if cos is not None and sin is not None and positions is not None:
        y = _rotate(y, cos, sin, positions, pairs, 1)
    y = y.to(x.dtype).contiguous()
    means = wide.new_empty(0) if block_offsets is None else block_means(y, block_offsets)
    return y, means


@_meaning_of
def norm_rope_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    grad: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x in its dtype and of weight, at least fp32; the angles are constants. grad: of
    the rotated tensor."""
    wide, grad = _wide(x), _wide(grad)
    if cos is not None and sin is not None and positions is not None:
        grad = _rotate(grad, cos, sin, positions, pairs, -1)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, inner = wide * inverse, grad * weight.to(wide.dtype)
    grad_x = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype).contiguous(), (grad * normed).sum((0, 1, 2))


def pack_selection(keep: Tensor) -> Tensor:
    """bool [..., N] -> int32 [..., W]: bit j % 32 of word j // 32 says that block j is kept.

    Raises TypeError on other dtypes, ValueError without a dimension.
    """
    checks.pack_selection(keep)
    words = -(-keep.shape[-1] // 32)
    padded = F.pad(keep, (0, words * 32 - keep.shape[-1])).unflatten(-1, (words, 32))
    weights = torch.ones(32, dtype=torch.int64, device=keep.device) << torch.arange(
        32, device=keep.device
    )
    return (padded * weights).sum(-1).to(torch.int32)  # wraps: bit 31 is the sign


def unpack_selection(selection: Tensor, blocks: int) -> Tensor:
    """int32 [..., W] -> bool [..., blocks].

    Raises ValueError where W is not ceil(blocks / 32), TypeError on other dtypes.
    """
    checks.unpack_selection(selection, blocks)
    bits = (
        selection[..., None] >> torch.arange(32, device=selection.device, dtype=torch.int32)
    ) & 1
    return bits.flatten(-2)[..., :blocks].bool()


def _top_mass(mass: Tensor, keep_mass: float, ties: str) -> Tensor:
    """Keep a row's largest masses until they hold keep_mass of it. mass int64 [R, N] -> bool [R,
    N]."""
    ascending, order = mass.sort(dim=-1, stable=True)
    below = ascending.cumsum(-1)
    kept = below >= (1.0 - keep_mass) * below[:, -1:].double()
    if ties == "stable":
        return torch.zeros_like(kept).scatter(-1, order, kept)
    smallest_kept = ascending.gather(-1, kept.int().argmax(-1, keepdim=True))
    return mass >= smallest_kept


def _near(rows: Tensor, blocks: int, tiles: list[int], window: list[int]) -> Tensor:
    """Local window on the tile grid: bool [R, N], |distance| <= window // 2 on each axis."""

    def coordinates(index: Tensor) -> Tensor:
        return torch.stack(
            (index // (tiles[1] * tiles[2]), index // tiles[2] % tiles[1], index % tiles[2]), -1
        )

    key = coordinates(torch.arange(blocks, device=rows.device))
    radius = torch.tensor(window, device=rows.device) // 2
    return ((coordinates(rows)[:, None] - key[None]).abs() <= radius).all(-1)


@_meaning_of
def select_blocks(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
) -> Tensor:
    """NABLA's block choice (arXiv 2507.13546), order-free: see
    `kandinsky_kernels.nabla.select_blocks`."""
    B, H, N, D = query_means.shape
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, N))
    packed = query_means.new_empty((B, H, N, -(-N // 32)), dtype=torch.int32)
    for head in range(B * H if N else 0):  # nothing is done for nothing, however often
        batch, head = divmod(head, H)
        query, key = _wide(query_means[batch, head]), _wide(key_means[batch, head])  # [N, D]
        for start in range(0, N, rows_at_once):
            logits = query[start : start + rows_at_once] @ key.T / math.sqrt(D)  # [R, N]
            share = torch.exp(logits - logits.amax(-1, keepdim=True)).nan_to_num(0.0)
            mass = (share.double() * 2.0**MASS_BITS).round().long()
            keep = _top_mass(mass, keep_mass, ties)
            if window:
                rows = torch.arange(start, start + logits.shape[0], device=logits.device)
                keep = keep | _near(rows, N, tiles, window)
            packed[batch, head, start : start + rows_at_once] = pack_selection(keep)
    return packed


@_meaning_of
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    logit_bound: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept blocks: out [B, S, H, D] in query's dtype, natural
    log-sum-exp [B, H, S]."""
    B, S, H, D = query.shape
    starts, owner = block_offsets.tolist(), block_of_token(block_offsets, S)
    keep = unpack_selection(selection, len(starts) - 1)
    outs, sums = [query.new_empty(0, D)], [_wide(query).new_empty(0)]  # row by row of blocks
    for batch in range(B if S and H else 0):
        for head in range(H):
            q, k, v = (_wide(x[batch, :, head]) for x in (query, key, value))  # [S, D]
            for block, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
                kept = keep[batch, head, block][owner].nonzero()[:, 0]
                logits = q[start:stop] @ k[kept].T * scale  # [rows, kept tokens]
                # a product over no tokens is zero
                outs.append((logits.softmax(-1) @ v[kept]).to(query.dtype))
                sums.append(logits.logsumexp(-1))
    return torch.cat(outs).view(B, H, S, D).transpose(1, 2).contiguous(), torch.cat(sums).view(
        B, H, S
    )


@_meaning_of
def block_sparse_attention_backward(
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
    """Gradients of query, key and value (arXiv 2205.14135, appendix B.2). The selection has none:
    it is a choice."""
    B, S, H, _ = query.shape
    starts, owner = block_offsets.tolist(), block_of_token(block_offsets, S)
    keep = unpack_selection(selection, len(starts) - 1)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(_wide(query), memory_format=torch.contiguous_format) for _ in range(3)
    )
    for batch in range(B if S and H else 0):
        for head in range(H):
            # [S, D]
            q, k, v, o, g = (_wide(x[batch, :, head]) for x in (query, key, value, out, grad_out))
            # of a row: what its softmax takes off every logit's gradient
            common = (o * g).sum(-1, keepdim=True)
            common = common if grad_lse is None else common - grad_lse[batch, head, :, None]
            for block, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
                rows, kept = (
                    slice(start, stop),
                    keep[batch, head, block][owner].nonzero()[:, 0],
                )
                # [rows, kept tokens]
                share = (q[rows] @ k[kept].T * scale - lse[batch, head, rows, None]).exp()
                change = share * (g[rows] @ v[kept].T - common[rows]) * scale
                grad_query[batch, rows, head] = change @ k[kept]
                grad_key[batch, :, head].index_add_(0, kept, change.T @ q[rows])
                grad_value[batch, :, head].index_add_(0, kept, share.T @ g[rows])
    return grad_query.to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


@_meaning_of
def group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every group of channels in every frame. x [B, T, Y, X, C] -> fp64
    [B, T, groups, 2]."""
    moments = x.new_empty((*x.shape[:2], groups, 2), dtype=torch.float64)
    if not x.numel():  # the mean of nothing
        return moments.fill_(math.nan)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):  # one at a time: the others cannot change a frame's result
            wide = x[b, t].double().unflatten(-1, (groups, -1))  # [Y, X, G, C/G]
            mean = wide.mean((0, 1, 3))
            moments[b, t] = torch.stack((mean, (wide - mean[:, None]).square().mean((0, 1, 3))), -1)
    return moments


@_meaning_of
def group_norm_silu(
    x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None, pad: bool, silu: bool
) -> Tensor:
    """silu(x * scale + shift), with pad inside a border of repeated pixels and behind two frames. x
    [B, T, Y, X, C]; vectors [B, C]."""
    y = _wide(x) * _wide(scale)[:, None, None, None] + _wide(shift)[:, None, None, None]
    y = (F.silu(y) if silu else y).to(x.dtype).contiguous()
    if not pad:
        return y
    Y, X = (
        (torch.arange(-1, size + 1, device=x.device)).clamp(0, size - 1) for size in x.shape[2:4]
    )
    y = y[:, :, Y][:, :, :, X]  # [B, T, Y + 2, X + 2, C]
    front = y[:, :1].expand(-1, 2, -1, -1, -1) if front is None else front
    return torch.cat((front, y), 1).contiguous()


@_meaning_of
def frame_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Frame by frame softmax attention over the keys of frames up to its own: out [B, T, P, D],
    natural log-sum-exp [B, T, P]."""
    B, T, P, _ = query.shape
    out, lse = (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty((B, T, P), dtype=torch.promote_types(query.dtype, torch.float32)),
    )
    for b in range(B if lse.numel() else 0):
        keys, values = _wide(key[b]), _wide(value[b])  # [T', P', D]
        for t in range(T):
            # [prefix, D]
            k, v = (
                keys[: first_frame + t + 1].flatten(0, 1),
                values[: first_frame + t + 1].flatten(0, 1),
            )
            rows = max(1, min(_QUERIES, _LOGITS // max(1, k.shape[0])))
            for start in range(0, P, rows):
                logits = _wide(query[b, t, start : start + rows]) * scale @ k.T  # [rows, prefix]
                top = logits.amax(-1, keepdim=True)
                share = (logits - top).exp_()
                total = share.sum(-1, keepdim=True)
                out[b, t, start : start + rows] = (share @ v / total).to(query.dtype)
                lse[b, t, start : start + rows] = torch.where(top.isinf(), top, top + total.log())[
                    :, 0
                ]
    return out, lse


@_meaning_of
def causal_conv3d(
    x_padded: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]
) -> Tensor:
    """F.conv3d of a channels-last input that brings its padding, in several calls where one would
    have an operand of 2^31 elements."""
    x = x_padded.permute(0, 4, 1, 2, 3)  # [B, C, T + 2, Y + 2, X + 2]
    B, taps, step = x.shape[0], weight.shape[2:], stride[0]
    frames = (x.shape[2] - taps[0]) // step + 1
    rows, columns = ((x.shape[axis] - taps[axis - 2]) // stride[axis - 2] + 1 for axis in (3, 4))
    inputs = INDEXABLE // max(1, B * math.prod(x_padded.shape[2:]))  # frames that one call may read
    most = max(
        1,
        min(
            INDEXABLE // max(1, B * weight.shape[0] * rows * columns),
            (inputs - taps[0]) // step + 1,
        ),
    )
    # without units for them oneDNN is 100 times slower
    narrow = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if narrow else x.dtype
    weight, bias, pieces = weight.to(dtype), None if bias is None else bias.to(dtype), []
    for t in range(0, frames, most):
        piece = x[:, :, step * t : step * (min(t + most, frames) - 1) + taps[0]].to(dtype)
        pieces.append(_conv3d(piece, weight, bias, stride).to(x.dtype))  # [B, C', <= most, Y', X']
    return (
        (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2))
        .permute(0, 2, 3, 4, 1)
        .contiguous()
    )


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    """F.conv3d, but always through oneDNN where it can be: PyTorch's choice for small inputs is up
    to seven times slower.

    Under torch.compile and of fake tensors, for which there is no call to oneDNN to trace, the
    choice is PyTorch's.
    """
    other = (
        derives(x, weight, bias)
        or torch.compiler.is_compiling()
        or is_fake(x)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
    )
    if other or not torch.backends.mkldnn.is_available():
        return F.conv3d(x, weight, bias, stride)
    return torch.mkldnn_convolution(x, weight, bias, [0, 0, 0], stride, [1, 1, 1], 1)
