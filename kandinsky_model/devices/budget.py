# SPDX-License-Identifier: Apache-2.0
"""Ways to run every stage within a budget of device memory, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .host import layout, tensors_of
from .offload import streamed_layers


@dataclass(frozen=True)
class Weights:
    """Bytes of a network: of each of its `layers`, of what runs `once` and stays in host memory,
    and of all else. See `offload`."""

    layers: tuple[int, ...] = ()
    once: int = 0
    rest: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> Weights:
        layers, once = (list(getattr(network, name, ())) for name in ("layers", "once"))
        size = lambda modules, without=(): layout(tensors_of(modules, without))[1]  # noqa: E731
        return cls(
            tuple(size([layer], once) for layer in layers),
            size(once),
            size([network], [*layers, *once]),
        )

    @property
    def total(self) -> int:
        return sum(self.layers) + self.once + self.rest

    def on_device(self, resident: int) -> int:
        """With so many layers that stay, and two buffers through which the others go."""
        streamed = [self.layers[i] for i in streamed_layers(len(self.layers), resident)]
        return (
            self.rest
            + sum(self.layers)
            - sum(streamed)
            + max(streamed, default=0) * min(2, len(streamed))
        )


@dataclass(frozen=True)
class Way:
    """A way for one stage of a run to work within a device's memory.

    weights: bytes of networks on the device. working: bytes of all other tensors at the worst
    moment. how: told to the user. resident: how many layers of the network stay on the device, the
    others being streamed. Rooms whose stages have more to choose derive from it.
    """

    weights: int
    working: int
    how: str = ""
    resident: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class Placement:
    """The chosen way of every stage. together: all networks stay on the device; else each is there
    only while its stage lasts."""

    budget: int
    stages: dict[str, Way]
    together: bool

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages.values())

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {stage.peak_bytes / 1e9:.3g} of {self.budget / 1e9:.3g} "
            f"GB{stage.how and ': '}{stage.how}"
            for name, stage in self.stages.items()
        )


def choose_ways(ways: Mapping[str, Iterable[Way]], everything: int, budget: int) -> Placement:
    """The first way of each stage that fits into `budget` bytes.

    ways: by the name of the stage, fastest first. everything: bytes of all networks together; where
    they fit with the fastest way of every stage, nothing need ever move. TypeError unless the
    budget is an int; ValueError where a stage cannot fit, naming the least.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"a memory budget must be an int, of bytes, got {budget!r}: convert it")
    ways = {name: list(stages) for name, stages in ways.items()}
    if everything + max(stages[0].working for stages in ways.values()) <= budget:
        return Placement(
            budget,
            {
                name: replace(stages[0], weights=everything, how="all weights stay on the device")
                for name, stages in ways.items()
            },
            True,
        )
    least = {name: min(stage.peak_bytes for stage in stages) for name, stages in ways.items()}
    worst = max(least, key=least.get)
    if least[worst] > budget:
        raise ValueError(
            f"{worst} requires a memory budget of at least {least[worst]} bytes "
            f"({least[worst] / 1e9:.3g} GB), got {budget}: "
            "raise it, or ask for fewer frames or pixels"
        )
    return Placement(
        budget,
        {
            name: next(stage for stage in stages if stage.peak_bytes <= budget)
            for name, stages in ways.items()
        },
        False,
    )


def text_ways(weights: Weights) -> Iterator[Way]:
    """Ways to run a text encoder: all its layers resident, or as many as there is room for.

    Its tensors are taken to need as much as its largest layer: those of a prompt's 400 tokens are
    an eighth of one of Qwen2.5-VL-7B.
    """
    working = max(weights.layers, default=weights.rest)
    for resident in range(len(weights.layers), -1, -1):
        yield Way(weights.on_device(resident), working, layers_told(weights, resident), resident)


def layers_told(weights: Weights, resident: int) -> str:
    count = len(weights.layers)
    return (
        "all weights resident"
        if resident == count
        else (f"{count - resident} of {count} layers streamed")
    )
