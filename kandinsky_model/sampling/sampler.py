# SPDX-License-Identifier: Apache-2.0
"""Flow matching, sampled: noise, the time schedule, Euler steps with guidance, and conditioning on
pictures.

A latent at time t is (1 - t) * clean + t * noise; the network predicts the velocity noise - clean;
sampling walks t from 1 to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dit.layout import Layout
from ..dit.transformer import DiffusionTransformer3D
from ..text.embeddings import Conditioning
from .given import Given, check_given, finish, model_input, with_frames
from .step_cache import FirstBlockCache, MagCache

TIME_UNIT = 1000.0  # the network is told 1000 t
NO_GUIDANCE = 1e-6  # a guidance this close to 1 needs no unconditional pass
PRECISIONS = {"fp32": torch.float32, "reference": torch.bfloat16}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How to sample. precision "fp32" keeps latents, velocity and guidance in fp32; "reference"
    rounds each of them to bf16.

    The official code does the latter, which loses early updates smaller than half a bf16 step:
    choose it for comparisons only.
    start: steps that an interrupted run has done already; what it got to takes the place of the
    noise.
    """

    steps: int = 50
    scheduler_scale: float = 5.0
    guidance: float = 5.0
    precision: str = "fp32"
    cache: MagCache | FirstBlockCache | None = None  # see caching.py
    start: int = 0

    def __post_init__(self):
        if not 0 <= self.start <= self.steps:
            raise ValueError(
                f"a run of {self.steps} steps can go on after 0 to {self.steps} of "
                f"them, got {self.start}; begin it anew"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got "
                f"{self.precision!r}; fp32 is the usual choice"
            )

    @property
    def guided(self) -> bool:
        return abs(self.guidance - 1.0) > NO_GUIDANCE


def schedule(steps: int, scale: float) -> Tensor:
    """fp32 [steps + 1]: times t_i = scale * u_i / (1 + (scale - 1) * u_i) for u_i = 1 - i / steps,
    from 1 (noise) to 0 (clean).

    scale > 1 spends more of the steps near the noise. Raises ValueError unless steps >= 1 and scale
    > 0.
    """
    if steps < 1:
        raise ValueError(
            f"steps must be at least 1, got {steps}; 50 is usual, 16 for distilled checkpoints"
        )
    if scale <= 0:
        raise ValueError(
            f"the scheduler scale must be positive, got {scale}; 1 spaces the steps evenly"
        )
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    return scale * u / (1 + (scale - 1) * u)


def noise(seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal fp32 noise. Always drawn on the CPU and then moved, so that a seed means the
    same video on every device.

    The official code draws bf16 on the GPU; the same seed gives another video there.
    """
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    ).to(device)


@torch.no_grad()
def sample(
    dit: DiffusionTransformer3D,
    initial: Tensor,
    cond: Conditioning,
    layout: Layout,
    sampling: Sampling,
    uncond: Conditioning | None = None,
    given: Given | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Walk from noise to a clean latent video, yielding (step index, latents) after each Euler
    step; the last are the result.

    initial: noise [B, T, 2Y, 2X, C] (see `noise`) on the model's device. Latents are yielded in the
    dtype of the precision and are not reused, so a caller may keep them. With guidance w other than
    1 the velocity is v_u + w * (v_c - v_u), from two passes one after the other, and `uncond` is
    required; its text may have another length than `cond`'s. given: see `Given`; a given first
    frame is followed by `normalize_first_frame`. Raises ValueError on inputs that do not fit,
    RuntimeError when latents stop being finite, naming the step.
    """
    given = given or Given()
    _check(dit, initial, sampling, uncond, given)
    times = schedule(sampling.steps, sampling.scheduler_scale)
    x = initial.to(PRECISIONS[sampling.precision])
    every_time = (times[:-1] * TIME_UNIT)[:, None].expand(-1, x.shape[0]).to(x.device)  # [steps, B]
    texts = [cond, uncond] if sampling.guided else [cond]
    branches = (
        sampling.cache.branches(dit, sampling.steps, len(texts), sampling.start)
        if sampling.cache
        else [dit] * len(texts)
    )
    passes = [
        (branch, text, dit.modulate(every_time, text.pooled))
        for branch, text in zip(branches, texts, strict=True)
    ]
    for step in range(sampling.start, sampling.steps):
        x = with_frames(x, given.frames)
        velocity = _velocity(
            passes,
            x,
            model_input(dit, x, given),
            (step, every_time[step]),
            layout,
            sampling.guidance,
        )
        x = x + (times[step + 1] - times[step]).to(x.device) * velocity
        del velocity
        if step == sampling.steps - 1:
            x = finish(x, given.frames)
        if not torch.isfinite(x).all():
            raise RuntimeError(
                f"latents must stay finite, but step {step + 1} of "
                f"{sampling.steps} produced NaN or Inf; "
                "check the weights, or try another dtype"
            )
        yield step, x
    if sampling.cache:
        computed, skipped = (
            sum(getattr(branch, name) for branch in branches) for name in ("computed", "skipped")
        )
        _log.info(
            "%d of %d passes were computed, %d reused an earlier one",
            computed,
            computed + skipped,
            skipped,
        )


def _velocity(
    passes: list[tuple],
    x: Tensor,
    read: Tensor,
    time: tuple[int, Tensor],
    layout: Layout,
    guidance: float,
) -> Tensor:
    """Of x at this time, with guidance where there are two passes: (network, text, modulations)
    with the prompt, and without."""
    step, now = time
    shared = (
        len(passes) == 2
        and layout is not None
        and layout.ranks is not None
        and layout.ranks.passes == 2
    )
    velocities = [
        branch(
            read, text.embeds, text.pooled, now, layout, text.lengths, modulations.step(step)
        ).to(x.dtype)
        for branch, text, modulations in (passes[layout.ranks.index :][:1] if shared else passes)
    ]
    if shared:
        velocities = layout.ranks.both(*velocities)
    velocity, *other = velocities
    return other[0] + guidance * (velocity - other[0]) if other else velocity


def _check(
    dit: DiffusionTransformer3D,
    initial: Tensor,
    sampling: Sampling,
    uncond: Conditioning | None,
    given: Given,
) -> None:
    config = dit.config
    if initial.dim() != 5 or initial.shape[-1] != config.in_visual_dim:
        raise ValueError(
            f"the noise must have shape [B, T, h, w, {config.in_visual_dim}], got "
            f"{list(initial.shape)}; "
            "channels come last"
        )
    if sampling.guided and uncond is None:
        raise ValueError(
            f"guidance {sampling.guidance} requires an unconditional (negative) "
            "prompt, got none; "
            "pass uncond or set guidance to 1"
        )
    if (given.frames or given.source is not None) and config.in_channels == config.in_visual_dim:
        raise ValueError(
            "given frames and pictures require a model with conditioning channels, "
            "got one without; use an image-to-video or "
            "image editing checkpoint"
        )
    frames = initial.shape[1]
    for index, frame in given.frames.items():
        if not 0 <= index < frames:
            raise ValueError(
                f"a given frame must be one of the {frames} latent frames, got "
                f"number {index}; count from 0"
            )
        check_given(f"given frame {index}", frame, [initial.shape[0], 1, *initial.shape[2:]])
    if given.source is not None:
        check_given("the picture to edit", given.source, list(initial.shape))
