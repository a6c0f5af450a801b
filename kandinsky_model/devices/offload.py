# SPDX-License-Identifier: Apache-2.0
"""Weights that live in host memory and come to the device when they are needed, layer by layer.

The copy in host memory is the only one that lasts: nothing is ever copied back, and between runs a
network is an ordinary one on the CPU, to be saved, adapted or moved. A layer's tensors lie in one
flat piece of host memory, so that one copy of hundreds of megabytes brings them. Such memory is
pinned where CUDA allows it, because only then do copies run beside computation; where CUDA does
not, a note says so, and the host waits for every copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .host import Store


class LayerStream:
    """Layers that take turns in two buffers on the device: while one computes, the weights of the
    next are copied, and after the last the first comes again.

    With `layers`, hooks on them call `enter` and `leave`; without, the owner calls both. A layer
    that is called out of turn is fetched then. The host never waits: events order the stream of
    copies and the computing stream.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        stores: Sequence[Store],
        device: torch.device,
    ):
        self.stores = stores
        self.device = device
        size = max(store.size for store in stores)
        count = min(2, len(stores))
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        # The layer that each buffer holds, or is being filled with.
        self.holds: list[int | None] = [None] * count
        self.slot = count - 1  # the buffer that was used last
        self.active: int | None = None  # the layer that computes
        self.copies = _copy_stream(device)
        # Of each buffer: its copy has arrived; the layer in it has finished.
        self.filled = self._events()
        self.free = self._events()
        for slot in range(count):
            # The allocator may have given us memory that the computing stream still uses.
            self._record_free(slot)
        self.handles = []
        for i, layer in enumerate(layers):
            before = layer.register_forward_pre_hook(partial(self._enter, i))
            after = layer.register_forward_hook(self.leave)
            self.handles += [before, after]

    def close(self) -> None:
        """Leave the layers in host memory, as they were, and give the buffers back."""
        self.leave()
        for handle in self.handles:
            handle.remove()
        if self.copies:
            self.copies.synchronize()  # before the allocator gives the buffers to others
        self.buffers.clear()

    def _enter(self, i: int, *_) -> None:
        self.enter(i, (i + 1) % len(self.stores))

    def enter(self, i: int, following: int | None) -> None:
        """Use layer i on the device, and begin to copy the layer `following` it, if any."""
        self.leave()  # an interrupted layer may still be active
        self._fetch(i)
        self.slot = self.holds.index(i)
        self.active = i
        if self.copies:
            torch.cuda.current_stream(self.device).wait_event(self.filled[self.slot])
        self.stores[i].enter(self.buffers[self.slot])
        if following is not None:
            self._fetch(following)

    def leave(self, *_) -> None:
        """The active layer, if any, has done its work and returns to host memory."""
        if self.active is not None:
            self.stores[self.active].leave()
            self._record_free(self.slot)
            self.active = None

    def _fetch(self, i: int) -> None:
        """Begin to copy layer i into the buffer that was not used last, unless a buffer holds it
        already."""
        if i in self.holds:
            return
        other = (self.slot + 1) % len(self.buffers)
        self.holds[other] = i
        if self.copies is None:
            self.stores[i].copy_to(self.buffers[other])
            return
        self.copies.wait_event(self.free[other])
        with torch.cuda.stream(self.copies):
            self.stores[i].copy_to(self.buffers[other])
            self.filled[other].record(self.copies)

    def _events(self) -> list[torch.cuda.Event]:
        """One for each buffer; none where copies are not on a stream of their own."""
        return [torch.cuda.Event() for _ in self.buffers] if self.copies else []

    def _record_free(self, slot: int) -> None:
        if self.copies:
            self.free[slot].record(torch.cuda.current_stream(self.device))


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Offload:
    """A network whose weights live in host memory, and on the device only inside `on_device`.

    A network may have an attribute `layers`, modules that are called one after another and can be
    streamed, and an attribute `once`, modules that compute where their weights are and stay in host
    memory.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.network = network
        self.device = device
        self.layers = list(getattr(network, "layers", ()))
        self.once = list(getattr(network, "once", ()))
        pinned = device.type == "cuda"
        self.stores = [Store([layer], self.once, pinned) for layer in self.layers]
        self.rest = Store([network], [*self.layers, *self.once], pinned)

    @contextmanager
    def on_device(self, resident: int) -> Iterator[nn.Module]:
        """The network, ready to run: all on the device but its layers, of which `resident` stay
        there and the others are streamed."""
        for module in self.once:
            module.to("cpu")
        all_stores = [self.rest, *self.stores]
        for store in all_stores:
            store.refresh()
        streamed = streamed_layers(len(self.layers), resident)
        staying = [store for i, store in enumerate(self.stores) if i not in streamed]
        buffers: list[Tensor] = []
        stream = None
        try:
            for store in [self.rest, *staying]:
                buffer = torch.empty(store.size, dtype=torch.uint8, device=self.device)
                buffers.append(buffer)
                store.copy_to(buffer)
                store.enter(buffer)
            if streamed:
                layers = [self.layers[i] for i in streamed]
                stores = [self.stores[i] for i in streamed]
                stream = LayerStream(layers, stores, self.device)
            yield self.network
        finally:
            if stream:
                stream.close()
            for store in all_stores:
                store.leave()


class LateOffload:
    """`Offload` for an encoder that reads its networks when they are first needed.

    The encoder's `placing(device, place)` is a context in which it calls `place(network)` before it
    uses a network.
    """

    def __init__(self, encoder: Any, device: torch.device):
        self.encoder = encoder
        self.device = device
        self.hosted: dict[int, Offload] = {}  # by the id of the network

    @contextmanager
    def on_device(self, resident: int) -> Iterator[nn.Module]:
        """The encoder, ready to run; each network is on the device from when it is needed to the
        end, as in `Offload.on_device`."""
        there = set()
        with ExitStack() as stack:

            def place(network: nn.Module) -> nn.Module:
                key = id(network)
                if key not in self.hosted:
                    self.hosted[key] = Offload(network, self.device)
                if key not in there:
                    stack.enter_context(self.hosted[key].on_device(resident))
                    there.add(key)
                return network

            with self.encoder.placing(self.device, place):
                yield self.encoder


def streamed_layers(count: int, resident: int) -> list[int]:
    """Which of `count` layers are streamed when `resident` are not.

    They are spread evenly, so that each copy has as many resident layers as possible to hide
    behind.
    """
    streamed = count - min(resident, count)
    # Layer i is streamed when the evenly growing number of streamed layers reaches a new integer.
    return [i for i in range(count) if i * streamed // count != (i - 1) * streamed // count]
