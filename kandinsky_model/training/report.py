# SPDX-License-Identifier: Apache-2.0
"""What a training shows of itself: a curve of its losses, and samples of some captions, always from
the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..checkpoints.locate import Sources
from ..dit.layout import Layout
from ..dit.transformer import DiffusionTransformer3D
from ..files import replacing
from ..media import chart
from ..pipeline import Kandinsky5
from ..sampling.result import Video
from ..sampling.sampler import Sampling, noise, sample
from ..sampling.settings import Settings
from .batches import conditioning, given
from .cache import VAE_STRIDE, Sample, load
from .config import FRAMES_PER_LATENT, TrainConfig
from .network import TrainNetwork

SMOOTHING = 0.05  # the mean of the curve is taken over this share of the steps


def save_curve(losses: Sequence[float], path: Path) -> None:
    """Write a picture of the losses: each step's, and the mean over some steps before it.

    The loss of a step depends above all on the timesteps that were drawn for it, so that only the
    mean shows where the losses go. RuntimeError without matplotlib.
    """
    reach = max(1, round(SMOOTHING * len(losses)))
    sums = list(accumulate(losses, initial=0.0))
    steps = range(1, len(sums))
    means = [(sums[i] - sums[max(0, i - reach)]) / min(i, reach) for i in steps]
    figure = chart.figure()
    axes = figure.subplots()
    chart.describe(axes, f"Loss, and its mean over {reach} steps", "step", "loss")
    axes.plot(steps, losses, ".", color="0.75", label="each")
    axes.plot(steps, means, label="mean")
    axes.legend(frameon=False)
    with replacing(path) as target:
        figure.savefig(target)


class Gallery:
    """Samples of the captions of `samples` at their sizes, written to `folder`. Number i always
    begins from the noise of seed + i."""

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        samples: Sequence[Sample],
        device: torch.device,
        config: TrainConfig,
    ):
        self.folder = folder
        self.sources = sources
        self.samples = samples
        self.device = device
        self.seed = config.seed
        self.steps = config.sample_steps or sources.preset.steps

    @cached_property
    def decoder(self) -> Kandinsky5:
        """The VAE alone. It is on a GPU only while it works."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        sources = replace(self.sources, dit=None, text_encoder=None)
        model = Kandinsky5.from_sources(sources, self.device, dtype)
        if self.device.type != "cpu":
            model.enable_model_cpu_offload()
        return model

    def show(
        self,
        network: TrainNetwork,
        layout_of: Callable[[tuple[int, int, int]], Layout],
        step: int,
        memory_budget: int | None = None,
    ) -> list[Path]:
        """Sample with `network` as it is after `step` steps, and return the files written.

        layout_of: gives the layout for latents of (T, h, w). memory_budget: of decoding.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        decode = partial(self.decoder.decode, memory_budget=memory_budget)
        written = []
        for i, (one, path) in enumerate(zip(self.samples, self.paths(step), strict=True)):
            settings = self._settings(one, self.seed + i)
            latents = self._sampled(network, one, settings, layout_of(one.shape))
            written += Video(latents, settings, decode).save(path, latents=False)
        return written

    def paths(self, step: int) -> list[Path]:
        """The files of the samples after `step` steps."""
        return [
            self.folder / f"step_{step:06}_{i}{'.mp4' if one.shape[0] > 1 else '.png'}"
            for i, one in enumerate(self.samples)
        ]

    def _settings(self, one: Sample, seed: int) -> Settings:
        preset = self.sources.preset
        T, h, w = one.shape
        return Settings(
            prompt=one.caption,
            negative_prompt="",
            seed=seed,
            height=VAE_STRIDE * h,
            width=VAE_STRIDE * w,
            num_frames=FRAMES_PER_LATENT * (T - 1) + 1,
            num_inference_steps=self.steps,
            guidance_scale=preset.guidance,
            scheduler_scale=preset.scheduler_scale,
            attention="nabla" if preset.nabla else "dense",
            model=self.sources.name,
        )

    def _sampled(
        self,
        network: TrainNetwork,
        one: Sample,
        settings: Settings,
        layout: Layout,
    ) -> Tensor:
        """Latents [1, T, h, w, C]."""
        preset = self.sources.preset
        cond, uncond = (conditioning([load(path)], self.device) for path in (one.text, one.null))
        tensors = load(one.latents)
        clean = tensors["latents"][None].float().to(self.device)  # [1, T, h, w, C]
        start = noise(settings.seed, clean.shape, self.device)
        sampling = Sampling(self.steps, preset.scheduler_scale, preset.guidance)
        shown = given(clean, [tensors.get("source")], preset.task)
        *_, (_, latents) = sample(
            cast(DiffusionTransformer3D, network),  # it is called like one
            start,
            cond,
            layout,
            sampling,
            uncond,
            shown,
        )
        return latents
