# SPDX-License-Identifier: Apache-2.0
"""The settings of a training. Defaults are the published LoRA trainer's, where it has them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import SupportsIndex

from ..config import ATTENTIONS

# The linear layers that the published adapters change, in visual and in text blocks. A text block
# has no cross-attention, so four of these names find nothing there.
TARGETS = (
    "self_attention.to_query",
    "self_attention.to_key",
    "self_attention.to_value",
    "self_attention.out_layer",
    "cross_attention.to_query",
    "cross_attention.to_key",
    "cross_attention.to_value",
    "cross_attention.out_layer",
    "feed_forward.in_layer",
    "feed_forward.out_layer",
)
DISTILLATIONS = ("dense", "guidance")
DTYPES = ("bf16", "fp32")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
FRAMES_PER_LATENT = 4  # a latent frame after the first one holds four frames of the clip
PIXELS_PER_TOKEN = 16  # a token covers 16 x 16 pixels: VAE and patches halve the sides four times

_LEAST = {
    "steps": 1,
    "batch": 1,
    "passes": 1,
    "save_every": 1,
    "sample_every": 0,
    "samples": 0,
    "warmup": 0,
    "seed": 0,
}
_CHOICES = {
    "schedule": (SCHEDULES, "constant is usual"),
    "optimizer": (OPTIMIZERS, "adamw is usual"),
    "attention": ((None, *ATTENTIONS), "leave it out for the preset's own"),
    "dtype": ((None, *DTYPES), "leave it out for what suits the device"),
    "distill": ((None, *DISTILLATIONS), "leave it out to fit the data"),
}
_MOST_SEED = 2**63 - 1


def whole(name: str, value: SupportsIndex) -> int:
    """`value` as an int, which scalars of NumPy and of tensors become; TypeError for others."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}; convert it")
    return operator.index(value)


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter, as in arXiv 2106.09685: W x + (alpha / rank) B A x.

    rank: the number of rows of A and columns of B.
    alpha: None stands for `rank`, which makes the factor 1.
    targets: ends of the names of the linear layers that get an adapter.
    trigger: words that are put before every caption in training, and before every prompt by
        whatever loads the adapter.
    """

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    trigger: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "rank", whole("rank", self.rank))
        if self.rank < 1 or not (self.alpha is None or 0 < self.alpha < math.inf):
            raise ValueError(
                "a LoRA must have a rank from 1 on and a positive alpha, "
                f"got {self.rank} and {self.alpha}; 32 is usual"
            )

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training.

    What is trained:

    model: a preset, a local path or a hub repository.
    lora: the adapter to train; None trains all weights.
    attention: "nabla" or "dense"; None is what the checkpoint was trained with.
    distill: fit velocities of the untrained checkpoint instead of the data. "dense" takes those
        under dense attention; "guidance" takes guided ones, so that the result needs one pass of
        the network per sampling step instead of two.

    The data:

    sizes: (height, width) in pixels. A clip is cut to the nearest. None: those of the preset.
    lengths: in frames, 4k + 1. A clip is cut to the longest that it has. None: the preset's.
    drop: the share of captions that are replaced by `null_prompt`, for guidance.
    bad_data: "stop" at a file that cannot be used, or "skip" it.
    cache: a folder for latents and embeddings; None: `training/cache` in the output.

    The optimisation:

    steps: optimiser steps.
    batch, passes: samples of a forward and backward pass, and passes whose gradients make a step.
        Several processes share the passes of a step.
    rate, warmup: the highest learning rate, to which it rises linearly for `warmup` steps.
    schedule: what follows: "constant", or a fall to zero until the last step, "linear" or along
        half a "cosine".
    optimizer: "adamw", or "adamw8bit" with moments in 8 bits by bitsandbytes.
    betas, decay: of AdamW.
    clip: the norm that the gradient of a step is cut to.
    ema: the decay of the moving average of the weights. The average is what is saved; 0 saves the
        weights themselves.
    shift: s of the timesteps t = s u / (1 + (s - 1) u) with u = sigmoid(N(0, 1)). None: 3 for
        pictures, 5 for videos.
    seed: of all random numbers.

    What is written:

    save_every: steps between two saved states.
    sample_every, samples, sample_steps: after how many steps samples are drawn (0: never), for how
        many captions, and in how many sampling steps (None: the preset's).

    How it is computed:

    checkpointing: compute activations again in the backward pass. None: where memory is limited.
    memory_budget: bytes of the device; None: all that are free.
    dtype: "bf16" or "fp32", of activations and of weights that are not trained. None: bf16 on CUDA.
        Trained weights, their gradients and their moments are always fp32.
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
    schedule: str = "constant"
    optimizer: str = "adamw"
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

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_shares()
        self._check_shapes()
        self._check_choices()

    def _check_counts(self) -> None:
        for name, least in _LEAST.items():
            value = whole(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {value}; "
                    f"the default is {getattr(TrainConfig, name)}"
                )
        if self.seed > _MOST_SEED:
            raise ValueError(f"seed must be at most {_MOST_SEED}, got {self.seed}; choose another")
        if self.sample_steps is not None and self.sample_steps < 1:
            raise ValueError(
                f"sample_steps must be at least 1, got {self.sample_steps}; "
                "leave it out for the preset's own"
            )

    def _check_shares(self) -> None:
        if not (0 < self.rate < 1 and 0 <= self.drop <= 1 and 0 <= self.ema < 1):
            raise ValueError(
                "rate must lie between 0 and 1, drop in 0..1 and ema in 0..1 below 1, "
                f"got {self.rate}, {self.drop} and {self.ema}; 1e-4, 0.5 and 0.99 are usual"
            )
        if not (all(0 <= beta < 1 for beta in self.betas) and 0 <= self.decay < 1):
            raise ValueError(
                "betas and decay must lie in 0..1 below 1, "
                f"got {self.betas} and {self.decay}; (0.9, 0.95) and 1e-3 are usual"
            )
        if not (0 < self.clip < math.inf and (self.shift is None or 0 < self.shift < math.inf)):
            raise ValueError(
                "clip and shift must be positive, "
                f"got {self.clip} and {self.shift}; leave them out for the usual ones"
            )

    def _check_shapes(self) -> None:
        for length in self.lengths or ():
            if length < 1 or length % FRAMES_PER_LATENT != 1:
                latents = max(0, round((length - 1) / FRAMES_PER_LATENT))
                raise ValueError(
                    "a length must be 4k + 1 frames, because a latent frame holds four, "
                    f"got {length}; the nearest is {latents * FRAMES_PER_LATENT + 1}"
                )
        for height, width in self.sizes or ():
            if min(height, width) < PIXELS_PER_TOKEN or (height % 16 or width % 16):
                near = [max(1, round(side / 16)) * PIXELS_PER_TOKEN for side in (width, height)]
                raise ValueError(
                    "width and height must be positive multiples of 16, "
                    f"got {width}x{height}; the nearest is {near[0]}x{near[1]}"
                )

    def _check_choices(self) -> None:
        for name, (choices, remedy) in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                names = " or ".join(choice for choice in choices if choice)
                raise ValueError(f"{name} must be {names}, got {value!r}; {remedy}")
        if self.distill == "dense" and self.attention == "dense":
            raise ValueError(
                "distillation fits sparse attention to dense, got dense attention to train; "
                "leave attention out"
            )
