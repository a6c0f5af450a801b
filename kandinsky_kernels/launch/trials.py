# SPDX-License-Identifier: Apache-2.0
"""Small inputs for which Triton makes the same binary as for a caller's large ones.

Triton compiles a kernel anew for each dtype, for each value of its constants, and for each *kind*
of every integer and address: a one becomes a constant, of a multiple of 16 it is assumed that it is
one, and from 2^31 on an integer has 64 bits. A trial on sizes of other kinds would try another
binary than the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WIDE = 1 << 31  # from here on an integer has 64 bits


def kinds(*sizes: int) -> tuple[int, ...]:
    """The kind of each size: 1, 16 for multiples of 16, and 0 for all others; and `WIDE` more where
    it is that large."""

    def kind(size: int) -> int:
        if size == 1:
            return 1
        return (16 if size % 16 == 0 else 0) + (WIDE if size >= WIDE else 0)

    return tuple(kind(size) for size in sizes)


def alike(
    least: int,
    size: int,
    derived: Callable[[int], tuple[int, ...]] = lambda _: (),
    candidates: Iterable[int] | None = None,
) -> int:
    """The smallest size from `least` on of the same kind as `size`, whose `derived` sizes, which a
    launcher computes from it, are of the same kinds too; `size` itself where none is smaller."""
    wanted = kinds(size, *derived(size))
    least = min(least, size)
    for candidate in candidates or range(least, size):
        if kinds(candidate, *derived(candidate)) == wanted:
            return candidate
    return size


class Draw:
    """Random inputs from a generator of its own: a trial must not move the user's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Contiguous normal numbers."""
        return torch.randn(
            shape,
            generator=self.generator,
            dtype=dtype,
            device=self.device,
        )

    def integers(self, high: int, *shape: int) -> Tensor:
        """Contiguous int32 from 0 to high - 1."""
        return torch.randint(
            high,
            shape,
            generator=self.generator,
            dtype=torch.int32,
            device=self.device,
        )

    def like(self, tensor: Tensor, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers times `scale`, of this shape and the tensor's dtype. Their strides are in
        the same order as the tensor's and of the same kinds, and their address is aligned alike.

        A stride from `WIDE` on is that of samples, of which there is one.
        """
        strides = [0] * len(shape)
        span = 1  # elements that the dimensions so far take
        inner_first = sorted(range(len(shape)), key=tensor.stride)
        for i in inner_first:
            wanted = tensor.stride(i)
            if wanted == 0 or wanted >= WIDE:
                strides[i] = wanted
                continue
            stride = span
            while span > 1 and kinds(stride) != kinds(wanted) and wanted > 1:
                stride += 1
            strides[i] = stride
            span = stride * shape[i]
        bytes_past = tensor.data_ptr() % 16
        offset = bytes_past // tensor.element_size()
        numbers = self.normal(offset + max(1, span), dtype=tensor.dtype)
        numbers = numbers * scale
        return numbers.as_strided(shape, strides, offset)


def block_ends(N: int, tokens: int) -> list[int]:
    """Offsets [N + 1] of N ragged blocks, the last of which ends at a number of the same kind as
    `tokens`."""
    lengths = (64, 5, 32)
    ends = [0]
    for i in range(N - 1):
        ends.append(ends[-1] + lengths[i % 3])
    shortest = ends[-1] + 3
    longest = ends[-1] + 63
    for end in range(shortest, longest + 1):
        if kinds(end) == kinds(tokens) or tokens == 1:
            break
    return [*ends, end]
