# SPDX-License-Identifier: Apache-2.0
"""Training: a LoRA, or all weights of a checkpoint, fitted to a folder of clips or pictures.

    from kandinsky_model.training import LoRAConfig, TrainConfig, train

    config = TrainConfig(model="t2v-lite-sft-5s", lora=LoRAConfig(rank=32, trigger="zxwalk"))
    train("clips", "walk", config)               # writes walk/lora.safetensors, among others
    train("clips", "walk", config, resume=True)  # goes on after an interruption

The names are imported when they are first used, so that importing this module costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import LoRAConfig, TrainConfig
    from .trainer import Trainer, train

_HOMES = {
    "LoRAConfig": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "train": "trainer",
}
__all__ = ["LoRAConfig", "TrainConfig", "Trainer", "train"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
