# SPDX-License-Identifier: Apache-2.0
"""How to train: settings, and nothing else. The defaults are those of the published trainer of
LoRAs where they are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import ATTENTIONS

# What the official adapters change, in text blocks too where they have such a layer.
TARGETS = (
    *(
        f"{kind}_attention.{layer}"
        for kind in ("self", "cross")
        for layer in ("to_query", "to_key", "to_value", "out_layer")
    ),
    "feed_forward.in_layer",
    "feed_forward.out_layer",
)
DISTILLATIONS = ("dense", "guidance")


@dataclass(frozen=True)
class LoRAConfig:
    """rank: r of arXiv 2106.09685. alpha: the adapter counts alpha / r times; None: r. targets: the
    last parts of the names of the layers that get one. trigger: words that call the adapter, put
    before every caption and, by whoever loads it, before every prompt."""

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    trigger: str = ""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or not (self.alpha is None or 0 < self.alpha < math.inf):
            raise ValueError(
                "a LoRA must have a rank from 1 on and a positive alpha, got "
                f"{self.rank} and {self.alpha}; 32 is usual"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """How to train; defaults are those of the published trainer where it is known.

    lora: None trains all weights. sizes: (height, width), None: those of the preset; every clip is
    cut to the nearest. lengths: in frames, None: the preset's; every clip is cut to the longest
    that it has. batch: samples of a pass; passes: of a step, shared by the processes.
    shift, drop: see `train_batches.Draws`; shift None: 3 for pictures, 5 for videos. ema: decay of
    the weights' average, which is what is kept; 0: none. attention: None is the preset's. distill:
    fit velocities of the checkpoint as it was instead of the data: "dense", with dense attention;
    "guidance", with guidance, which the result then needs no second pass for.
    checkpointing: compute blocks again for their gradients; None: where memory is limited. dtype:
    "bf16" or "fp32", of activations and of weights that are not trained; None: bf16 on CUDA. What
    is trained, its gradients and moments are fp32 always.
    """

    model: str = "tiny"
    lora: LoRAConfig | None = LoRAConfig()
    sizes: tuple[tuple[int, int], ...] | None = None
    lengths: tuple[int, ...] | None = None
    steps: int = 1000
    batch: int = 1
    passes: int = 4
    rate: float = 1e-4
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 1e-3
    clip: float = 1.0
    ema: float = 0.99
    shift: float | None = None
    drop: float = 0.5
    null_prompt: str = ""
    attention: str | None = None
    distill: str | None = None
    checkpointing: bool | None = None
    seed: int = 0
    save_every: int = 100
    sample_every: int = 0
    samples: int = 2
    sample_steps: int | None = None
    bad_data: str = "stop"
    cache: str | None = None
    memory_budget: int | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("passes", 1),
            ("save_every", 1),
            ("sample_every", 0),
            ("warmup", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {getattr(self, name)}; "
                    f"the default is {getattr(TrainConfig, name)}"
                )
        if not (0 < self.rate < 1 and 0 <= self.drop <= 1 and 0 <= self.ema < 1):
            raise ValueError(
                "rate must lie between 0 and 1, drop in 0..1 and ema in 0..1 below "
                f"1, got {self.rate}, {self.drop} and "
                f"{self.ema}; 1e-4, 0.5 and 0.99 are usual"
            )
        for length in self.lengths or ():
            if length < 1 or length % 4 != 1:
                raise ValueError(
                    "a length must be 4k + 1 frames, because a latent frame holds "
                    f"four, got {length}; the nearest is "
                    f"{max(0, round((length - 1) / 4)) * 4 + 1}"
                )
        for size in self.sizes or ():
            if min(size) < 16 or size[0] % 16 or size[1] % 16:
                raise ValueError(
                    "width and height must be positive multiples of 16, got "
                    f"{size[1]}x{size[0]}; the nearest is "
                    f"{max(16, round(size[1] / 16) * 16)}x{max(16, round(size[0] / 16) * 16)}"
                )
        if self.attention not in (None, *ATTENTIONS):
            raise ValueError(
                f"attention must be {' or '.join(ATTENTIONS)}, got "
                f"{self.attention!r}; leave it out for the preset's own"
            )
        if self.dtype not in (None, "bf16", "fp32"):
            raise ValueError(
                f"dtype must be bf16 or fp32, got {self.dtype!r}; leave it out for "
                "what suits the device"
            )
        if self.distill not in (None, *DISTILLATIONS):
            raise ValueError(
                f"distill must be {' or '.join(DISTILLATIONS)}, got "
                f"{self.distill!r}; leave it out to fit the data"
            )
        if self.distill == "dense" and self.attention == "dense":
            raise ValueError(
                "distillation fits sparse attention to dense, got dense attention to "
                "train; leave attention out"
            )
