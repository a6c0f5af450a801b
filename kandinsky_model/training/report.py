# SPDX-License-Identifier: Apache-2.0
"""What a training shows of itself: a curve of its losses, and what the weights would make of some
prompts, always from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.locate import Sources
from ..dit.layout import Layout
from ..files import replacing
from ..media import chart
from ..pipeline import Kandinsky5
from ..sampling.result import Video
from ..sampling.sampler import Sampling, noise, sample
from ..sampling.settings import Settings
from .batches import conditioning, given
from .cache import Sample, load

SMOOTHING = 0.05  # of the steps so far that the mean is taken over


def save_curve(losses: Sequence[float], path: Path) -> None:
    """Write a picture of the losses over the steps, each and the mean of those before it, which
    tells where they go.

    The loss of a step depends above all on the times that were drawn for it, so that single ones
    say little. RuntimeError without matplotlib.
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
    """What the weights make of the captions of `samples`, at their sizes, written to `folder`: the
    i-th always from the noise of seed + i.

    steps: of sampling, None: as many as the preset has.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        samples: Sequence[Sample],
        device: torch.device,
        steps: int | None,
        seed: int,
    ):
        self.folder, self.sources, self.samples, self.device, self.seed = (
            folder,
            sources,
            samples,
            device,
            seed,
        )
        self.steps = steps or sources.preset.steps

    @cached_property
    def decoder(self) -> Kandinsky5:
        """The VAE alone; it is on a GPU only while it works."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = Kandinsky5.from_sources(
            replace(self.sources, dit=None, text_encoder=None), self.device, dtype
        )
        if self.device.type != "cpu":
            model.enable_model_cpu_offload()
        return model

    def show(
        self,
        network,
        layout_of: Callable[[tuple[int, int, int]], Layout],
        step: int,
        memory_budget: int | None = None,
    ) -> list[Path]:
        """Sample with `network` as it is after `step` steps, and return the files written. layout_of:
        for latents of T, h, w."""
        self.folder.mkdir(parents=True, exist_ok=True)
        written = []
        for i, one in enumerate(self.samples):
            settings = self._settings(one, self.seed + i)
            latents = self._sampled(network, one, settings, layout_of(one.shape))
            video = Video(
                latents, settings, partial(self.decoder.decode, memory_budget=memory_budget)
            )
            written += video.save(
                self.folder / f"step_{step:06}_{i}{'.mp4' if settings.num_frames > 1 else '.png'}",
                latents=False,
            )
        return written

    def _settings(self, one: Sample, seed: int) -> Settings:
        preset, (T, h, w) = self.sources.preset, one.shape
        return Settings(
            one.caption,
            "",
            seed,
            8 * h,
            8 * w,
            4 * (T - 1) + 1,
            self.steps,
            preset.guidance,
            preset.scheduler_scale,
            "nabla" if preset.nabla else "dense",
            model=self.sources.name,
        )

    def _sampled(self, network, one: Sample, settings: Settings, layout: Layout) -> Tensor:
        """Latents [1, T, h, w, C]."""
        cond, uncond = (
            conditioning([text["embeds"]], [text["pooled"]], self.device)
            for text in (load(one.text), load(one.null))
        )
        tensors, preset = load(one.latents), self.sources.preset
        clean = tensors["latents"][None].float().to(self.device)
        start = noise(settings.seed, clean.shape, self.device)
        sampling = Sampling(self.steps, preset.scheduler_scale, preset.guidance)
        *_, (_, latents) = sample(
            network,
            start,
            cond,
            layout,
            sampling,
            uncond,
            given(clean, [tensors.get("source")], preset.task),
        )
        return latents
