# SPDX-License-Identifier: Apache-2.0
"""What a streamed encode or decode keeps in memory, and what it computes again for it: the schemes,
their bytes and their FLOPs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices.available import FREE_SHARE
from .stream import Chain, stream

# What a level (everything between two resizings) keeps of the inputs of its stages: what enters it,
# what is inside a resnet's detour, and what lies between the resnets. K keeps all. R keeps one
# tensor at a time: it recomputes the detours and, in a decoder, what the upsampling gives, which is
# often twice as wide as the rest. H keeps only what the downsampling gives, which is smaller than
# all in front of it and often half as wide as the rest. S streams from the level before and keeps
# nothing but two frames per convolution.
MODES = {
    "decoding": {"K": ("head", "inner", "trunk"), "R": ("trunk",), "S": ()},
    "encoding": {"K": ("head", "inner", "trunk"), "R": ("head", "trunk"), "H": ("head",), "S": ()},
}
OTHERWISE = {"decoding": "choose the official policy", "encoding": "encode fewer frames"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamPlan:
    """One way to encode or decode: all give the same bits.

    doing: which of them. scheme: a letter of `MODES` per level, in the order in which frames meet
    them.
    predicted_peak_bytes: activations, caches, padded inputs, keys and values and folded weights;
    neither the model's weights, nor what comes in or has been given out, nor what libraries use
    inside a convolution. relative_flops: of the scheme that computes nothing twice. kept: for every
    stage, whether its input stays in memory.
    """

    doing: str
    scheme: str
    predicted_peak_bytes: int
    relative_flops: float
    kept: tuple[bool, ...]

    def __str__(self) -> str:
        return (
            f"scheme {self.scheme}, {self.predicted_peak_bytes / 1e9:.3g} GB predicted, "
            f"{self.relative_flops:.2f}x the arithmetic"
        )


class Accounting:
    """Bytes and FLOPs of a chain that begins with `shape` [B, C, T, Y, X]."""

    def __init__(self, chain: Chain, shape: tuple[int, ...]):
        batch, *size = shape
        self.doing, self.modes, self.stages, self.places = (
            chain.doing,
            MODES[chain.doing],
            chain.stages,
            chain.places(*size),
        )
        self.sample_bytes = batch * chain.weight.dtype.itemsize
        pairs = list(zip(self.stages, self.places, strict=False))
        self.flops, self.cache, self.work, self.held = (
            [getattr(stage, name)(place) for stage, place in pairs]
            for name in ("flops", "cache", "work", "held")
        )
        self.weights = sum(stage.weights() for stage in self.stages)
        self.roles, self.levels, level = [], [], 0
        for k, (stage, place) in enumerate(pairs):
            head = k == 1 or (k > 0 and self.stages[k - 1].resizes)
            level += k > 1 and head
            self.levels.append(level)
            inside = "inner" if place.skip else "end" if stage.resizes else "trunk"
            self.roles.append("source" if k == 0 else "head" if head else inside)

    def schemes(self) -> list[str]:
        """Every scheme. Only the levels of the largest frames may stream, a decoder's last and an
        encoder's first ones.

        What a decoder keeps behind a streamed level would be computed from far. What an encoder
        keeps in front of one is larger than all that it would then save.
        """
        count, letters = self.levels[-1] + 1, [letter for letter in self.modes if letter != "S"]
        names = []
        for streamed in range(count):
            for rest in map("".join, itertools.product(letters, repeat=count - streamed)):
                names.append(
                    "S" * streamed + rest if self.doing == "encoding" else rest + "S" * streamed
                )
        return names

    def kept(self, scheme: str) -> tuple[bool, ...]:
        """For every stage, whether its input stays in memory. A level's end stays where the next
        level does not keep its own head."""
        result = []
        for role, level in zip(self.roles, self.levels, strict=True):
            if role == "end":
                result.append(
                    "trunk" in self.modes[scheme[level]]
                    and "head" not in self.modes[scheme[level + 1]]
                )
            else:
                result.append(role in self.modes[scheme[level]])
        return tuple(result)

    def plan(self, scheme: str) -> StreamPlan:
        kept, last = self.kept(scheme), len(self.stages)
        start = flops = peak = 0
        for k in range(1, last + 1):
            keep = k < last and kept[k]
            if k == last or keep or self.stages[k].norm is not None:
                flops += sum(self.flops[start:k])
                peak = max(
                    peak,
                    self._peak(
                        start, k, "kept" if keep else "given out" if k == last else "measured"
                    ),
                )
            start = k if keep else start
        return StreamPlan(
            self.doing,
            scheme,
            (peak + self.weights) * self.sample_bytes,
            flops / sum(self.flops),
            kept,
        )

    def _peak(self, start: int, end: int, result: str) -> int:
        """Elements alive at the worst moment of a pass: at its end and, where it consumes its
        source, also at its beginning."""
        source, target = self.places[start], self.places[end]
        full, own = (source.size, source.chunk_size) if start else (0, 0)
        # while a chunk is on its way, a source that is consumed is that much shorter, and a result
        # that is kept has yet to get it
        before = full if result == "measured" else full - own
        after = target.size - target.chunk_size if result == "kept" else 0
        busy = held = 0
        for j in range(start, end):
            # of a source that stays, the chunk is counted already, for as long as it is an input, a
            # skip or being enlarged
            lent = self.stages[start].resizes or j <= start + (
                self.places[start + 1].skip == source.channels
            )
            busy = max(busy, held + self.work[j] - (own if lent and result == "measured" else 0))
            held += self.held[j]
        return max(before, after) + sum(self.cache[start:end]) + busy


def ladder(accounting: Accounting) -> list[StreamPlan]:
    """The schemes worth choosing: fastest first, each needing less memory than all before it."""
    result: list[StreamPlan] = []
    for plan in sorted(
        map(accounting.plan, accounting.schemes()),
        key=lambda plan: (plan.relative_flops, plan.predicted_peak_bytes),
    ):
        if not result or plan.predicted_peak_bytes < result[-1].predicted_peak_bytes:
            result.append(plan)
    return result


def choose(schemes: list[StreamPlan], memory_budget: int | None) -> list[StreamPlan]:
    """The schemes of a ladder that fit the budget (None: all); TypeError or ValueError where none
    can."""
    if memory_budget is None:
        return schemes
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(
            f"a memory budget must be an int, of bytes, got {memory_budget!r}: convert it"
        )
    fitting = [plan for plan in schemes if plan.predicted_peak_bytes <= memory_budget]
    if not fitting:
        least = schemes[-1].predicted_peak_bytes
        doing = schemes[-1].doing
        raise ValueError(
            f"{doing} this many frames of this size requires a memory budget of at "
            f"least {least} bytes "
            f"({least / 1e9:.3g} GB), got {memory_budget}: raise it, or "
            f"{OTHERWISE[doing]}"
        )
    return fitting


def plans(chain: Chain, shape: tuple[int, ...], memory_budget: int | None) -> list[StreamPlan]:
    """The schemes to try, in this order. Without a budget a GPU's free memory makes the choice: the
    result does not depend on it."""
    schemes, device = ladder(Accounting(chain, shape)), chain.weight.device
    if memory_budget is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return [
            plan for plan in schemes if plan.predicted_peak_bytes <= FREE_SHARE * (free + reserved)
        ] or schemes[-1:]
    return choose(schemes, memory_budget)


def stream_within(
    chain: Chain, x: Tensor, schemes: list[StreamPlan], notify: Callable[[str], None]
) -> Iterator[Tensor]:
    """`stream` in the first of the schemes; where memory runs out, the next one goes on behind the
    pieces already given out."""
    affines, given, device = {}, 0, chain.weight.device
    for i, plan in enumerate(schemes):
        notify(f"{chain.doing} in {plan}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            resident = torch.cuda.memory_allocated(device)
        try:
            seen = 0
            for piece in stream(chain, x, plan.kept, affines):
                seen += piece.shape[2]
                if seen > given:  # pieces are cut alike in every scheme
                    given = seen
                    yield piece
            if device.type == "cuda":
                notify(
                    f"{chain.doing} took "
                    f"{(torch.cuda.max_memory_allocated(device) - resident) / 1e9:.3g} GB "
                    "measured"
                )
            return
        except torch.OutOfMemoryError:
            if i + 1 == len(schemes):
                raise
        # the failed attempt is freed by now
        _log.warning("memory ran out while %s in %s; going on in a smaller one", chain.doing, plan)
