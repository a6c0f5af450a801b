# SPDX-License-Identifier: Apache-2.0
"""One progress bar for a whole run, and lines that are printed beside it."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = (
    "{desc:9} {n_fmt:>3}/{total_fmt} |{bar}| {elapsed} passed, {remaining} left, {rate_inv_fmt}"
)
ON_A_TERMINAL_ONLY = None  # what tqdm's `disable` means by it


class Progress:
    """A callback of `Kandinsky5.generate` that shows a bar: its label is the stage, its length the
    sampling steps. Without a terminal at stderr, or if not `shown`, there is no bar.

    What is logged and printed while the bar is there goes through tqdm, which takes the bar away,
    writes the line and draws the bar again below it.
    """

    def __init__(self, shown: bool = True):
        from tqdm import tqdm

        self.bar = tqdm(
            desc="text",
            total=1,
            unit="step",
            leave=False,
            file=sys.stderr,
            disable=ON_A_TERMINAL_ONLY if shown else True,
            bar_format=LAYOUT,
            dynamic_ncols=True,
        )
        self._redirected = ExitStack()

    def __call__(
        self,
        stage: str,
        step: int | None = None,
        steps: int | None = None,
        latents: Tensor | None = None,
    ) -> None:
        if self.bar.disable:
            return
        if stage == "sampling" and latents is None:
            # Sampling begins, after some steps already if it was interrupted. The clock starts
            # here, so that the seconds per step are those of these steps.
            self.bar.reset(steps)
            self.bar.initial = self.bar.n = step or 0
        if stage == "sampling" and latents is not None:
            self.bar.update(step - self.bar.n)
        else:
            self.bar.set_description_str(stage)

    def tell(self, line: str) -> None:
        """Show a line above the bar, on a terminal only."""
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)

    def print(self, line: object) -> None:
        """Print a line to stdout, above the bar where there is one."""
        self.bar.write(str(line), file=sys.stdout)

    def __enter__(self) -> Progress:
        from tqdm.contrib.logging import logging_redirect_tqdm

        if not self.bar.disable:
            self._redirected.enter_context(logging_redirect_tqdm([logging.getLogger()]))
        return self

    def __exit__(self, *_) -> None:
        self._redirected.close()
        self.bar.close()
