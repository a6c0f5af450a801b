# SPDX-License-Identifier: Apache-2.0
"""The optimisers of a training, and the learning rate over its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import TrainConfig

# The tensors that each optimiser keeps for a parameter, by its own names. Those of 8 bits come with
# the scale of each 256 of them and with the table of the 256 values.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw8bit": ("state1", "state2"),
}
SCALES = ("absmax1", "absmax2", "qmap1", "qmap2")
SMALLEST_8BIT = 4096  # numbers of a parameter, from which bitsandbytes keeps its moments in 8 bits
SCALED_TOGETHER = 256  # moments of 8 bits that share a scale


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW over fp32 parameters. RuntimeError where 8 bits are asked for without bitsandbytes."""
    parameters = list(parameters)
    options: dict[str, Any] = {
        "lr": config.rate,
        "betas": config.betas,
        "weight_decay": config.decay,
    }
    if config.optimizer == "adamw8bit":
        return _bitsandbytes().optim.AdamW8bit(parameters, **options)
    # the fused optimiser needs no memory for intermediate results
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, **options, fused=fused)


def check_optimizer(config: TrainConfig) -> None:
    """RuntimeError where the optimiser of `config` cannot be had; run it before any long work."""
    if config.optimizer == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes():
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError(
            "an optimizer with moments in 8 bits requires bitsandbytes, which cannot be imported "
            f"({error}); pip install 'kandinsky-kernels[train]', or choose adamw"
        ) from error
    return bitsandbytes


def moment_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Bytes that an optimiser keeps for parameters of so many numbers each."""
    total = 0
    for size in sizes:
        if optimizer == "adamw8bit" and size >= SMALLEST_8BIT:
            total += size + 4 * math.ceil(size / SCALED_TOGETHER)
        else:
            total += 4 * size
    return 2 * total


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly during `config.warmup` steps. Then it stays ("constant"), or falls to zero at
    the end of the last of `config.steps`, along a line or half a cosine.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    progress = min(1.0, max(0.0, progress))
    left = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return config.rate * warm * left[config.schedule]
