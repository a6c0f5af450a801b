# SPDX-License-Identifier: Apache-2.0
"""The settings of a training. Defaults are the published LoRA trainer's, where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
FRAMES_PER_LATENT = 4  # a latent frame after the first one holds four frames of the clip
PIXELS_PER_TOKEN = 16  # a token covers 16 x 16 pixels: VAE and patches halve the sides four times

_LEAST = {
    "steps": 1,
    "batch": 1,
    "passes": 1,
    "save_every": 1,
    "sample_every": 0,
    "warmup": 0,
}


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
    rate, warmup: the learning rate, which rises linearly for `warmup` steps.
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
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {getattr(self, name)}; "
                    f"the default is {getattr(TrainConfig, name)}"
                )

    def _check_shares(self) -> None:
        if not (0 < self.rate < 1 and 0 <= self.drop <= 1 and 0 <= self.ema < 1):
            raise ValueError(
                "rate must lie between 0 and 1, drop in 0..1 and ema in 0..1 below 1, "
                f"got {self.rate}, {self.drop} and {self.ema}; 1e-4, 0.5 and 0.99 are usual"
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
        if self.attention not in (None, *ATTENTIONS):
            raise ValueError(
                f"attention must be {' or '.join(ATTENTIONS)}, got {self.attention!r}; "
                "leave it out for the preset's own"
            )
        if self.dtype not in (None, *DTYPES):
            raise ValueError(
                f"dtype must be bf16 or fp32, got {self.dtype!r}; "
                "leave it out for what suits the device"
            )
        if self.distill not in (None, *DISTILLATIONS):
            raise ValueError(
                f"distill must be {' or '.join(DISTILLATIONS)}, got {self.distill!r}; "
                "leave it out to fit the data"
            )
        if self.distill == "dense" and self.attention == "dense":
            raise ValueError(
                "distillation fits sparse attention to dense, got dense attention to train; "
                "leave attention out"
            )
