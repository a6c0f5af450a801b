# SPDX-License-Identifier: Apache-2.0
"""One sampling run as data: all that the transformer is about to read. It can be stopped, kept in a
file, and gone on with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoints.headers import read_headers
from ..files import replacing
from ..media import video as files
from ..text.embeddings import Conditioning
from .given import Given
from .settings import Settings

ABOUT = "kandinsky_run"  # the tensor of bytes that hold settings and step as JSON


@dataclass(frozen=True, eq=False)
class Run:
    """settings: of each video. latents: [B, T, h, w, C], noise, or what `step` steps have made of
    it. cond, uncond: the embedded prompts, `uncond` None without guidance. given: the latents of
    pictures, encoded."""

    settings: list[Settings]
    latents: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    given: Given
    step: int = 0

    def to(self, device: torch.device) -> Run:
        """The same with every tensor that the transformer reads on `device`; lengths stay on the
        CPU."""

        def place(one: Conditioning | None) -> Conditioning | None:
            return (
                None
                if one is None
                else Conditioning(one.embeds.to(device), one.lengths, one.pooled.to(device))
            )

        frames = {index: frame.to(device) for index, frame in self.given.frames.items()}
        source = None if self.given.source is None else self.given.source.to(device)
        return Run(
            self.settings,
            self.latents.to(device),
            place(self.cond),
            place(self.uncond),
            Given(frames, source),
            self.step,
        )

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors, whole or not at all. Raises what `video.check_output` raises."""
        path = files.check_output(path, (".safetensors",))
        with replacing(path) as target:
            target.write_bytes(self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """As `save` writes it."""
        about = json.dumps({"step": self.step, "settings": [asdict(one) for one in self.settings]})
        tensors = {
            "latents": self.latents,
            ABOUT: torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8),
        }
        for name, one in (("cond", self.cond), ("uncond", self.uncond)):
            tensors |= (
                {} if one is None else {f"{name}.embeds": one.embeds, f"{name}.pooled": one.pooled}
            )
            tensors |= (
                {} if one is None or one.lengths is None else {f"{name}.lengths": one.lengths}
            )
        tensors |= {f"frame.{index}": frame for index, frame in self.given.frames.items()}
        tensors |= {} if self.given.source is None else {"source": self.given.source}
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """What `save` wrote; ValueError or OSError for any other file."""
        if ABOUT not in read_headers([Path(path)]):
            raise ValueError(
                f"{path} must hold an interrupted run, but it has no such settings; "
                "choose another file"
            )
        return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Run:
        """What `to_bytes` gave."""
        # copied, because libraries round differently by where in a line of the cache a tensor
        # begins
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        about = json.loads(tensors[ABOUT].numpy().tobytes())
        cond, uncond = (
            Conditioning(
                tensors[f"{name}.embeds"], tensors.get(f"{name}.lengths"), tensors[f"{name}.pooled"]
            )
            if f"{name}.embeds" in tensors
            else None
            for name in ("cond", "uncond")
        )
        frames = {
            int(name.partition(".")[2]): tensor
            for name, tensor in tensors.items()
            if name.startswith("frame.")
        }
        return cls(
            [Settings(**one) for one in about["settings"]],
            tensors["latents"],
            cond,
            uncond,
            Given(frames, tensors.get("source")),
            about["step"],
        )


class Interrupted(KeyboardInterrupt):
    """Sampling was stopped by the keyboard; `run` is what to go on with."""

    def __init__(self, run: Run):
        super().__init__(f"after {run.step} of {run.settings[0].num_inference_steps} steps")
        self.run = run
