# SPDX-License-Identifier: Apache-2.0
"""Step caches: passes that reuse what the blocks did at an earlier step. Approximate, and counted.

Between most steps the sum of what all visual blocks add to a token changes little. A skipped pass
embeds text and tokens as always, adds the remembered sum in place of the blocks, and runs the out
layer with the current time. The passes with the prompt and without it have memories of their own: a
`Branch` is one of them during one run, so no memory outlives a run. An interrupted run takes its
branches' memories along, see `Remembering`, and so goes on exactly.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..config import CACHES
from ..dit.layout import Layout
from ..dit.modulation import Modulations
from ..dit.transformer import BlockContext, DiffusionTransformer3D

_log = logging.getLogger(__name__)


class Branch(ABC):
    """Stands in for the transformer in one of a run's passes; a subclass says when blocks run.

    step: the number of the step that comes next.
    change: what the blocks, or all but the first, added when they last ran, [B, S, C].
    computed, skipped: how many passes ran the blocks, and how many did not.
    """

    def __init__(self, dit: DiffusionTransformer3D, step: int = 0):
        self.dit = dit
        self.config = dit.config
        self.step = step
        self.computed = 0
        self.skipped = 0
        self.change: Tensor | None = None

    def memory(self) -> dict[str, Tensor]:
        """What `recall` needs to go on with, also where a step is interrupted: that step is done
        again, so a change that was about to be replaced is not needed."""
        return {} if self.change is None else {"change": self.change}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on with the `memory()` of a branch that got to the same step."""
        self.change = memory.get("change")

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
        """Arguments and result of `DiffusionTransformer3D.forward`."""
        x, context = self.dit.begin(x, text, layout, text_lengths, modulations)
        before = self.computed
        normed = self.run(x, context)
        self.skipped += self.computed == before
        self.step += 1
        return self.dit.finish(normed, layout)

    @abstractmethod
    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        """What the out layer reads, [B, S, C]: the norm of the tokens x [B, S, C] after the blocks,
        or after the remembered change."""

    def compute(
        self, x: Tensor, normed: Tensor | None, context: BlockContext, first: int
    ) -> Tensor:
        """Run the blocks from number `first` on, remember what they added, and return what the out
        layer reads. normed: what block `first` reads of x; None computes it."""
        self.change = None  # its memory is free while the blocks run
        before = x.clone()  # because the blocks may put their results into x
        after, normed = self.dit.blocks(
            x, normed, context, range(first, self.config.num_visual_blocks)
        )
        self.change = torch.sub(after, before, out=before)
        self.computed += 1
        return normed

    def reuse(self, x: Tensor, context: BlockContext) -> Tensor:
        """What the out layer reads, from the remembered change."""
        change = cast(Tensor, self.change)  # a pass is skipped only where there is one
        return context.modulations.out.norm(x + change)


class MagBranch(Branch):
    """A branch of `MagCache`. runs: for every step, whether the blocks run."""

    def __init__(self, dit: DiffusionTransformer3D, runs: Sequence[bool], step: int = 0):
        super().__init__(dit, step)
        self.runs = runs

    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        if self.runs[self.step] or self.change is None:
            return self.compute(x, None, context, first=0)
        return self.reuse(x, context)


@dataclass(frozen=True)
class Decision:
    """What a `FirstBlockBranch` decided at a step. in_a_row: how many passes up to then reused."""

    step: int = -1
    reuse: bool = False
    in_a_row: int = 0


class FirstBlockBranch(Branch):
    """A branch of `FirstBlockCache`.

    added: what the first block added when all blocks last ran, [B, S, C]. decision: the latest. A
    step that was interrupted after its decision keeps it when it is done again, because `added` may
    be the new one by then.
    """

    def __init__(
        self, dit: DiffusionTransformer3D, threshold: float, most_skipped: int, step: int = 0
    ):
        super().__init__(dit, step)
        self.threshold = threshold
        self.most_skipped = most_skipped
        self.decision = Decision()
        self.added: Tensor | None = None

    def memory(self) -> dict[str, Tensor]:
        memory = super().memory()
        if self.added is not None:
            memory["added"] = self.added
        last = self.decision
        memory["decision"] = torch.tensor([last.step, last.reuse, last.in_a_row])
        return memory

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        super().recall(memory)
        self.added = memory.get("added")
        if "decision" in memory:
            step, reuse, in_a_row = memory["decision"].tolist()
            self.decision = Decision(step, bool(reuse), in_a_row)

    def run(self, x: Tensor, context: BlockContext) -> Tensor:
        before = x.clone()
        after, normed = self.dit.blocks(x, None, context, range(1))
        added = torch.sub(after, before, out=before)
        if self.decision.step != self.step:
            reuse = self.is_close(added, context.layout)
            in_a_row = self.decision.in_a_row + 1 if reuse else 0
            self.decision = Decision(self.step, reuse, in_a_row)
        if self.decision.reuse and self.change is not None:
            return self.reuse(after, context)
        self.added = added
        return self.compute(after, normed, context, first=1)

    def is_close(self, added: Tensor, layout: Layout) -> bool:
        """Whether the first block adds nearly what it added when all blocks last ran."""
        if self.added is None or self.decision.in_a_row >= self.most_skipped:
            return False
        sums = torch.stack([(added - self.added).abs_().sum(), self.added.abs().sum()])
        # Processes that share a run must decide alike, so they sum over the tokens of all.
        moved, size = sums if layout.ranks is None else layout.ranks.total(sums)
        return (moved / size).item() < self.threshold


