# SPDX-License-Identifier: Apache-2.0
"""Steps that reuse what the blocks did at an earlier one: approximate, chosen by name, counted.

Between most steps the sum of what all visual blocks add to a token changes little. A cached pass
embeds text and tokens as always, adds the remembered sum in place of the blocks, and runs the out
layer with the current time. The passes with and without the prompt each have memories of their own:
a `Branch` is one of them for one run, so nothing outlives a run or an interruption.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..config import CACHES
from ..dit.layout import Layout
from ..dit.modulation import Modulations
from ..dit.transformer import BlockContext, DiffusionTransformer3D


class Branch(ABC):
    """Takes the transformer's place in one run; a subclass decides when the blocks run."""

    def __init__(self, dit: DiffusionTransformer3D):
        self.dit, self.config, self.computed, self.skipped = dit, dit.config, 0, 0
        # what the blocks, or all but the first, added when they last ran: [B, S, C]
        self.change: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        layout: Layout,
        text_lengths: Tensor | None,
        modulations: Modulations,
    ) -> Tensor:
        """As the transformer's forward."""
        x, context = self.dit.begin(x, text, layout, text_lengths, modulations)
        before = self.computed
        normed = self.run(x, context)
        self.skipped += self.computed == before
        return self.dit.finish(normed, layout)

    @abstractmethod
    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        """The out layer's norm of x after the blocks or what stands in for them."""

    def compute(
        self, x: Tensor, normed: Tensor | None, context: BlockContext, first: int
    ) -> Tensor:
        """Run the blocks from `first` on and remember what they added."""
        span = range(first, len(self.dit.visual_transformer_blocks))
        self.change, before = None, x.clone()  # the blocks may put their results into x
        after, normed = self.dit.blocks(x, normed, context, span)
        self.change, self.computed = torch.sub(after, before, out=before), self.computed + 1
        return normed

    def reuse(self, x: Tensor, context: BlockContext) -> Tensor:
        return context.modulations.out.norm(x + self.change)


class MagBranch(Branch):
    """MagCache (arXiv 2506.09045): which passes run is known beforehand, from calibrated ratios."""

    def __init__(self, dit: DiffusionTransformer3D, runs: list[bool]):
        super().__init__(dit)
        self.runs = iter(runs)

    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        return self.compute(x, None, context, 0) if next(self.runs) else self.reuse(x, context)


class FirstBlockBranch(Branch):
    """The first block always runs; the others do not while what it adds has changed little since
    they last ran."""

    def __init__(self, dit: DiffusionTransformer3D, threshold: float, most_skipped: int):
        super().__init__(dit)
        self.threshold, self.most_skipped, self.in_a_row = threshold, most_skipped, 0
        self.first: Tensor | None = None

    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        ranks = context.layout.ranks
        before = x.clone()
        after, normed = self.dit.blocks(x, None, context, range(1))
        added = torch.sub(after, before, out=before)
        if self.first is not None and self.in_a_row < self.most_skipped:
            change = torch.stack([(added - self.first).abs_().sum(), self.first.abs().sum()])
            moved, size = change if ranks is None else ranks.total(change)
            moved = moved / size
            if moved.item() < self.threshold:
                self.in_a_row += 1
                return self.reuse(after, context)
        self.first, self.in_a_row = added, 0
        return self.compute(after, normed, context, 1)


@dataclass(frozen=True)
class MagCache:
    """ratios: for the branch with the prompt and the one without, how much the change grows from
    step to step of the calibrated run.

    A pass is skipped while the product of ratios since the last computed one strays from 1 by less
    than `threshold` in sum, at most `most_skipped` times in a row, and never in the first
    `retention` of the run.
    """

    ratios: tuple[tuple[float, ...], ...]
    threshold: float = 0.12
    most_skipped: int = 2
    retention: float = 0.2

    def schedule(self, steps: int, branch: int) -> list[bool]:
        """Whether the blocks run, for each of the run's own `steps`: ratios of another number of
        steps are taken at the nearest one."""
        ratios = self.ratios[branch]
        nearest = [ratios[round(i * (len(ratios) - 1) / max(steps - 1, 1))] for i in range(steps)]
        kept = int(self.retention * 2 * steps)  # counted in passes, two to a step
        runs, product, stray, in_a_row = [], 1.0, 0.0, 0
        for step, ratio in enumerate(nearest):
            skip = False
            if 2 * step + branch >= kept:
                product, in_a_row = product * ratio, in_a_row + 1
                stray += abs(1 - product)
                skip = step > 0 and stray < self.threshold and in_a_row <= self.most_skipped
                if not skip:
                    product, stray, in_a_row = 1.0, 0.0, 0
            runs.append(not skip)
        return runs

    def branches(
        self, dit: DiffusionTransformer3D, steps: int, count: int, start: int = 0
    ) -> list[Branch]:
        """One for each of `count` passes of a step. A run that goes on after `start` steps
        remembers nothing and so computes first."""
        if count > len(self.ratios):
            raise ValueError(
                "these ratios were calibrated without guidance, but guidance was "
                "asked for; set it to 1 or cache to none"
            )
        runs = [self.schedule(steps, branch)[start:] for branch in range(count)]
        return [MagBranch(dit, [True, *rest[1:]]) for rest in runs]


@dataclass(frozen=True)
class FirstBlockCache:
    """Needs no calibration: see `FirstBlockBranch`. threshold: relative change of what the first
    block adds, in the mean of |.|."""

    threshold: float = 0.08
    most_skipped: int = 3

    def branches(
        self, dit: DiffusionTransformer3D, steps: int, count: int, start: int = 0
    ) -> list[Branch]:
        return [FirstBlockBranch(dit, self.threshold, self.most_skipped) for _ in range(count)]


@cache
def _mag_ratios() -> dict:
    return json.loads((Path(__file__).parent / "mag_ratios.json").read_text())


def make_cache(name: str, preset: str) -> MagCache | FirstBlockCache | None:
    """The cache called `name` (one of `CACHES`) for the checkpoint of `preset`. ValueError where it
    has no calibrated ratios."""
    if name == "none":
        return None
    if name == "first-block":
        return FirstBlockCache()
    if name != "mag":
        raise ValueError(f"cache must be {' or '.join(CACHES)}, got {name!r}; choose one of them")
    known = {key: value for key, value in _mag_ratios().items() if key != "source"}
    if preset not in known:
        raise ValueError(
            "cache mag requires a preset with calibrated ratios "
            f"({', '.join(sorted(known))}), got {preset or 'none'}; "
            "use first-block, which needs none"
        )
    return MagCache(tuple(map(tuple, known[preset])))
