# SPDX-License-Identifier: Apache-2.0
"""A progress bar for a run, in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .values import shown

# (stage, steps done, steps, latents or None)
Callback = Callable[[str, int, int, Tensor | None], None]


def check_callback(callback: object) -> None:
    """Raise TypeError for what is neither None nor a function."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {shown(callback)}; pass a function")


class ProgressBar:
    """A callback of `Kandinsky5.generate` that shows the stage and the steps done. callback: is
    called as well."""

    def __init__(self, callback: Callback | None = None):
        from tqdm.auto import tqdm

        check_callback(callback)
        self.callback = callback
        self.bar = tqdm(desc="text", total=1, unit="step")

    def __call__(self, stage: str, step: int, steps: int, latents: Tensor | None) -> None:
        self.bar.set_description(stage, refresh=False)
        if stage == "sampling" and latents is None:  # begins, perhaps where a run was interrupted
            self.bar.reset(total=steps)
        self.bar.n = step
        self.bar.refresh()
        if self.callback is not None:
            self.callback(stage, step, steps, latents)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
