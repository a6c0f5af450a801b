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

_log = logging.getLogger(__name__)


ALIGNMENT = 256  # bytes: more than any kernel asks for


PAGE = 4096  # bytes: what is pinned is whole pages, which two pieces must not share


def tensors_of(modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> list[Tensor]:
    """What modules and those inside them hold, each once: parameters, buffers, joint weights, the
    matrices of adapters.

    without: modules that are left out.
    """
    seen = {id(inner) for module in without for inner in module.modules()}
    found, waiting = {}, list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf in tree_leaves(vars(module)):  # its children are among them
            if isinstance(leaf, Tensor):
                found[id(leaf)] = leaf
            elif isinstance(leaf, nn.Module):
                waiting.append(leaf)
    return list(found.values())


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies in a flat piece of memory, in bytes, and how it is laid out there."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        return (
            flat.narrow(0, self.start, self.size)
            .view(self.dtype)
            .as_strided(self.shape, self.strides)
        )


def layout(tensors: Sequence[Tensor]) -> tuple[list[Spot], int]:
    """A place for every tensor in one piece of memory, and its size. Tensors that share memory, as
    joint weights do, share it there."""
    spans = []
    for i, tensor in enumerate(tensors):
        reach = (
            sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            + 1
            if tensor.numel()
            else 0
        )
        spans.append(
            (
                tensor.untyped_storage()._cdata,
                tensor.storage_offset() * tensor.itemsize,
                reach * tensor.itemsize,
                i,
            )
        )
    # the storage, and its bytes that the piece's current region begins and ends with
    spots, end, last = {}, 0, (None, 0, 0)
    for storage, offset, size, i in sorted(spans):
        if storage != last[0] or offset >= last[2]:
            begin, last = end, (storage, offset, offset)
        tensor = tensors[i]
        spots[i] = Spot(
            begin + offset - last[1], size, tensor.dtype, tuple(tensor.shape), tensor.stride()
        )
        last = (storage, last[1], max(last[2], offset + size))
        # whatever follows, so that no order changes the size
        end = begin + -(-(last[2] - last[1]) // ALIGNMENT) * ALIGNMENT
    return [spots[i] for i in range(len(tensors))], end


def pin(memory: Tensor) -> bool:
    """Lock a CPU tensor's memory where it is, for as long as the tensor lives, and say whether that
    was possible.

    PyTorch's own pinned memory is a copy, and rounded up to a power of two: the 537 MB of a Pro
    block would take 1,074.
    """
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    code = int(runtime.cudaHostRegister(address, memory.numel() * memory.itemsize, 0))
    if code == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return True
    _warn(code)
    with suppress(RuntimeError):
        # CUDA reports an error once more, to whatever is launched next
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
        self.tensors, (self.spots, self.size) = tensors, layout(tensors)
        whole = -(-max(self.size, 1) // PAGE) * PAGE
        memory = torch.empty(whole + PAGE, dtype=torch.uint8)
        self.host = memory.narrow(0, -memory.data_ptr() % PAGE, whole)
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
        """Whether all tensors still are among those wanted, and where and as they were put."""
        return all(
            id(tensor) in wanted
            and (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            == (
                self.host.data_ptr() + spot.start if spot.size else tensor.data_ptr(),
                spot.dtype,
                spot.shape,
                spot.strides,
            )
            for tensor, spot in zip(self.tensors, self.spots, strict=True)
        )


class Store:
    """The tensors of a layer, in as few pieces of host memory as came about: one, and one for every
    change such as a new adapter."""

    def __init__(self, modules: Sequence[nn.Module], without: Sequence[nn.Module], pinned: bool):
        self.modules, self.without, self.pinned, self.pieces = modules, without, pinned, []

    def refresh(self) -> None:
        """Take in what the modules hold now; only what is new or has moved is copied."""
        tensors = tensors_of(self.modules, self.without)
        self.pieces = [
            piece for piece in self.pieces if piece.is_whole({id(tensor) for tensor in tensors})
        ]
        known = {id(tensor) for piece in self.pieces for tensor in piece.tensors}
        fresh = [tensor for tensor in tensors if id(tensor) not in known]
        if fresh:
            self.pieces.append(Piece(fresh, self.pinned))

    @property
    def size(self) -> int:
        """Bytes of a flat copy."""
        return sum(piece.size for piece in self.pieces)

    def _parts(self, buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        start = 0
        for piece in self.pieces:
            yield piece, buffer.narrow(0, start, piece.size)
            start += piece.size

    def copy_to(self, buffer: Tensor) -> None:
        """Begin to fill `buffer`, uint8 on a device, in the order of the current stream."""
        for piece, part in self._parts(buffer):
            part.copy_(piece.host[: piece.size], non_blocking=True)

    def enter(self, buffer: Tensor) -> None:
        """Use the copy in `buffer`."""
        for piece, part in self._parts(buffer):
            piece.point(part)

    def leave(self) -> None:
        """Use the host's copy again."""
        for piece in self.pieces:
            piece.point(piece.host)
