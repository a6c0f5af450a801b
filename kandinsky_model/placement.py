# SPDX-License-Identifier: Apache-2.0
"""Which part of a model is on the device while it works.

Before a run begins, every stage is offered its ways to work, fastest first, each with the bytes
that it needs at its worst moment, and takes the first that fits the budget. While the run lasts,
`PartsOnDevice` brings each part to the device as its stage was told.

Bytes are those of tensors. A GPU's driver keeps some hundred megabytes of its own beside them,
which no program can give back.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .config import PARTS
from .devices.available import free_bytes
from .devices.budget import Placement, Way, Weights, choose_ways, text_ways
from .devices.host import tensors_of
from .devices.offload import LateOffload, Offload
from .dit.accounting import Job, SamplingWay, sampling_ways
from .dit.layout import Chunks
from .vae.accounting import DecodingWay, decoding_ways, picture_ways
from .vae.hunyuan import HunyuanVideoVAE

STAGES = ("text", "pictures", "sampling", "decoding")


@dataclass(frozen=True)
class Work:
    """What a run is to do.

    job: the sampling. policy: how the VAE decodes. stages: those of `STAGES` that are to come.
    pictures: whether the VAE encodes pictures. text_sees, text_writes: whether the text encoder
    reads a picture, and whether it expands prompts.
    """

    job: Job
    policy: str
    stages: Collection[str] = STAGES
    pictures: bool = False
    text_sees: bool = False
    text_writes: bool = False


class Model(Protocol):
    """What `PartsOnDevice` reads of a model: its parts, any of which may be None, and its device.
    They are read anew for every stage, because they may be replaced."""

    text: nn.Module | None
    dit: nn.Module | None
    vae: nn.Module | None
    device: torch.device


class PartsOnDevice:
    """Brings the parts of a model to its device while they work.

    one_at_a_time: whether a part leaves the device after each stage although all would fit.
    """

    def __init__(self, model: Model):
        self.model = model
        self.one_at_a_time = False
        self._hosted: dict[str, Offload | LateOffload] = {}  # parts that live in host memory

    def take_turns(self) -> None:
        """From now on, keep every part on the CPU and move it to the device only while it works."""
        self.one_at_a_time = True
        for part in self._loaded().values():
            part.to("cpu")

    def choose(self, work: Work, budget: int | None) -> Placement | None:
        """How the stages of a run keep within a budget of bytes; None where there is no budget.

        budget: None takes what is free on a GPU, and no limit on a CPU or where parts take turns.
        Stages whose part was not loaded are left out. Raises ValueError or TypeError where a stage
        cannot fit, so that this is known before the first stage begins.
        """
        parts = self._loaded()
        if budget is None and not self.one_at_a_time:
            budget = free_bytes(self.model.device, self._bytes_on_device(parts))
        if budget is None:
            return None
        if hasattr(budget, "__index__") and not isinstance(budget, bool):
            budget = operator.index(budget)  # an integer of numpy
        weights = {name: _weights_of(part, work) for name, part in parts.items()}
        vae = self.model.vae if isinstance(self.model.vae, HunyuanVideoVAE) else None
        ways = ways_to_run(weights, work.job, vae, work.policy, work.pictures)
        return choose_ways(
            {name: ways[name] for name in ways if name in work.stages},
            sum(one.total for one in weights.values()),
            budget,
        )

    @contextmanager
    def working(
        self, name: str, placement: Placement | None, stage: str | None = None
    ) -> Iterator[Any]:
        """The part called `name`, on the device while the body runs. Its class depends on the name.

        With a placement whose parts take turns, it is there alone, and as many of its layers stay
        as the placement chose for `stage`, or none where no stage is named. Otherwise it stays on
        the device afterwards. Raises RuntimeError where the part was not loaded.
        """
        part = getattr(self.model, name)
        if part is None:
            raise RuntimeError(
                f"this requires the model's {name} part, which was not loaded; "
                f"load it with parts={PARTS}"
            )
        if placement is None or placement.together:
            self._hosted.pop(name, None)
            part.to(self.model.device)
            try:
                yield part
            finally:
                if self.one_at_a_time:
                    part.to("cpu")
            return
        self._clear(name)
        if name not in self._hosted:
            offload = LateOffload if hasattr(part, "placing") else Offload
            self._hosted[name] = offload(part, self.model.device)
        resident = placement.stages[stage].resident if stage else 0
        with self._hosted[name].on_device(resident):
            yield part

    def _loaded(self) -> dict[str, nn.Module]:
        parts = {name: getattr(self.model, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def _bytes_on_device(self, parts: Mapping[str, nn.Module]) -> int:
        device = self.model.device.type
        tensors = (tensor for tensor in tensors_of(parts.values()) if tensor.device.type == device)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def _clear(self, name: str) -> None:
        """Move away the other parts that an earlier placement left on the device."""
        if self.model.device.type == "cpu":
            return
        for other, part in self._loaded().items():
            if other != name and other not in self._hosted:
                part.to("cpu")


def _weights_of(part: nn.Module, work: Work) -> Weights:
    """Bytes of a part. A text encoder says itself what it needs for this work."""
    weigh = getattr(part, "weigh", None)
    return Weights.of(part) if weigh is None else weigh(work.text_sees, work.text_writes)


def scheme_bytes(placement: Placement | None, stage: str) -> int | None:
    """What the VAE's streaming scheme may use in the stage "pictures" or "decoding"; None for no
    limit."""
    way = placement.stages[stage] if placement else None
    return way.scheme_bytes if isinstance(way, DecodingWay) else None


def chunks(placement: Placement | None) -> Chunks:
    """How much of a visual block is computed at once while sampling."""
    way = placement.stages["sampling"] if placement else None
    return way.chunks if isinstance(way, SamplingWay) else Chunks()


def ways_to_run(
    weights: Mapping[str, Weights],
    job: Job,
    vae: HunyuanVideoVAE | None,
    policy: str,
    pictures: bool = False,
) -> dict[str, list[Way]]:
    """The ways to run each stage, fastest first, for the stages whose part is there.

    weights: of the parts "text", "dit" and "vae". vae: None for the VAE of the image models.
    """
    grid = job.grid
    latents = (grid.T, 2 * grid.Y, 2 * grid.X)
    ways: dict[str, list[Way]] = {}
    if "text" in weights:
        ways["text"] = list(text_ways(weights["text"]))
    if "vae" in weights and pictures:
        size = (16 * grid.Y, 16 * grid.X)
        ways["pictures"] = list(picture_ways(weights["vae"], vae, size, job.dtype))
    if "dit" in weights:
        ways["sampling"] = list(sampling_ways(job, weights["dit"]))
    if "vae" in weights:
        ways["decoding"] = list(decoding_ways(weights["vae"], vae, latents, job.dtype, policy))
    return ways
