# SPDX-License-Identifier: Apache-2.0
"""Weights in host memory: flat pieces, pinned where that is possible, that are copied to a device
in one go."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ALIGNMENT = 256  # bytes: more than any kernel asks for
PAGE = 4096  # bytes: the system pins whole pages, so two pieces must not share one

_log = logging.getLogger(__name__)


def tensors_of(modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> list[Tensor]:
    """All tensors of modules and of the modules inside them, each once: parameters, buffers, joint
    weights, the matrices of adapters.

    Attributes are searched, not only registered parameters, because joint weights and adapters are
    plain attributes. without: modules that are left out.
    """
    seen = {id(inner) for module in without for inner in module.modules()}
    found: dict[int, Tensor] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf in tree_leaves(vars(module)):  # the children of a module are among its leaves
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
            elif isinstance(leaf, nn.Module):
                waiting.append(leaf)
    return list(found.values())


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in a flat piece of memory, in bytes, and its dtype, shape and strides."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor at this spot of `flat`, uint8 [bytes]."""
        own = flat.narrow(0, self.start, self.size).view(self.dtype)
        return own.as_strided(self.shape, self.strides)


def layout(tensors: Sequence[Tensor]) -> tuple[list[Spot], int]:
    """A spot for every tensor in one flat piece of memory, and the size of the piece in bytes.

    Tensors that overlap in their storage, as a joint weight and its parts do, overlap in the same
    way in the piece. The size does not depend on the order of the tensors.
    """
    spans = sorted(_span(tensor, i) for i, tensor in enumerate(tensors))
    spots: dict[int, Spot] = {}
    # Overlapping spans form a region: `begin` is its place in the piece, `first` and `last` are the
    # bytes of `storage` that it covers.
    storage, begin, first, last = -1, 0, 0, 0
    end = 0
    for own_storage, offset, size, i in spans:
        if own_storage != storage or offset >= last:
            storage, begin, first, last = own_storage, end, offset, offset
        tensor = tensors[i]
        spots[i] = Spot(
            start=begin + offset - first,
            size=size,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            strides=tensor.stride(),
        )
        last = max(last, offset + size)
        # Every region is padded, the last one too, so that no order changes the total.
        end = begin + -(-(last - first) // ALIGNMENT) * ALIGNMENT
    return [spots[i] for i in range(len(tensors))], end


def _span(tensor: Tensor, i: int) -> tuple[int, int, int, int]:
    """(its storage, its first byte there, the bytes that it reaches over, i) of a tensor."""
    reach = 0  # in elements
    if tensor.numel():
        sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in sizes_and_strides)
    return (
        tensor.untyped_storage()._cdata,
        int(tensor.storage_offset()) * tensor.itemsize,
        int(reach) * tensor.itemsize,
        i,
    )


def pin(memory: Tensor) -> bool:
    """Lock a CPU tensor's memory where it is, for as long as the tensor lives; whether that was
    possible.

    PyTorch's own pinned memory would be a copy, and its size is rounded up to a power of two: the
    537 MB of a Pro block would take 1,074 MB.
    """
    runtime = torch.cuda.cudart()
    address = memory.data_ptr()
    code = int(runtime.cudaHostRegister(address, memory.numel() * memory.itemsize, 0))
    if code == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return True
    _warn(code)
    with suppress(RuntimeError):
        # CUDA reports the error once more, to the next launch; this launch takes it.
        torch.zeros(1, device="cuda")
    return False


@cache
def _warn(code: int) -> None:
    _log.warning(
        "pinned host memory cannot be had (CUDA error %d), so copies of weights hold up "
        "the computation; close other programs, or "
        "raise the limit of locked memory (ulimit -l)",
        code,
    )


class Piece:
    """Tensors that have been moved into one flat piece of host memory."""

    def __init__(self, tensors: Sequence[Tensor], pinned: bool):
        self.tensors = tensors
        self.spots, self.size = layout(tensors)
        whole_pages = -(-max(self.size, 1) // PAGE) * PAGE
        memory = torch.empty(whole_pages + PAGE, dtype=torch.uint8)
        to_next_page = -memory.data_ptr() % PAGE
        self.host = memory.narrow(0, to_next_page, whole_pages)
        if pinned:
            pin(self.host)
        for tensor, spot in zip(tensors, self.spots, strict=True):
            spot.view(self.host).copy_(tensor)
        self.point(self.host)

    def point(self, flat: Tensor) -> None:
        """Make the tensors views of `flat`, a copy of this piece."""
        for tensor, spot in zip(self.tensors, self.spots, strict=True):
            tensor.data = spot.view(flat)

    def is_whole(self, wanted: set[int]) -> bool:
        """Whether the tensors are all among those `wanted`, given by id, and none was moved, cast
        or reshaped since it came into the piece."""
        return all(
            id(tensor) in wanted and self._is_in_place(tensor, spot)
            for tensor, spot in zip(self.tensors, self.spots, strict=True)
        )

    def _is_in_place(self, tensor: Tensor, spot: Spot) -> bool:
        address = self.host.data_ptr() + spot.start
        in_place = spot.size == 0 or tensor.data_ptr() == address
        form = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        return in_place and form == (spot.dtype, spot.shape, spot.strides)


class Store:
    """All tensors of a layer, in few pieces of host memory: one at first, and one more for every
    later change, such as a new adapter."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        without: Sequence[nn.Module],
        pinned: bool,
    ):
        self.modules = modules
        self.without = without
        self.pinned = pinned
        self.pieces: list[Piece] = []

    def refresh(self) -> None:
        """Take in what the modules hold now; only what is new or has moved is copied."""
        tensors = tensors_of(self.modules, self.without)
        wanted = {id(tensor) for tensor in tensors}
        self.pieces = [piece for piece in self.pieces if piece.is_whole(wanted)]
        known = {id(tensor) for piece in self.pieces for tensor in piece.tensors}
        fresh = [tensor for tensor in tensors if id(tensor) not in known]
        if fresh:
            self.pieces.append(Piece(fresh, self.pinned))

    @property
    def size(self) -> int:
        """Bytes of a flat copy."""
        return sum(piece.size for piece in self.pieces)

    def _parts(self, buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its part of `buffer`."""
        start = 0
        for piece in self.pieces:
            yield piece, buffer.narrow(0, start, piece.size)
            start += piece.size

    def copy_to(self, buffer: Tensor) -> None:
        """Begin to fill `buffer`, uint8 on a device, in the order of the current stream."""
        for piece, part in self._parts(buffer):
            part.copy_(piece.host[: piece.size], non_blocking=True)

    def enter(self, buffer: Tensor) -> None:
        """Let the modules use the copy in `buffer`."""
        for piece, part in self._parts(buffer):
            piece.point(part)

    def leave(self) -> None:
        """Let the modules use the copy in host memory again."""
        for piece in self.pieces:
            piece.point(piece.host)
