# SPDX-License-Identifier: Apache-2.0
"""Weights that live in host memory and come to the device when they are needed, layer by layer.

The host copy is the only one that lasts: nothing is ever copied back, and between runs a network is
an ordinary one on the CPU, to be saved, adapted or moved. A layer's tensors lie in one flat piece
of host memory, so that one copy of hundreds of megabytes brings them. Such memory is pinned where
CUDA allows it, because only then do copies run beside computation; where it does not, a note says
so, and copies hold up the host while they last.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ALIGNMENT = 256  # bytes: more than any kernel asks for
PAGE = 4096  # bytes: what is pinned is whole pages, which two pieces must not share

_log = logging.getLogger(__name__)


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


class LayerStream:
    """Layers that take turns in two buffers on the device: while one computes, the next one's
    weights are copied, and so round and round.

    Works on layers as they are called, by hooks; without `layers` its owner calls `enter` and
    `leave`. A layer out of turn is fetched when it is called. Nothing waits on the host: events
    order the stream of copies and the computing one.
    """

    def __init__(self, layers: Sequence[nn.Module], stores: Sequence[Store], device: torch.device):
        size = max(store.size for store in stores)
        self.stores, self.device = stores, device
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(stores)))
        ]
        self.holds: list[int | None] = [None] * len(self.buffers)
        # the buffer used last, and the layer that computes
        self.slot, self.active = len(self.buffers) - 1, None
        self.copies = _copy_stream(device)
        self.filled, self.free = ([self._event() for _ in self.buffers] for _ in range(2))
        for event in self.free:  # of what the allocator gave us, and whoever had it before
            self._record(event)
        self.handles = []
        for i, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(partial(self._enter, i)))
            self.handles.append(layer.register_forward_hook(self.leave))

    def close(self) -> None:
        """Leave the layers in host memory, as they were, and give the buffers back."""
        self.leave()
        for handle in self.handles:
            handle.remove()
        if self.copies:
            self.copies.synchronize()  # before the buffers belong to others
        self.buffers.clear()

    def _enter(self, i: int, *_) -> None:
        self.enter(i, (i + 1) % len(self.stores))

    def enter(self, i: int, following: int | None) -> None:
        """Use layer i on the device, and begin to copy the one that will be `following` it, if
        any."""
        self.leave()  # whichever layer was interrupted
        self._fetch(i)
        self.slot, self.active = self.holds.index(i), i
        if self.copies:
            torch.cuda.current_stream(self.device).wait_event(self.filled[self.slot])
        self.stores[i].enter(self.buffers[self.slot])
        if following is not None:
            self._fetch(following)

    def leave(self, *_) -> None:
        """Nothing computes with a layer any more."""
        if self.active is not None:
            self.stores[self.active].leave()
            self._record(self.free[self.slot])
            self.active = None

    def _fetch(self, i: int) -> None:
        """Begin to copy layer i into the buffer that was not used last, unless it is in one
        already."""
        if i in self.holds:
            return
        other = (self.slot + 1) % len(self.buffers)
        self.holds[other] = i
        if self.copies is None:
            return self.stores[i].copy_to(self.buffers[other])
        self.copies.wait_event(self.free[other])
        with torch.cuda.stream(self.copies):
            self.stores[i].copy_to(self.buffers[other])
            self.filled[other].record(self.copies)

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self.copies else None

    def _record(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Offload:
    """A network whose weights live in host memory, and on the device only inside `on_device`.

    A network may have `layers`, which are called one after another and can be streamed, and `once`,
    modules that compute where their weights are and stay in host memory.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.network, self.device = network, device
        self.layers, self.once = (list(getattr(network, name, ())) for name in ("layers", "once"))
        pinned = device.type == "cuda"
        self.stores = [Store([layer], self.once, pinned) for layer in self.layers]
        self.rest = Store([network], [*self.layers, *self.once], pinned)

    @contextmanager
    def on_device(self, resident: int) -> Iterator[nn.Module]:
        """The network, ready to run: all on the device but its layers, of which as many as
        `resident` stay and the others are streamed."""
        stores = [self.rest, *self.stores]
        for module in self.once:
            module.to("cpu")
        for store in stores:
            store.refresh()
        streamed = streamed_layers(len(self.layers), resident)
        staying, buffers, stream = (
            [self.rest, *(store for i, store in enumerate(self.stores) if i not in streamed)],
            [],
            None,
        )
        try:
            for store in staying:
                buffers.append(torch.empty(store.size, dtype=torch.uint8, device=self.device))
                store.copy_to(buffers[-1])
                store.enter(buffers[-1])
            if streamed:
                stream = LayerStream(
                    [self.layers[i] for i in streamed],
                    [self.stores[i] for i in streamed],
                    self.device,
                )
            yield self.network
        finally:
            if stream:
                stream.close()
            for store in stores:
                store.leave()


class LateOffload:
    """`Offload` for an encoder that reads its networks when they are first needed, and is told by
    `placing` where to bring them."""

    def __init__(self, encoder: nn.Module, device: torch.device):
        self.encoder, self.device, self.hosted = encoder, device, {}

    @contextmanager
    def on_device(self, resident: int) -> Iterator[nn.Module]:
        """The encoder, ready to run; each network is on the device from when it is needed to the
        end, as in `Offload.on_device`."""
        there = set()
        with ExitStack() as stack:

            def place(network: nn.Module) -> nn.Module:
                if id(network) not in self.hosted:
                    self.hosted[id(network)] = Offload(network, self.device)
                if id(network) not in there:
                    stack.enter_context(self.hosted[id(network)].on_device(resident))
                    there.add(id(network))
                return network

            with self.encoder.placing(self.device, place):
                yield self.encoder


def streamed_layers(count: int, resident: int) -> list[int]:
    """Which of `count` layers are streamed where `resident` are not: evenly spread, so that each
    copy has as long as it can."""
    streamed = count - min(resident, count)
    return [i for i in range(count) if i * streamed // count != (i - 1) * streamed // count]
