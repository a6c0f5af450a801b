# SPDX-License-Identifier: Apache-2.0
"""What a streamed decode keeps in memory, and what it therefore computes again: the schemes, their bytes and their FLOPs."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .vae_stages import Enlarge, Place, Stage
from .vae_stream import places_of, stream

# What a level (everything between two upsamplings) keeps of the inputs of its stages: what enters it, what is inside a resnet's
# detour, and what lies between the resnets. K keeps all. R keeps one tensor: it recomputes the detours, and what the upsampling gives,
# which is often twice as wide as the rest. S streams from the level before and keeps nothing but two frames per convolution.
MODES = {"K": ("head", "inner", "trunk"), "R": ("trunk",), "S": ()}
FREE_SHARE = 0.9  # of a GPU's free memory; the rest is for convolution workspaces and fragments
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodePlan:
    """One way to decode: all give the same bits.

    scheme: a letter of `MODES` per level of the decoder. predicted_peak_bytes: activations, caches, padded inputs, keys and values and
    folded weights; neither the model's weights, nor the latents, nor the frames given out, nor what libraries use inside a convolution.
    relative_flops: of the scheme that computes nothing twice. kept: for every stage, whether its input stays in memory.
    """

    scheme: str
    predicted_peak_bytes: int
    relative_flops: float
    kept: tuple[bool, ...]

    def __str__(self) -> str:
        return f"scheme {self.scheme}, {self.predicted_peak_bytes / 1e9:.3g} GB predicted, {self.relative_flops:.2f}x the arithmetic"


class Accounting:
    """Bytes and FLOPs of a chain of stages between given places."""

    def __init__(self, stages: list[Stage], places: list[Place], sample_bytes: int):
        self.stages, self.places, self.sample_bytes = stages, places, sample_bytes
        pairs = list(zip(stages, places, strict=False))
        self.flops, self.cache, self.work, self.held = (
            [getattr(stage, name)(place) for stage, place in pairs] for name in ("flops", "cache", "work", "held"))
        self.weights = sum(stage.weights() for stage in stages)
        self.roles, self.levels, level = [], [], 0
        for k, (stage, place) in enumerate(pairs):
            head = k == 1 or (k > 0 and isinstance(stages[k - 1], Enlarge))
            level += k > 1 and head
            self.levels.append(level)
            inside = "inner" if place.skip else "end" if isinstance(stage, Enlarge) else "trunk"
            self.roles.append("latents" if k == 0 else "head" if head else inside)

    @classmethod
    def of(cls, stages: list[Stage], latent_shape: tuple[int, ...], dtype: torch.dtype) -> Accounting:
        batch, channels, *size = latent_shape
        return cls(stages, places_of(stages, *size, channels), batch * dtype.itemsize)

    def schemes(self) -> list[str]:
        """Every scheme; only a tail of levels may stream, because whatever is kept behind them would be computed from far."""
        count = self.levels[-1] + 1
        names = []
        for streamed in range(count):
            names += ["".join(letters) + "S" * streamed for letters in itertools.product("KR", repeat=count - streamed)]
        return names

    def kept(self, scheme: str) -> tuple[bool, ...]:
        """For every stage, whether its input stays in memory. A level's end stays where the next level does not keep its own head."""
        result = []
        for role, level in zip(self.roles, self.levels, strict=True):
            if role == "end":
                result.append("trunk" in MODES[scheme[level]] and "head" not in MODES[scheme[level + 1]])
            else:
                result.append(role in MODES[scheme[level]])
        return tuple(result)

    def plan(self, scheme: str) -> DecodePlan:
        kept, last = self.kept(scheme), len(self.stages)
        start = flops = peak = 0
        for k in range(1, last + 1):
            keep = k < last and kept[k]
            if k == last or keep or self.stages[k].norm is not None:
                flops += sum(self.flops[start:k])
                peak = max(peak, self._peak(start, k, "kept" if keep else "given out" if k == last else "measured"))
            start = k if keep else start
        return DecodePlan(scheme, (peak + self.weights) * self.sample_bytes, flops / sum(self.flops), kept)

    def _peak(self, start: int, end: int, result: str) -> int:
        """Elements alive at the worst moment of a pass: at its end and, where it consumes its source, also at its beginning."""
        source, target = self.places[start], self.places[end]
        full, own = (source.size, source.chunk_size) if start else (0, 0)
        # while a chunk is on its way, a source that is consumed is that much shorter, and a result that is kept has yet to get it
        before = full if result == "measured" else full - own
        after = target.size - target.chunk_size if result == "kept" else 0
        busy = held = 0
        for j in range(start, end):
            # of a source that stays, the chunk is counted already, for as long as it is an input, a skip or being enlarged
            lent = isinstance(self.stages[start], Enlarge) or j <= start + (self.places[start + 1].skip == source.channels)
            busy = max(busy, held + self.work[j] - (own if lent and result == "measured" else 0))
            held += self.held[j]
        return max(before, after) + sum(self.cache[start:end]) + busy


