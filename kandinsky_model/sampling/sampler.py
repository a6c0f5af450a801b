# SPDX-License-Identifier: Apache-2.0
"""Flow matching, sampled: the schedule of times, the noise, Euler steps, and guidance.

A latent at time t is (1 - t) * clean + t * noise, and the network predicts the velocity
noise - clean. Sampling walks t from 1 down to 0, against the velocity.

Shapes: B samples of T latent frames with h x w latent pixels and C channels, channels last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dit.layout import Layout
from ..dit.modulation import ModulationTable
from ..dit.transformer import DiffusionTransformer3D
from ..text.embeddings import Conditioning
from .given import Given, check_given, finish, model_input, with_frames
from .step_cache import Branch, StepCache, log_counts

TIME_UNIT = 1000.0  # the network reads 1000 t
NO_GUIDANCE = 1e-6  # a guidance scale this close to 1 needs no unconditional pass
PRECISIONS = {"fp32": torch.float32, "reference": torch.bfloat16}


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    steps: Euler steps. scheduler_scale: see `schedule`. guidance: the guidance scale, 1 for none.
    precision: "fp32" keeps latents, velocity and guidance in fp32; "reference" rounds each of them
    to bf16, as the official code does. That loses early updates which are smaller than half a bf16
    step, so it is for comparisons only.
    cache: reuses what the blocks did at earlier steps; None computes every step.
    start: steps that an interrupted run has already done. Its latents then take the noise's place.
    """

    steps: int = 50
    scheduler_scale: float = 5.0
    guidance: float = 5.0
    precision: str = "fp32"
    cache: StepCache | None = None
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and velocities."""
        return PRECISIONS[self.precision]


def schedule(steps: int, scale: float) -> Tensor:
    """The times t_i = scale * u_i / (1 + (scale - 1) * u_i) for u_i = 1 - i / steps.

    fp32 [steps + 1], from 1 (noise) to 0 (clean). A scale above 1 spends more of the steps near
    the noise. Raises ValueError unless steps >= 1 and scale > 0.
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
    """Standard normal fp32 noise.

    It is always drawn on the CPU and then moved, so that a seed gives the same noise for every
    device. The official code draws bf16 noise on the GPU, where the same seed gives another video.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


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
    """Walk from noise to clean latents.

    Yields (number of the step, latents [B, T, h, w, C]) after each Euler step; the last latents are
    the result. They have the dtype of `sampling.precision`, and a caller may keep them.

    initial: noise [B, T, h, w, C] on the network's device, see `noise`.
    cond, uncond: the embedded prompts and negative prompts, of any lengths. `uncond` is required
    with guidance.
    layout: of the latents' size, see `make_layout`.
    given: latents that are known beforehand. A given first frame is normalised after the last step.

    Raises ValueError for inputs that do not fit, and RuntimeError, with the number of the step,
    when latents stop being finite.
    """
    given = given or Given()
    _check(dit, initial, sampling, uncond, given)
    times = schedule(sampling.steps, sampling.scheduler_scale)
    x = initial.to(sampling.dtype)
    network_times = TIME_UNIT * times[:-1, None].expand(-1, len(x)).to(x.device)  # [steps, B]
    texts = [cond]
    if sampling.guided and uncond is not None:
        texts.append(uncond)
    networks: Sequence[DiffusionTransformer3D | Branch] = [dit] * len(texts)
    branches: list[Branch] = []
    if sampling.cache:
        branches = sampling.cache.branches(dit, sampling.steps, len(texts), sampling.start)
        networks = branches
    passes = [
        Pass(network, text, dit.modulate(network_times, text.pooled))
        for network, text in zip(networks, texts, strict=True)
    ]
    for step in range(sampling.start, sampling.steps):
        x = with_frames(x, given.frames)
        moment = Moment(step, network_times[step])
        velocity = _velocity(passes, model_input(dit, x, given), moment, layout, sampling)
        x = x + (times[step + 1] - times[step]).to(x.device) * velocity
        del velocity  # not needed during the next step, where memory is tightest
        if step == sampling.steps - 1:
            x = finish(x, given.frames)
        if not torch.isfinite(x).all():
            raise RuntimeError(
                f"latents must stay finite, but step {step + 1} of {sampling.steps} produced "
                "NaN or Inf; check the weights, or try another dtype"
            )
        yield step, x
    if sampling.cache:
        log_counts(branches)


@dataclass(frozen=True, eq=False)
class Moment:
    """The beginning of one step. time: fp32 [B], 1000 t, as the network reads it."""

    step: int
    time: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """One of the two passes of a guided step, with the prompt or with the negative prompt.

    network: the transformer, or the branch of a step cache that stands in for it.
    modulations: of all steps, computed once.
    """

    network: DiffusionTransformer3D | Branch
    text: Conditioning
    modulations: ModulationTable

    def velocity(self, read: Tensor, moment: Moment, layout: Layout) -> Tensor:
        """[B, T, h, w, C] for the network's input `read` [B, T, h, w, in_channels]."""
        text = self.text
        modulations = self.modulations.step(moment.step)
        return self.network(
            read, text.embeds, text.pooled, moment.time, layout, text.lengths, modulations
        )


def _velocity(
    passes: list[Pass], read: Tensor, moment: Moment, layout: Layout, sampling: Sampling
) -> Tensor:
    """The velocity [B, T, h, w, C], with guidance where there are two passes.

    Guidance w takes v_uncond + w * (v_cond - v_uncond) (arXiv 2207.12598). The passes run one after
    the other, or at once where processes share the run and each does one of them.
    """
    ranks = layout.ranks if layout is not None else None
    if len(passes) == 2 and ranks is not None and ranks.passes == 2:
        own = passes[ranks.index].velocity(read, moment, layout)
        velocities = ranks.both(own.to(sampling.dtype))
    else:
        velocities = [one.velocity(read, moment, layout).to(sampling.dtype) for one in passes]
    if len(velocities) == 1:
        return velocities[0]
    conditional, unconditional = velocities
    return unconditional + sampling.guidance * (conditional - unconditional)


def _check(
    dit: DiffusionTransformer3D,
    initial: Tensor,
    sampling: Sampling,
    uncond: Conditioning | None,
    given: Given,
) -> None:
    config = dit.config
    channels = config.in_visual_dim
    if initial.dim() != 5 or initial.shape[-1] != channels:
        raise ValueError(
            f"the noise must have shape [B, T, h, w, {channels}], got {list(initial.shape)}; "
            "channels come last"
        )
    if sampling.guided and uncond is None:
        raise ValueError(
            f"guidance {sampling.guidance} requires an unconditional (negative) prompt, got none; "
            "pass uncond or set guidance to 1"
        )
    if given and config.in_channels == channels:
        raise ValueError(
            "given frames and pictures require a model with conditioning channels, got one "
            "without; use an image-to-video or image editing checkpoint"
        )
    check_given(given, initial.shape)
