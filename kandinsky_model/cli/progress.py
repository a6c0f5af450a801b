# SPDX-License-Identifier: Apache-2.0
"""One progress bar for a whole run."""

from __future__ import annotations

import sys

NOT_A_TERMINAL_IS_QUIET = None  # tqdm's word for it


class Progress:
    """One bar for the whole run: its label is the stage, its length the sampling steps. Silent
    where stderr is no terminal."""

    def __init__(self, shown: bool = True):
        from tqdm import tqdm

        layout = (
            "{desc:9} {n_fmt:>3}/{total_fmt} |{bar}| {elapsed} passed, {remaining} left, "
            "{rate_inv_fmt}"
        )
        self.bar = tqdm(
            desc="text",
            total=1,
            unit="step",
            leave=False,
            file=sys.stderr,
            disable=NOT_A_TERMINAL_IS_QUIET if shown else True,
            bar_format=layout,
            dynamic_ncols=True,
        )

    def __call__(self, stage, step=None, steps=None, latents=None):
        begins = stage == "sampling" and step == 0
        self.bar.set_description_str(stage, refresh=not step and not begins)
        if begins:
            # the clock starts here, so that seconds per step are those of steps
            self.bar.reset(steps)
        elif stage == "sampling":
            self.bar.update()

    def tell(self, line: str) -> None:
        """A line that stays above the bar, on a terminal only."""
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
