# SPDX-License-Identifier: Apache-2.0
"""Which tensors a streamed encode or decode keeps in memory and which it computes again.

A scheme is one such choice. This module counts the bytes and FLOPs of every scheme, picks those
that suit a memory budget, and streams in the first of them that works.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices.available import FREE_SHARE
from .stages import Affine
from .stream import Chain, stream

# A level is everything between two changes of size. These are the choices for what it keeps of the
# inputs of its stages: "head" enters the level, "inner" lies inside a resnet's detour, "trunk"
# between the resnets.
#   K keeps all.
#   R keeps one tensor at a time. It recomputes the detours and, in a decoder, the result of the
#     upsampling, which often has twice the channels of the rest.
#   H keeps only the result of the downsampling, which is smaller than everything in front of it and
#     often has half the channels of the rest.
#   S streams from the level before and keeps nothing but two frames per convolution.
MODES: dict[str, dict[str, tuple[str, ...]]] = {
    "decoding": {"K": ("head", "inner", "trunk"), "R": ("trunk",), "S": ()},
    "encoding": {"K": ("head", "inner", "trunk"), "R": ("head", "trunk"), "H": ("head",), "S": ()},
}
OTHERWISE = {"decoding": "choose the official policy", "encoding": "encode fewer frames"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheme:
    """One way to encode or decode. All give the same bits.

    doing: "encoding" or "decoding". name: a letter of `MODES` for each level, in the order in which
    frames meet them. predicted_peak_bytes: activations, caches, padded inputs, keys and values and
    folded weights; not the weights of the model, what comes in or has been given out, nor the
    workspaces of convolution libraries. relative_flops: relative to the scheme that computes
    nothing twice. kept: for every stage, whether its input stays in memory.
    """

    doing: str
    name: str
    predicted_peak_bytes: int
    relative_flops: float
    kept: tuple[bool, ...]

    def __str__(self) -> str:
        return (
            f"scheme {self.name}, {self.predicted_peak_bytes / 1e9:.3g} GB predicted, "
            f"{self.relative_flops:.2f}x the arithmetic"
        )


class Accounting:
    """Bytes and FLOPs of every scheme for a chain and an input of `shape` [B, C, T, Y, X].

    Lists are indexed by stage. A role says where a stage's input lies in its level: "source" for
    the input of the chain, "head", "inner" or "trunk" as in `MODES`, or "end" in front of what
    changes the size.
    """

    def __init__(self, chain: Chain, shape: tuple[int, ...]):
        batch, *size = shape
        self.doing = chain.doing
        self.modes = MODES[chain.doing]
        self.stages = chain.stages
        self.shapes = chain.shapes(*size)  # one more than stages
        self.bytes_per_element = batch * chain.weight.dtype.itemsize
        inputs = list(zip(self.stages, self.shapes[:-1], strict=True))
        self.flops = [stage.flops(before) for stage, before in inputs]
        self.cache = [stage.cache(before) for stage, before in inputs]
        self.work = [stage.work(before) for stage, before in inputs]
        self.held = [stage.held(before) for stage, before in inputs]
        self.weights = sum(stage.weights() for stage in self.stages)
        self.roles: list[str] = []
        self.levels: list[int] = []
        level = 0
        for k, (stage, before) in enumerate(inputs):
            head = k == 1 or (k > 0 and self.stages[k - 1].resizes)
            level += k > 1 and head
            self.levels.append(level)
            if k == 0:
                self.roles.append("source")
            elif head:
                self.roles.append("head")
            elif before.skip:
                self.roles.append("inner")
            else:
                self.roles.append("end" if stage.resizes else "trunk")

    def names(self) -> list[str]:
        """The names of all schemes.

        Only the levels of the largest frames may stream: the last ones of a decoder, the first ones
        of an encoder. What a decoder kept behind a streamed level would have to be computed from
        far. What an encoder kept in front of one is larger than all that it would then save.
        """
        count = self.levels[-1] + 1
        letters = [letter for letter in self.modes if letter != "S"]
        names = []
        for streamed in range(count):
            for chosen in itertools.product(letters, repeat=count - streamed):
                rest = "".join(chosen)
                streams = "S" * streamed
                names.append(streams + rest if self.doing == "encoding" else rest + streams)
        return names

    def kept(self, name: str) -> tuple[bool, ...]:
        """For every stage, whether its input stays in memory under the scheme `name`.

        The end of a level stays where the next level does not keep its own head.
        """
        result = []
        for role, level in zip(self.roles, self.levels, strict=True):
            own = self.modes[name[level]]
            if role == "end":
                following = self.modes[name[level + 1]]
                result.append("trunk" in own and "head" not in following)
            else:
                result.append(role in own)
        return tuple(result)

    def scheme(self, name: str) -> Scheme:
        """The scheme `name`, with its cost: the passes that `stream` makes, one after another."""
        kept = self.kept(name)
        last = len(self.stages)
        start = flops = peak = 0
        for k in range(1, last + 1):
            keep = k < last and kept[k]
            if k == last:
                result = "given out"
            elif keep:
                result = "kept"
            elif self.stages[k].norm is not None:
                result = "measured"
            else:
                continue  # no pass ends in front of this stage
            flops += sum(self.flops[start:k])
            peak = max(peak, self._peak(start, k, result))
            if keep:
                start = k
        return Scheme(
            doing=self.doing,
            name=name,
            predicted_peak_bytes=(peak + self.weights) * self.bytes_per_element,
            relative_flops=flops / sum(self.flops),
            kept=kept,
        )

    def _peak(
        self,
        start: int,
        end: int,
        result: str,
    ) -> int:
        """The most elements alive during the pass from stage `start` to in front of stage `end`.

        result: what becomes of the chunks at the end: "kept", "measured" (for statistics, then
        dropped) or "given out". The worst moment is the end of the pass or, where it consumes its
        source, possibly its beginning.
        """
        source = self.shapes[start]
        target = self.shapes[end]
        # the input of the chain belongs to the caller and is not counted
        full, own = (source.size, source.chunk_size) if start else (0, 0)
        # While a chunk is on its way, a source that is consumed is that much shorter, and a result
        # that is kept has not got it yet.
        before = full if result == "measured" else full - own
        after = target.size - target.chunk_size if result == "kept" else 0
        busy = held = 0
        for j in range(start, end):
            # A source that stays has been counted with its chunk, which is in use as long as it is
            # an input, a skip or being enlarged.
            skips_source = self.shapes[start + 1].skip == source.channels
            lent = self.stages[start].resizes or j <= start + skips_source
            shared = own if lent and result == "measured" else 0
            busy = max(busy, held + self.work[j] - shared)
            held += self.held[j]
        return max(before, after) + sum(self.cache[start:end]) + busy


def ladder(accounting: Accounting) -> list[Scheme]:
    """The schemes worth choosing: fastest first, each needing less memory than all before it."""
    schemes = [accounting.scheme(name) for name in accounting.names()]
    schemes.sort(key=lambda scheme: (scheme.relative_flops, scheme.predicted_peak_bytes))
    result: list[Scheme] = []
    for scheme in schemes:
        if not result or scheme.predicted_peak_bytes < result[-1].predicted_peak_bytes:
            result.append(scheme)
    return result


def choose(
    schemes: list[Scheme],
    memory_budget: int | None,
) -> list[Scheme]:
    """The schemes of a ladder that fit `memory_budget` bytes; None takes all.

    TypeError for a budget that is no int, ValueError for one that is too small for any scheme.
    """
    if memory_budget is None:
        return schemes
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(
            f"a memory budget must be an int, of bytes, got {memory_budget!r}: convert it"
        )
    fitting = [scheme for scheme in schemes if scheme.predicted_peak_bytes <= memory_budget]
    if not fitting:
        doing = schemes[-1].doing
        least = schemes[-1].predicted_peak_bytes
        raise ValueError(
            f"{doing} this many frames of this size requires a memory budget of at least {least} "
            f"bytes ({least / 1e9:.3g} GB), got {memory_budget}: raise it, or {OTHERWISE[doing]}"
        )
    return fitting


def schemes_within(
    chain: Chain,
    shape: tuple[int, ...],
    memory_budget: int | None,
) -> list[Scheme]:
    """The schemes to try for an input of `shape`, in this order.

    Without a budget, the free memory of a GPU makes the choice; the result does not depend on it.
    """
    schemes = ladder(Accounting(chain, shape))
    device = chain.weight.device
    if memory_budget is not None or device.type != "cuda":
        return choose(schemes, memory_budget)
    free = torch.cuda.mem_get_info(device)[0]
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    usable = FREE_SHARE * (free + reserved)
    fitting = [scheme for scheme in schemes if scheme.predicted_peak_bytes <= usable]
    return fitting or schemes[-1:]


def stream_within(
    chain: Chain,
    x: Tensor,
    schemes: list[Scheme],
    notify: Callable[[str], None],
) -> Iterator[Tensor]:
    """`stream` in the first of the schemes.

    Where memory runs out, the next scheme goes on behind the pieces that have been given out.
    notify: is told each scheme as it begins, and on a GPU what it took.
    """
    affines: dict[int, Affine] = {}
    given = 0  # frames given out
    device = chain.weight.device
    for i, scheme in enumerate(schemes):
        notify(f"{chain.doing} in {scheme}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            resident = torch.cuda.memory_allocated(device)
        try:
            seen = 0
            for piece in stream(chain, x, scheme.kept, affines):
                seen += piece.shape[2]
                if seen > given:  # pieces are cut alike in every scheme
                    given = seen
                    yield piece
            if device.type == "cuda":
                taken = torch.cuda.max_memory_allocated(device) - resident
                notify(f"{chain.doing} took {taken / 1e9:.3g} GB measured")
            return
        except torch.OutOfMemoryError:
            if i + 1 == len(schemes):
                raise
        # outside the handler, whose exception would keep the tensors of the failed attempt alive
        _log.warning(
            "memory ran out while %s in %s; going on in a smaller one", chain.doing, scheme
        )
