# SPDX-License-Identifier: Apache-2.0
"""Ways to run every stage within a budget of device memory, and the choice among them.

A *stage* is a part of a run: text, pictures, sampling, decoding. A *way* is how a stage works: with
how many layers of its network resident on the device, and in how many pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .host import layout, tensors_of
from .offload import streamed_layers


@dataclass(frozen=True)
class Weights:
    """Bytes of a network's weights, by how `Offload` treats them.

    layers: of each layer that can be streamed. once: of modules that compute in host memory and
    never move. rest: of everything else, which is on the device whenever the network works.
    """

    layers: tuple[int, ...] = ()
    once: int = 0
    rest: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> Weights:
        layers = list(getattr(network, "layers", ()))
        once = list(getattr(network, "once", ()))
        return cls(
            layers=tuple(_packed_bytes([layer], without=once) for layer in layers),
            once=_packed_bytes(once),
            rest=_packed_bytes([network], without=[*layers, *once]),
        )

    @property
    def total(self) -> int:
        return sum(self.layers) + self.once + self.rest

    def on_device(self, resident: int) -> int:
        """Bytes on the device when `resident` layers stay there and the others take turns in two
        buffers, each of the size of the largest of them."""
        streamed = [self.layers[i] for i in streamed_layers(len(self.layers), resident)]
        staying = self.rest + sum(self.layers) - sum(streamed)
        buffers = min(2, len(streamed))
        return staying + buffers * max(streamed, default=0)


def _packed_bytes(modules: list[nn.Module], without: Iterable[nn.Module] = ()) -> int:
    _, size = layout(tensors_of(modules, without))
    return size


@dataclass(frozen=True)
class Way:
    """A way for one stage of a run to work within a device's memory.

    weights: bytes of networks on the device. working: bytes of all other tensors at the worst
    moment. how: a description for the user. resident: how many layers of the network stay on the
    device, while the others are streamed. as_fast: whether it is as fast as the first of its stage,
    but for what does not pay for moving networks. Rooms whose stages have more to choose derive
    from it.
    """

    weights: int
    working: int
    how: str = ""
    resident: int = 0
    as_fast: bool = False

    @property
    def peak_bytes(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class Placement:
    """The chosen way of every stage.

    together: whether all networks stay on the device; otherwise each is there only while its stage
    lasts.
    """

    budget: int
    stages: dict[str, Way]
    together: bool

    @property
    def peak_bytes(self) -> int:
        return max(way.peak_bytes for way in self.stages.values())

    def __str__(self) -> str:
        return "\n".join(self._line(name, way) for name, way in self.stages.items())

    def _line(self, name: str, way: Way) -> str:
        how = f": {way.how}" if way.how else ""
        return f"{name}: {way.peak_bytes / 1e9:.3g} of {self.budget / 1e9:.3g} GB{how}"


def choose_ways(
    ways: Mapping[str, Iterable[Way]],
    everything: int,
    budget: int,
) -> Placement:
    """The first way of each stage that fits into `budget` bytes.

    ways: the ways of each stage, fastest first. everything: bytes of all networks together; where
    they fit beside one of the fastest ways of every stage, no network ever has to move. TypeError
    unless the budget is an int; ValueError where a stage cannot fit, with the least that it needs.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"a memory budget must be an int, of bytes, got {budget!r}: convert it")
    choices = {name: list(stage_ways) for name, stage_ways in ways.items()}
    fastest = {
        name: _beside(everything, stage_ways, budget) for name, stage_ways in choices.items()
    }
    if everything + max(way.working for way in fastest.values()) <= budget:
        how = "all weights stay on the device"
        stages = {name: replace(way, weights=everything, how=how) for name, way in fastest.items()}
        return Placement(budget, stages, together=True)
    least = {
        name: min(way.peak_bytes for way in stage_ways) for name, stage_ways in choices.items()
    }
    worst = max(least, key=lambda name: least[name])
    if least[worst] > budget:
        raise ValueError(
            f"{worst} requires a memory budget of at least {least[worst]} bytes "
            f"({least[worst] / 1e9:.3g} GB), got {budget}: "
            "raise it, or ask for fewer frames or pixels"
        )
    stages = {
        name: next(way for way in stage_ways if way.peak_bytes <= budget)
        for name, stage_ways in choices.items()
    }
    return Placement(budget, stages, together=False)


def _beside(weights: int, ways: list[Way], budget: int) -> Way:
    """The first of the fastest ways that fits beside bytes of weights, or the first of all."""
    fastest = [ways[0], *(way for way in ways[1:] if way.as_fast)]
    return next((way for way in fastest if weights + way.working <= budget), ways[0])


def text_ways(weights: Weights) -> Iterator[Way]:
    """Ways to run a text encoder: all its layers resident, or as many as there is room for.

    Its other tensors are assumed to need as much memory as its largest layer. That is generous: for
    a prompt of 400 tokens they need an eighth of a layer of Qwen2.5-VL-7B.
    """
    working = max(weights.layers, default=weights.rest)
    for resident in range(len(weights.layers), -1, -1):
        yield Way(
            weights.on_device(resident), working, describe_layers(weights, resident), resident
        )


def describe_layers(weights: Weights, resident: int) -> str:
    """For the user: "12 of 32 layers streamed" when `resident` layers stay on the device."""
    count = len(weights.layers)
    if resident == count:
        return "all weights resident"
    return f"{count - resident} of {count} layers streamed"
