# SPDX-License-Identifier: Apache-2.0
"""One video and all that it is made from: its settings, checked; its latents, kept; its frames,
decoded when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.headers import read_headers
from ..files import replacing
from ..media import video as files
from .settings import Settings

METADATA_KEY = "kandinsky"

Notify = Callable[[str], None]


class Video:
    """One finished sample. Its latents exist at once; its frames are decoded when first asked for.

    `latents`: fp32 [1, T, H/8, W/8, 16], scaled as the transformer sees them. `seed` alone, given
    back to `generate`, repeats it.
    """

    def __init__(
        self, latents: Tensor, settings: Settings, decode: Callable[..., Iterator[Tensor]]
    ):
        self.latents, self.settings, self._decode, self._frames = latents, settings, decode, None

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def frames(self) -> Tensor:
        """uint8 [F, H, W, 3] on the CPU."""
        for _ in self.decode() if self._frames is None else ():
            pass
        return self._frames

    def decode(self, notify: Notify | None = None) -> Iterator[Tensor]:
        """The frames in pieces, uint8 [f, H, W, 3] on the CPU, each as soon as it is decoded; once
        complete, they stay in `frames`.

        notify is told, in one line each, how decoding goes about it.
        """
        if self._frames is not None:
            yield self._frames
            return
        pieces = []
        for piece in self._decode(self.latents, self.settings, notify=notify):
            pieces.append(piece)
            yield piece
        self._frames = torch.cat(pieces)

    def save_latents(self, path: str | Path) -> Path:
        """Write latents and settings as safetensors; `kandinsky decode` and `Kandinsky5.open` read
        them."""
        path = files.check_output(path, (".safetensors",))
        # One key: safetensors writes several in an order that changes from file to file.
        metadata = {METADATA_KEY: self.settings.to_json()}
        with replacing(path) as target:
            save_file({"latents": self.latents.cpu().contiguous()}, target, metadata)
        return path

    def save(
        self, path: str | Path, latents: bool = True, notify: Notify | None = None
    ) -> list[Path]:
        """Write the frames as mp4, gif or png by extension, and return the files written; an mp4
        grows while frames are decoded.

        The latents go first, to `<stem>.latents.safetensors` beside it, so that no failure in
        decoding or encoding can lose them.
        """
        path = files.check_output(path)
        if latents:
            self.save_latents(latents_path(path))
        return files.save(self.decode(notify), path, self.settings.fps, self.settings.to_json())


def latents_path(output: str | Path) -> Path:
    """Where the latents of `output` are kept: out.mp4 -> out.latents.safetensors."""
    output = Path(output)
    return output.with_name(f"{output.stem}.latents.safetensors")


def load_latents(path: str | Path) -> tuple[Tensor, Settings]:
    """Latents fp32 [1, T, h, w, C] and settings from a file of `Video.save_latents`; ValueError or
    OSError for any other file."""
    read_headers([Path(path)])
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get(METADATA_KEY)
        if stored is None or "latents" not in file.keys():  # noqa: SIM118 - not a mapping
            raise ValueError(
                f"{path} must hold latents saved by kandinsky, but it has no such "
                "tensor or settings; choose another file"
            )
        return file.get_tensor("latents"), Settings(**json.loads(stored))
