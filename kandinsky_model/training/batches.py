# SPDX-License-Identifier: Apache-2.0
"""What is trained on when: every random number of a training is a function of its seed and of a
count, so nothing of it need be kept.

A pass is a few samples of one size and length. The passes of an epoch show every sample once, in an
order of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sampling.given import Given
from ..text.embeddings import Conditioning
from .cache import Sample, load


@dataclass(frozen=True)
class Draws:
    """How samples are drawn. shift: s of t = s u / (1 + (s - 1) u) with u = sigmoid(N(0, 1)). drop:
    how often a caption is left out.
    nulls: whether what stands for a caption that is left out comes along with each sample."""

    seed: int
    shift: float
    drop: float
    nulls: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one size. clean, noise: [B, T, h, w, C] fp32. times: [B] in 0..1. cond: what each
    is told, a caption or nothing.
    given: what the model is shown besides. null: what stands for a caption that is left out, where
    it was asked for."""

    clean: Tensor
    noise: Tensor
    times: Tensor
    cond: Conditioning
    given: Given
    null: Conditioning | None = None

    @property
    def noisy(self) -> Tensor:
        """(1 - t) clean + t noise."""
        t = self.times[:, None, None, None, None]
        return (1 - t) * self.clean + t * self.noise


class Passes:
    """The endless row of passes over `samples`, `batch` of them at most in each: `passes[i]` are
    pairs of a sample and its number, which no other in the whole row has."""

    def __init__(self, samples: Sequence[Sample], batch: int, seed: int):
        self.samples, self.batch, self.seed = list(samples), batch, seed
        self.buckets: dict[tuple[int, int, int], list[int]] = {}
        for i, sample in enumerate(self.samples):
            self.buckets.setdefault(sample.shape, []).append(i)
        # of an epoch
        self.length = sum(-(-len(bucket) // batch) for bucket in self.buckets.values())
        self._epoch, self._order = -1, []

    def __getitem__(self, index: int) -> list[tuple[Sample, int]]:
        epoch, place = divmod(index, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                self._shuffled(random.Random(_mix(self.seed, "order", epoch))),
            )
        return [(self.samples[i], index * self.batch + j) for j, i in enumerate(self._order[place])]

    def _shuffled(self, generator: random.Random) -> list[list[int]]:
        passes = []
        for bucket in self.buckets.values():
            bucket = generator.sample(bucket, len(bucket))
            passes += [
                bucket[start : start + self.batch] for start in range(0, len(bucket), self.batch)
            ]
        generator.shuffle(passes)
        return passes


def draw(
    members: Sequence[tuple[Sample, int]], how: Draws, task: str, device: torch.device
) -> Batch:
    """A pass with its random numbers, on `device`: those of a sample depend on the seed and its
    number alone.

    For "i2v" a clip's first latent frame is given, for "i2i" the picture before the edit, as
    `Given` says.
    """
    rows = []
    for sample, number in members:
        generator, tensors = (
            torch.Generator().manual_seed(_mix(how.seed, "sample", number)),
            load(sample.latents),
        )
        dropped = torch.rand((), generator=generator).item() < how.drop
        u = torch.randn((), generator=generator).sigmoid()
        clean = tensors["latents"].float()
        text = load(sample.null if dropped else sample.text)
        rows.append(
            (
                clean,
                torch.randn(clean.shape, generator=generator),
                how.shift * u / (1 + (how.shift - 1) * u),
                text["embeds"],
                text["pooled"],
                tensors.get("source"),
            )
        )
    clean, noise, times, embeds, pooled, sources = zip(*rows, strict=True)
    clean, noise, times = (torch.stack(one).to(device) for one in (clean, noise, times))
    nulls = [load(sample.null) for sample, _ in members] if how.nulls else []
    null = (
        conditioning([text["embeds"] for text in nulls], [text["pooled"] for text in nulls], device)
        if nulls
        else None
    )
    return Batch(
        clean, noise, times, conditioning(embeds, pooled, device), given(clean, sources, task), null
    )


def conditioning(
    embeds: Sequence[Tensor], pooled: Sequence[Tensor], device: torch.device
) -> Conditioning:
    """Prompts of different lengths, as one batch."""
    lengths = torch.tensor([len(one) for one in embeds])
    return Conditioning(
        nn.utils.rnn.pad_sequence(list(embeds), batch_first=True).to(device),
        lengths,
        torch.stack(list(pooled)).to(device),
    )


def given(clean: Tensor, sources: Sequence[Tensor | None], task: str) -> Given:
    """What samples with latents `clean` [B, T, h, w, C] are built around."""
    if task == "i2v":
        return Given({0: clean[:, :1]})
    return Given(source=torch.stack(list(sources)).to(clean)) if task == "i2i" else Given()


def _mix(*parts) -> int:
    """A seed of 63 bits that changes altogether with any of the parts."""
    return (
        int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little")
        >> 1
    )
