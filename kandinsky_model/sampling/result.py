# SPDX-License-Identifier: Apache-2.0
"""A finished video: its settings, its latents, and its frames, which are decoded when first asked
for."""

from __future__ import annotations

import base64
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.headers import opened, read_headers
from ..config import PRESETS
from ..files import replacing
from ..media import video
from .settings import Settings, check_latents

if TYPE_CHECKING:
    from PIL import Image

METADATA_KEY = "kandinsky"  # of the settings in a file of latents

Notify = Callable[[str], None]
_log = logging.getLogger(__name__)


class Video:
    """One finished sample. Its latents exist at once; its frames are decoded when first asked for.

    latents: fp32 [1, T, h, w, C] with h = height / 8, w = width / 8, scaled as the transformer
    reads them. settings: what it was made from. From the same settings `Kandinsky5.generate` makes
    it again, to the bit in the same circumstances, which its docstring names.
    """

    def __init__(
        self, latents: Tensor, settings: Settings, decode: Callable[..., Iterator[Tensor]]
    ):
        self.latents = latents
        self.settings = settings
        self._decode = decode
        self._frames: Tensor | None = None

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def frames(self) -> Tensor:
        """uint8 [F, H, W, 3] on the CPU."""
        if self._frames is None:
            for _ in self.decode():
                pass
        return cast(Tensor, self._frames)  # the last piece completed them

    def decode(self, notify: Notify | None = None) -> Iterator[Tensor]:
        """Consecutive pieces of the frames, uint8 [f, H, W, 3] on the CPU, each as soon as it is
        decoded. Once all are, they stay in `frames`.

        notify: is called with one line at a time about how decoding proceeds.
        """
        if self._frames is not None:
            yield self._frames
            return
        pieces = []
        for piece in self._decode(self.latents, self.settings, notify=notify):
            pieces.append(piece)
            yield piece
        self._frames = torch.cat(pieces)

    def pil(self) -> list[Image.Image]:
        """The frames as pictures of Pillow."""
        from PIL import Image

        return [Image.fromarray(frame.numpy()) for frame in self.frames]

    def __repr__(self) -> str:
        settings = self.settings
        count = settings.num_frames
        frames = "1 frame" if count == 1 else f"{count} frames at {settings.fps} per second"
        state = "not decoded yet" if self._frames is None else "decoded"
        return (
            f"Video({settings.prompt!r:.60}, {frames} of {settings.width}x{settings.height}, "
            f"seed {settings.seed}, {state})"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        """The clip itself, for notebooks: an mp4, a gif where there is no H.264 encoder, or a png
        of one frame."""
        suffix = ".png" if self.settings.num_frames == 1 else _clip_suffix()
        with tempfile.TemporaryDirectory() as folder:
            (path,) = self.save(Path(folder) / f"clip{suffix}", latents=False)
            data = base64.b64encode(path.read_bytes()).decode()
        if suffix == ".mp4":
            source = f"data:video/mp4;base64,{data}"
            shown = {"text/html": f'<video controls loop muted autoplay src="{source}"></video>'}
        else:
            shown = {f"image/{suffix[1:]}": data}
        return {"text/plain": repr(self), **shown}

    def save_latents(self, path: str | Path) -> Path:
        """Write latents and settings as safetensors, for `kandinsky decode` and
        `Kandinsky5.open`."""
        path = video.check_output(path, (".safetensors",))
        # One key: safetensors writes several in an order that changes from file to file.
        metadata = {METADATA_KEY: self.settings.to_json()}
        with replacing(path) as target:
            save_file({"latents": self.latents.cpu().contiguous()}, target, metadata)
        return path

    def save(
        self, path: str | Path, latents: bool = True, notify: Notify | None = None
    ) -> list[Path]:
        """Write the frames as mp4, gif or png by extension, and return the files written.

        An mp4 grows while frames are decoded. latents: write them first, to
        `<stem>.latents.safetensors` beside it, so that no failure of decoding or encoding can lose
        them. notify: as in `decode`.
        """
        path = video.check_output(path)
        if latents:
            self.save_latents(latents_path(path))
        return video.save(self.decode(notify), path, self.settings.fps, self.settings.to_json())


def _clip_suffix() -> str:
    """Of the best format for clips that this machine can write."""
    try:
        video.h264_encoder()
    except RuntimeError:
        return ".gif"
    return ".mp4"


def latents_path(output: str | Path) -> Path:
    """Where the latents of `output` are kept: out.mp4 -> out.latents.safetensors."""
    output = Path(output)
    return output.with_name(f"{output.stem}.latents.safetensors")


def load_latents(path: str | Path) -> tuple[Tensor, Settings]:
    """Latents fp32 [1, T, h, w, C] and settings from a file of `Video.save_latents`. Raises
    ValueError or OSError for any other file."""
    names = read_headers([Path(path)])
    with opened(Path(path)) as file:
        stored = (file.metadata() or {}).get(METADATA_KEY)
        if stored is None or "latents" not in names:
            raise ValueError(
                f"{path} must hold latents saved by kandinsky, but it has no such "
                "tensor or settings; choose another file"
            )
        latents = file.get_tensor("latents")
    try:
        settings = Settings.parse(stored)
        check_latents(latents, settings)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold latents saved by kandinsky, but {error}; choose another file"
        ) from None
    _tell_of_preset(Path(path).name, settings.preset)
    return latents, settings


@cache
def _tell_of_preset(name: str, preset: str) -> None:
    """One line, once, about a file whose preset is none of ours: nothing can be checked against
    it, and decoding does not need it."""
    if preset and preset not in PRESETS:
        _log.warning(
            "%s names the preset %.80r, which `kandinsky presets` does not list", name, preset
        )
