# SPDX-License-Identifier: Apache-2.0
"""Which samples are trained on when, and with which random numbers.

Every random number is a function of the seed and of a count, so a training that is resumed needs
none of them saved. A pass is a few samples of one size and length. The passes of an epoch show
every sample once, in an order that belongs to the epoch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..sampling.given import Given
from ..text.embeddings import Conditioning
from .cache import Sample, load


@dataclass(frozen=True)
class Draws:
    """The distribution of a sample's random numbers.

    shift: s of the timesteps t = s u / (1 + (s - 1) u) with u = sigmoid(N(0, 1)).
    drop: the probability that the caption is replaced by the null prompt.
    nulls: whether a batch also has the embeddings of the null prompt, for guidance.
    """

    seed: int
    shift: float
    drop: float
    nulls: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one size and length, on the device.

    clean, noise: fp32 [B, T, h, w, C], latents and noise.
    times: fp32 [B] in 0..1.
    cond: the embedded captions, or null prompts where they were dropped.
    given: the frames or pictures that the network is shown besides, as in sampling.
    null: the embedded null prompts, where `Draws.nulls` is set.
    """

    clean: Tensor
    noise: Tensor
    times: Tensor
    cond: Conditioning
    given: Given
    null: Conditioning | None = None

    @property
    def noisy(self) -> Tensor:
        """(1 - t) clean + t noise, [B, T, h, w, C]."""
        t = self.times[:, None, None, None, None]  # [B, 1, 1, 1, 1]
        return (1 - t) * self.clean + t * self.noise


class Passes:
    """The endless sequence of passes over `samples`, with at most `batch` of them in each.

    `passes[i]` is a list of pairs (sample, number); no other pair of the sequence has that number.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batch: int,
        seed: int,
    ):
        self.samples = list(samples)
        self.batch = batch
        self.seed = seed
        self.buckets: dict[tuple[int, int, int], list[int]] = {}  # of one size and length each
        for i, sample in enumerate(self.samples):
            self.buckets.setdefault(sample.shape, []).append(i)
        self.length = sum(-(-len(bucket) // batch) for bucket in self.buckets.values())
        self._epoch = -1
        self._order: list[list[int]] = []  # of the passes of that epoch

    def __getitem__(self, index: int) -> list[tuple[Sample, int]]:
        epoch, place = divmod(index, self.length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._shuffled(random.Random(_hashed(self.seed, "order", epoch)))
        first = index * self.batch
        return [(self.samples[i], first + j) for j, i in enumerate(self._order[place])]

    def _shuffled(self, generator: random.Random) -> list[list[int]]:
        """The passes of an epoch, each as indices of samples."""
        passes = []
        for bucket in self.buckets.values():
            order = generator.sample(bucket, len(bucket))
            passes += [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        generator.shuffle(passes)
        return passes


def draw(
    members: Sequence[tuple[Sample, int]],
    draws: Draws,
    task: str,
    device: torch.device,
) -> Batch:
    """Read the samples of a pass and draw their random numbers, which depend on the seed and the
    sample's number alone.

    task: of the preset. For "i2v" the first latent frame of a clip is given, for "i2i" the picture
    before the edit.
    """
    clean = []
    noise = []
    times = []
    texts = []
    sources = []
    for sample, number in members:
        generator = torch.Generator().manual_seed(_hashed(draws.seed, "sample", number))
        dropped = torch.rand((), generator=generator).item() < draws.drop
        u = torch.randn((), generator=generator).sigmoid()
        tensors = load(sample.latents)
        latents = tensors["latents"].float()  # [T, h, w, C]
        clean.append(latents)
        noise.append(torch.randn(latents.shape, generator=generator))
        times.append(draws.shift * u / (1 + (draws.shift - 1) * u))
        texts.append(load(sample.null if dropped else sample.text))
        sources.append(tensors.get("source"))
    latents = torch.stack(clean).to(device)  # [B, T, h, w, C]
    nulls = [load(sample.null) for sample, _ in members] if draws.nulls else []
    return Batch(
        clean=latents,
        noise=torch.stack(noise).to(device),
        times=torch.stack(times).to(device),
        cond=conditioning(texts, device),
        given=given(latents, sources, task),
        null=conditioning(nulls, device) if nulls else None,
    )


def conditioning(texts: Sequence[dict[str, Tensor]], device: torch.device) -> Conditioning:
    """A batch of embedded prompts, each of its own length: `embeds` [L, Dt] and `pooled` [Dp]."""
    embeds = [text["embeds"] for text in texts]
    pooled = [text["pooled"] for text in texts]
    return Conditioning(
        nn.utils.rnn.pad_sequence(embeds, batch_first=True).to(device),  # [B, L, Dt]
        torch.tensor([len(one) for one in embeds]),
        torch.stack(pooled).to(device),  # [B, Dp]
    )


def given(
    clean: Tensor,
    sources: Sequence[Tensor | None],
    task: str,
) -> Given:
    """What the network is shown besides noisy latents `clean` [B, T, h, w, C]: see `draw`."""
    if task == "i2v":
        return Given({0: clean[:, :1]})
    if task == "i2i":
        pictures = cast("Sequence[Tensor]", sources)  # each sample of an edit has one
        return Given(source=torch.stack(list(pictures)).to(clean))
    return Given()


def _hashed(*parts: object) -> int:
    """63 bits, all of which change with any of the parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
