# SPDX-License-Identifier: Apache-2.0
"""What `Kandinsky5.generate` was asked for, before and after it was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .given import Pictures
from .settings import Settings
from .values import shown


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `Kandinsky5.generate`, whose docstring explains them."""

    prompts: Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    seed: int | Sequence[int] | None = None
    image: object = None
    last_image: object = None
    expand_prompt: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.expand_prompt, bool):
            raise TypeError(
                f"expand_prompt must be True or False, got {shown(self.expand_prompt)}; pass one"
            )


@dataclass(frozen=True, eq=False)
class Reading:
    """A request that was read and checked: the settings of each video, and the pictures."""

    settings: list[Settings]
    pictures: Pictures = Pictures()
    expand_prompt: bool = False
