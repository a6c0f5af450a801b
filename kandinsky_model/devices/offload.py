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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from .host import Store

_log = logging.getLogger(__name__)


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