def ladder(accounting: Accounting) -> list[DecodePlan]:
    """The schemes worth choosing: fastest first, each needing less memory than all before it."""
    result: list[DecodePlan] = []
    for plan in sorted(map(accounting.plan, accounting.schemes()), key=lambda plan: (plan.relative_flops, plan.predicted_peak_bytes)):
        if not result or plan.predicted_peak_bytes < result[-1].predicted_peak_bytes:
            result.append(plan)
    return result


def choose(schemes: list[DecodePlan], memory_budget: int | None) -> list[DecodePlan]:
    """The schemes of a ladder that fit the budget (None: all); TypeError or ValueError where none can."""
    if memory_budget is None:
        return schemes
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"a memory budget must be an int, of bytes, got {memory_budget!r}: convert it")
    fitting = [plan for plan in schemes if plan.predicted_peak_bytes <= memory_budget]
    if not fitting:
        least = schemes[-1].predicted_peak_bytes
        raise ValueError(f"decoding this many frames of this size requires a memory budget of at least {least} bytes "
                         f"({least / 1e9:.3g} GB), got {memory_budget}: raise it, or choose the official policy")
    return fitting


def plans(stages: list[Stage], latents: Tensor, memory_budget: int | None) -> list[DecodePlan]:
    """The schemes to try, in this order. Without a budget a GPU's free memory makes the choice: the result does not depend on it."""
    schemes = ladder(Accounting.of(stages, latents.shape, latents.dtype))
    if memory_budget is None and latents.is_cuda:
        free = torch.cuda.mem_get_info(latents.device)[0]
        reserved = torch.cuda.memory_reserved(latents.device) - torch.cuda.memory_allocated(latents.device)
        return [plan for plan in schemes if plan.predicted_peak_bytes <= FREE_SHARE * (free + reserved)] or schemes[-1:]
    return choose(schemes, memory_budget)


def decode_within(stages: list[Stage], latents: Tensor, schemes: list[DecodePlan], notify: Callable[[str], None]) -> Iterator[Tensor]:
    """`stream` in the first of the schemes; where memory runs out, the next one goes on behind the frames already given out."""
    affines, given = {}, 0
    for i, plan in enumerate(schemes):
        notify(f"decoding in {plan}")
        if latents.is_cuda:
            torch.cuda.reset_peak_memory_stats(latents.device)
            resident = torch.cuda.memory_allocated(latents.device)
        try:
            seen = 0
            for frames in stream(stages, latents, plan.kept, affines):
                seen += frames.shape[2]
                if seen > given:  # pieces are cut alike in every scheme
                    given = seen
                    yield frames
            if latents.is_cuda:
                notify(f"decoded with {(torch.cuda.max_memory_allocated(latents.device) - resident) / 1e9:.3g} GB measured")
            return
        except torch.OutOfMemoryError:
            if i + 1 == len(schemes):
                raise
        _log.warning("memory ran out while decoding in %s; going on in a smaller one", plan)  # the failed attempt is freed by now


def parse_bytes(text: str) -> int:
    """Bytes from "10GB", "9.5 GiB", "800mb" or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f"a memory budget must be a positive number of bytes, or of KB, MB, GB, KiB, MiB or GiB, got {text!r}; "
                         "write for example 10GB")
    return int(float(match[1]) * UNITS[match[2]])
