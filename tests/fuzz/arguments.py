# SPDX-License-Identifier: Apache-2.0
"""Arguments for operators: right ones of random sizes, and ways to spoil them."""

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WRONG_DTYPES = (
    *DTYPES,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.complex64,
)
FLOATS = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e308,
    -1e308,
    1e-308,
    0.9,
    1.0,
    -1.0,
)
INTEGERS = (
    -(2**63),
    2**63 - 1,
    2**62,
    2**32,
    2**31,
    -1,
    0,
    1,
    2,
    3,
    7,
    0x6DB6DB6DB6DB6DB7,
)
VALUES = (
    -(2**31),
    2**31 - 1,
    -1,
    0,
    1,
    5,
    64,
    65,
    200_000,
)  # of int32 tensors
HUGE = 2**40


class Arguments:
    """Makes right arguments of every operator, in a dtype of its choice.

    Sizes are small. Now and then one is 0, and another one beside it huge, so that the tensor takes
    no memory.
    """

    def __init__(self, rng: Random):
        self.rng = rng
        self.dtype = rng.choice(DTYPES[: 3 + (rng.random() < 0.1)])
        self.device = "cpu"

    def sizes(self, *most: int) -> list[int]:
        sizes = [self.rng.randint(1, n) for n in most]
        if self.rng.random() < 0.08:
            sizes[self.rng.randrange(len(sizes))] = 0
            if self.rng.random() < 0.3:
                sizes[self.rng.randrange(len(sizes))] = self.rng.choice((2**20, 2**31, HUGE))
                sizes[self.rng.randrange(len(sizes))] = 0
        return sizes

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if math.prod(shape) > 1 << 22:  # the same row again and again
            row = shape[-1:] if shape[-1] < 1 << 22 else 1
            return torch.zeros(row, dtype=dtype).expand(shape)
        return torch.randn(shape).to(dtype)

    def vector(self, *shape: int) -> Tensor:
        return self.floats(*shape, dtype=self.rng.choice((self.dtype, torch.float32)))

    def offsets(self, tokens: int, most: int = 64) -> Tensor:
        ends = [0]
        while ends[-1] < min(tokens, 10_000):
            ends.append(min(tokens, ends[-1] + self.rng.randint(1, most)))
        return torch.tensor(ends, dtype=torch.int32)

    def words(self, *shape: int) -> Tensor:
        if math.prod(shape) > 1 << 22:
            row = shape[-1:] if shape[-1] < 1 << 22 else 1
            return torch.zeros(row, dtype=torch.int32).expand(shape)
        return torch.randint(-(2**31), 2**31, shape).to(torch.int32)

    # ---- one method for each operator: the arguments of its schema

    def modulated_norm(self) -> list:
        B, S, C = self.sizes(3, 9, 70)
        return [
            self.floats(B, S, C),
            self.vector(B, C),
            self.vector(B, C),
            1e-5,
        ]

    def modulated_norm_backward(self) -> list:
        x, scale, _, eps = self.modulated_norm()
        return [x, scale, self.floats(*x.shape), eps]

    def gated_add_norm(self) -> list:
        x, scale, shift, eps = self.modulated_norm()
        pair = [scale, shift] if self.rng.random() < 0.7 else [None, None]
        return [
            x,
            self.floats(*x.shape),
            self.vector(*scale.shape),
            *pair,
            eps,
        ]

    def gated_add_norm_backward(self) -> list:
        x, scale, shift, eps = self.modulated_norm()
        grad_y = self.floats(*x.shape) if self.rng.random() < 0.5 else None
        grad = self.floats(*x.shape)
        return [x, self.floats(*x.shape), scale, shift, grad_y, grad, eps]

    def _heads(self) -> list:
        B, S, H, half = self.sizes(2, 80, 3, 20)
        x = self.floats(B, S, H, 2 * half)
        weight = self.vector(2 * half)
        if self.rng.random() < 0.3 or S > 10_000:
            return [x, weight, None, None, None, []]
        axes = self.rng.randint(1, 3)
        P = self.rng.randint(1, 9)
        cuts = sorted(self.rng.randint(0, half) for _ in range(axes - 1))
        pairs = [stop - start for start, stop in zip([0, *cuts], [*cuts, half], strict=True)]
        tables = [self.floats(P, half, dtype=torch.float32) for _ in range(2)]
        return [
            x,
            weight,
            *tables,
            torch.randint(P, (S, axes), dtype=torch.int32),
            pairs,
        ]

    def norm_rope(self) -> list:
        heads = self._heads()
        blocks = self.offsets(heads[0].shape[1], 90) if self.rng.random() < 0.5 else None
        return [*heads, blocks, 1e-6]

    def norm_rope_backward(self) -> list:
        heads = self._heads()
        return [*heads, self.floats(*heads[0].shape), 1e-6]

    def block_means(self) -> list:
        x = self.floats(*self.sizes(2, 90, 3, 20))
        return [x, self.offsets(x.shape[1], 90)]

    def select_blocks(self) -> list:
        B, H, *tiles, D = self.sizes(2, 3, 3, 4, 5, 20)
        shape = (B, H, math.prod(tiles), D)
        window = [self.rng.randint(1, 5) for _ in tiles]
        near = [tiles, window] if self.rng.random() < 0.6 else [[], []]
        keep = self.rng.choice((0.1, 0.9, 1.0))
        ties = self.rng.choice(("all", "stable"))
        if shape[2] > 10_000:
            shape = (B, H, 0, D)
        return [
            self.floats(*shape),
            self.floats(*shape),
            keep,
            *near,
            ties,
        ]

    def block_sparse_attention(self) -> list:
        B, S, H, D = self.sizes(2, 150, 3, 40)
        if self.rng.random() < 0.1:
            D = self.rng.choice((130, 200, 257))
        offsets = self.offsets(S)
        N = len(offsets) - 1
        tensors = [self.floats(B, S, H, D) for _ in range(3)]
        return [
            *tensors,
            self.words(B, H, N, -(-N // 32)),
            offsets,
            0.3,
            math.inf,
        ]

    def block_sparse_attention_backward(self) -> list:
        query, key, value, selection, offsets, scale, _ = self.block_sparse_attention()
        B, S, H, _ = query.shape
        wide = torch.promote_types(self.dtype, torch.float32)
        lse, grad_lse = (self.floats(B, H, S, dtype=wide) for _ in range(2))
        out = self.floats(*query.shape)
        grad = self.floats(*query.shape)
        grad_lse = grad_lse if self.rng.random() < 0.5 else None
        return [query, key, value, out, lse, selection, offsets, grad, grad_lse, scale]

    def group_moments(self) -> list:
        groups, *sizes, width = self.sizes(4, 2, 3, 5, 20, 8)
        return [self.floats(*sizes, groups * width), groups]

    def group_norm_silu(self) -> list:
        B, T, Y, X, C = self.sizes(2, 3, 5, 7, 40)
        pad = self.rng.random() < 0.7
        front = self.floats(B, 2, Y + 2, X + 2, C) if pad and self.rng.random() < 0.5 else None
        vectors = [self.vector(B, C) for _ in range(2)]
        return [
            self.floats(B, T, Y, X, C),
            *vectors,
            front,
            pad,
            self.rng.random() < 0.5,
        ]

    def frame_causal_attention(self) -> list:
        B, T, P, D, first, keys = self.sizes(2, 3, 70, 40, 3, 70)
        first = min(first, 3)
        keys = min(keys, 70)
        key, value = (self.floats(B, T + first, keys, D) for _ in range(2))
        return [self.floats(B, T, P, D), key, value, first, 0.3]

    def group_affine(self) -> list:
        B, T, G, width = self.sizes(2, 3, 4, 5)
        vectors = [self.floats(min(G * width, 100), dtype=torch.float32) for _ in range(2)]
        return [
            self.floats(B, T, G, 2, dtype=torch.float64).abs(),
            *vectors,
            1e-6,
        ]

    def causal_conv3d(self) -> list:
        B, C, out, *taps = self.sizes(2, 6, 6, 3, 3, 3)
        sizes = [min(n, 9) + self.rng.randint(0, 4) for n in taps]
        weight = self.floats(out, C, *(min(n, 9) for n in taps))
        bias = self.floats(out) if self.rng.random() < 0.5 else None
        stride = [self.rng.randint(1, 2) for _ in taps]
        return [self.floats(B, *sizes, C), weight, bias, stride]

    def pack_selection(self) -> list:
        return [torch.rand(self.sizes(2, 3, 70)) < 0.5]

    def _selection(self) -> tuple[Tensor, int]:
        N = self.rng.randint(0, 70)
        return self.words(2, N, -(-N // 32)), N

    def unpack_selection(self) -> list:
        return list(self._selection())

    def selection_density(self) -> list:
        return list(self._selection())

    def transpose_selection(self) -> list:
        return [self._selection()[0]]


# ---- spoiling them


def _resized(rng: Random, x: Tensor) -> Tensor:
    """Spoil the size of a dimension, or the number of dimensions."""
    kind = rng.randrange(5)
    if kind == 0 or not x.dim():
        return x[None]
    axis = rng.randrange(x.dim())
    if kind == 1 and x.shape[axis]:
        return x.select(axis, rng.randrange(x.shape[axis]))
    if kind == 2:
        return x.narrow(
            axis,
            0,
            rng.randint(0, min(x.shape[axis], 100)),
        )
    if kind == 3 and x.numel() < 1 << 20:
        return torch.cat((x, x), axis)
    return x.new_empty(0) if rng.random() < 0.3 else x.flatten()[:1].reshape(())


def _restrided(rng: Random, x: Tensor) -> Tensor:
    """Keep the values' shape, with other strides: overlapping, apart, transposed or offset."""
    kind = rng.randrange(5)
    if not x.dim() or not x.numel() or x.numel() > 1 << 20:
        return x
    axis = rng.randrange(x.dim())
    if kind == 0:
        return x.narrow(axis, 0, 1).expand(x.shape)
    if kind == 1:
        return x.transpose(axis, -1).contiguous().transpose(axis, -1)
    if kind == 2:
        return torch.stack((x, x), -1)[..., 0]
    if kind == 3:
        return torch.cat((x, x), axis).narrow(axis, x.shape[axis], x.shape[axis])
    return torch.as_strided(
        x.contiguous(),
        x.shape,
        [min(1, s) for s in x.stride()],
    )


def _revalued(rng: Random, x: Tensor) -> Tensor:
    """Put other values into some places, or into all."""
    if not x.numel() or x.numel() > 1 << 20:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    flat = x.view(-1)
    for _ in range(rng.randint(1, 3)):
        place = slice(None) if rng.random() < 0.2 else rng.randrange(len(flat))
        if x.is_floating_point() or x.is_complex():
            flat[place] = rng.choice(FLOATS)
        elif x.dtype in (torch.int32, torch.int64):
            flat[place] = rng.choice(VALUES)
    return x


def _elsewhere(rng: Random, x: Tensor) -> Tensor:
    kind = rng.randrange(3)
    if kind == 0 or x.numel() > 1 << 20:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if kind == 1 and x.dim() == 2:
        return x.to_sparse()
    return torch.empty_strided(
        x.shape,
        x.stride(),
        dtype=x.dtype,
        device="meta",
    )


def huge(rng: Random, x: Tensor) -> Tensor:
    """Make a dimension huge, without memory of its own."""
    if not x.dim() or not x.numel():
        return x
    axis = rng.randrange(x.dim())
    sizes = list(x.shape)
    sizes[axis] = HUGE
    return x.narrow(axis, 0, 1).expand(sizes)


def _recast(rng: Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(WRONG_DTYPES)) if x.numel() <= 1 << 20 else x


SPOILERS: tuple[Callable[[Random, Tensor], Tensor], ...] = (
    _resized,
    _restrided,
    _restrided,
    _revalued,
    _revalued,
    _elsewhere,
    _recast,
    huge,
)


def spoiled(
    rng: Random,
    value,
    optional: bool,
    spoilers=SPOILERS,
):
    """Another argument in place of this one."""
    if optional and rng.random() < 0.1:
        return None
    if isinstance(value, Tensor):
        return rng.choice(spoilers)(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(("", "all", "stable", "ALL", "\0", "x" * 1000))
    if isinstance(value, list):
        made = [rng.choice(INTEGERS) if rng.random() < 0.5 else n for n in value]
        return rng.choice(
            (
                made,
                made[:-1],
                [*made, 1],
                [],
                [rng.choice(INTEGERS)] * 3,
            )
        )
    return value
