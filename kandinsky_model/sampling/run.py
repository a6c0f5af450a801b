# SPDX-License-Identifier: Apache-2.0
"""One sampling run as data: all that the transformer reads. A run can be stopped, kept in a file,
and resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoints.headers import read_headers
from ..files import replacing
from ..media.video import check_output
from ..text.embeddings import Conditioning
from .given import Given
from .settings import Settings

ABOUT = "kandinsky_run"  # the tensor of bytes that holds settings and step as JSON
FRAME_PREFIX = "frame."  # of the tensors that hold given frames


@dataclass(frozen=True, eq=False)
class Run:
    """A batch of B videos on its way.

    settings: of each video. latents: [B, T, h, w, C], noise, or what `step` steps have made of it.
    cond, uncond: the embedded prompts and negative prompts; `uncond` is None without guidance.
    given: the latents of pictures.
    """

    settings: list[Settings]
    latents: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    given: Given
    step: int = 0

    def to(self, device: torch.device) -> Run:
        """The same run with every tensor that the transformer reads on `device`."""
        return Run(
            self.settings,
            self.latents.to(device),
            self.cond.to(device),
            None if self.uncond is None else self.uncond.to(device),
            self.given.to(device),
            self.step,
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all. Raises what `check_output` raises."""
        path = check_output(path, (".safetensors",))
        with replacing(path) as target:
            target.write_bytes(self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        about = json.dumps({"step": self.step, "settings": [asdict(one) for one in self.settings]})
        tensors = {
            "latents": self.latents,
            ABOUT: torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8),
        }
        for name, text in (("cond", self.cond), ("uncond", self.uncond)):
            if text is not None:
                tensors[f"{name}.embeds"] = text.embeds
                tensors[f"{name}.pooled"] = text.pooled
                if text.lengths is not None:
                    tensors[f"{name}.lengths"] = text.lengths
        for index, frame in self.given.frames.items():
            tensors[f"{FRAME_PREFIX}{index}"] = frame
        if self.given.source is not None:
            tensors["source"] = self.given.source
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what `save` wrote. Raises ValueError or OSError for any other file."""
        if ABOUT not in read_headers([Path(path)]):
            raise ValueError(
                f"{path} must hold an interrupted run, but it has no such settings; "
                "choose another file"
            )
        return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Run:
        """The run of which `to_bytes` gave these bytes."""
        # Cloned, because products round differently by where in a cache line a tensor begins.
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        about = json.loads(tensors[ABOUT].numpy().tobytes())
        frames = {
            int(name.removeprefix(FRAME_PREFIX)): tensor
            for name, tensor in tensors.items()
            if name.startswith(FRAME_PREFIX)
        }
        return cls(
            [Settings(**one) for one in about["settings"]],
            tensors["latents"],
            _conditioning(tensors, "cond"),
            _conditioning(tensors, "uncond") if "uncond.embeds" in tensors else None,
            Given(frames, tensors.get("source")),
            about["step"],
        )


def _conditioning(tensors: dict[str, Tensor], name: str) -> Conditioning:
    lengths = tensors.get(f"{name}.lengths")
    return Conditioning(tensors[f"{name}.embeds"], lengths, tensors[f"{name}.pooled"])


class Interrupted(KeyboardInterrupt):
    """Sampling was stopped by the keyboard. run: what `Kandinsky5.resume` goes on with."""

    def __init__(self, run: Run):
        super().__init__(f"after {run.step} of {run.settings[0].num_inference_steps} steps")
        self.run = run