@dataclass(frozen=True)
class MagCache:
    """MagCache (arXiv 2506.09045): calibrated ratios say beforehand which passes are skipped.

    ratios: for the pass with the prompt and the one without, how much the change grows from step to
    step of the calibrated run.

    A pass is skipped while the product of the ratios since the last computed pass strays from 1 by
    less than `threshold` in sum, at most `most_skipped` times in a row, and never in the first
    `retention` of the run.
    """

    ratios: tuple[tuple[float, ...], ...]
    threshold: float = 0.12
    most_skipped: int = 2
    retention: float = 0.2

    def schedule(self, steps: int, branch: int) -> list[bool]:
        """For every step of a run, whether the blocks run. Where the ratios were calibrated with
        another number of steps, each step takes the ratio of the nearest one."""
        ratios = self.ratios[branch]
        nearest = [ratios[round(i * (len(ratios) - 1) / max(steps - 1, 1))] for i in range(steps)]
        kept = int(self.retention * 2 * steps)  # counted in passes, two to a step
        runs = []
        product, stray, in_a_row = 1.0, 0.0, 0
        for step, ratio in enumerate(nearest):
            skip = False
            if 2 * step + branch >= kept:
                product *= ratio
                in_a_row += 1
                stray += abs(1 - product)
                skip = step > 0 and stray < self.threshold and in_a_row <= self.most_skipped
                if not skip:
                    product, stray, in_a_row = 1.0, 0.0, 0
            runs.append(not skip)
        return runs

    def branches(
        self, dit: DiffusionTransformer3D, steps: int, count: int, start: int = 0
    ) -> list[Branch]:
        """A branch for each of the `count` passes of a step, for the steps from `start` on. It
        remembers nothing yet, so it computes first."""
        if count > len(self.ratios):
            raise ValueError(
                "these ratios were calibrated without guidance, but guidance was "
                "asked for; set it to 1 or cache to none"
            )
        return [MagBranch(dit, self.schedule(steps, branch), start) for branch in range(count)]


@dataclass(frozen=True)
class FirstBlockCache:
    """The first block always runs, the others only when what it adds has changed.

    threshold: the largest relative change, in the mean of |.|, at which the others are skipped.
    most_skipped: how often in a row. It needs no calibration.
    """

    threshold: float = 0.08
    most_skipped: int = 3

    def branches(
        self, dit: DiffusionTransformer3D, steps: int, count: int, start: int = 0
    ) -> list[Branch]:
        """See `MagCache.branches`."""
        return [
            FirstBlockBranch(dit, self.threshold, self.most_skipped, start) for _ in range(count)
        ]


class Remembering:
    """A step cache for a run that may be interrupted, and may be the rest of one that was.

    memories: what `memories()` of the interrupted run returned; empty where there was none.
    """

    def __init__(self, cache: MagCache | FirstBlockCache, memories: Mapping[str, Tensor]):
        self.cache = cache
        self.recalled = memories
        self.made: list[Branch] = []

    def branches(
        self, dit: DiffusionTransformer3D, steps: int, count: int, start: int = 0
    ) -> list[Branch]:
        """See `MagCache.branches`; each branch recalls its memory."""
        self.made = self.cache.branches(dit, steps, count, start)
        for i, branch in enumerate(self.made):
            prefix = f"{i}."
            branch.recall(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in self.recalled.items()
                    if name.startswith(prefix)
                }
            )
        self.recalled = {}  # the branches hold them now, until they remember something newer
        return self.made

    def memories(self) -> dict[str, Tensor]:
        """The memories of all branches, by the branch's number and the name, such as "0.change"."""
        if not self.made:
            return dict(self.recalled)
        return {
            f"{i}.{name}": tensor
            for i, branch in enumerate(self.made)
            for name, tensor in branch.memory().items()
        }


StepCache = MagCache | FirstBlockCache | Remembering


def make_cache(name: str, preset: str) -> MagCache | FirstBlockCache | None:
    """The step cache called `name`, one of `CACHES`, for the checkpoint of `preset`; None for
    "none". Raises ValueError where "mag" has no calibrated ratios for the preset."""
    if name == "none":
        return None
    if name == "first-block":
        return FirstBlockCache()
    if name != "mag":
        raise ValueError(f"cache must be {' or '.join(CACHES)}, got {name!r}; choose one of them")
    ratios = _calibrated_ratios()
    if preset not in ratios:
        raise ValueError(
            f"cache mag requires a preset with calibrated ratios ({', '.join(sorted(ratios))}), "
            f"got {preset or 'none'}; use first-block, which needs none"
        )
    return MagCache(ratios[preset])


@cache
def _calibrated_ratios() -> dict[str, tuple[tuple[float, ...], ...]]:
    """The published ratios by preset; see `MagCache`."""
    stored = json.loads((Path(__file__).parent / "mag_ratios.json").read_text(encoding="utf-8"))
    del stored["source"]
    return {preset: tuple(map(tuple, ratios)) for preset, ratios in stored.items()}


def log_counts(branches: Sequence[Branch]) -> None:
    """Log how many passes of a run were computed and how many skipped."""
    computed = sum(branch.computed for branch in branches)
    skipped = sum(branch.skipped for branch in branches)
    _log.info(
        "%d of %d passes were computed, %d reused an earlier one",
        computed,
        computed + skipped,
        skipped,
    )
