# SPDX-License-Identifier: Apache-2.0
"""What training reads of its data: latents and embedded captions, computed once and kept as
safetensors.

Every entry is a file named by the SHA-256 of all that it was computed from, written beside its
place and renamed: it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoints.headers import read_headers
from ..checkpoints.locate import Sources
from ..config import KINDS
from ..devices.available import free_bytes
from ..devices.budget import Weights, text_ways
from ..devices.offload import LateOffload, Offload
from ..files import replacing
from ..pipeline import Kandinsky5
from ..text.cache import identity
from ..vae.hunyuan import HunyuanVideoVAE
from .data import Bad, Item, read_item, read_source

# latents lie within +-10 or so, where this keeps 11 bits of them and bf16 would keep 8
LATENT_DTYPE = torch.float16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a folder. sizes: (height, width) in pixels; lengths: in frames, 4k + 1;
    trigger: words before every caption;
    null: what stands for no prompt."""

    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    trigger: str = ""
    null: str = ""


@dataclass(frozen=True)
class Sample:
    """One thing to train on, as files: latents [T, h, w, C], scaled as the transformer sees them,
    with those of the picture before an edit as `source`; `text` and `null`: embeds [L, Dt] and
    pooled [Dp] of its caption and of no prompt."""

    name: str
    caption: str
    latents: Path
    text: Path
    null: Path
    shape: tuple[int, int, int]  # T, h, w


class Cache:
    """The entries in `folder` for one model. device, dtype: where and in what its VAE and text
    encoders compute, within `memory_budget`."""

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        wanted: Wanted,
        device: torch.device,
        dtype: torch.dtype,
        memory_budget: int | None = None,
    ):
        self.folder, self.sources, self.wanted, self.device, self.dtype = (
            folder,
            sources,
            wanted,
            device,
            dtype,
        )
        self.budget = free_bytes(device) if memory_budget is None else memory_budget
        encoders = [place for place in (sources.text_encoder, sources.text_encoder_2) if place]
        self.owners = {
            "latents": identity([sources.vae], dtype)[:2],
            "text": identity(encoders, dtype),
        }

    def fill(self, items: Sequence[Item], bad: Bad) -> None:
        """Compute and write what is missing for `items`: first latents, then embeddings of those
        that have latents.

        Raises what `bad` makes of bad data, and OSError where the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the cache {self.folder} must be a folder that can be written, got "
                f"{error}; choose another"
            ) from None
        missing = [item for item in items if not _is_whole(self._latents(item))]
        if missing:
            self._fill_latents(missing, bad)
        found = [item for item in items if _is_whole(self._latents(item))]
        texts = {
            self._text(item, prompt): (item, prompt)
            for item in found
            for prompt in (self._caption(item), self.wanted.null)
        }
        texts = {path: wish for path, wish in texts.items() if not _is_whole(path)}
        if texts:
            self._fill_texts(texts)

    def samples(self, items: Sequence[Item]) -> list[Sample]:
        """Those of `items` that are complete."""
        found = []
        for item in items:
            latents = self._latents(item)
            if _is_whole(latents):
                caption = self._caption(item)
                text, null = (self._text(item, prompt) for prompt in (caption, self.wanted.null))
                found.append(Sample(item.path.name, caption, latents, text, null, _shape(latents)))
        return found

    def _caption(self, item: Item) -> str:
        trigger = self.wanted.trigger
        return item.caption if trigger in item.caption else f"{trigger} {item.caption}"

    def _kind(self, item: Item) -> str:
        """What the text encoder is told; known once the latents are there."""
        return KINDS.get(self.sources.preset.task) or (
            "video" if _shape(self._latents(item))[0] > 1 else "image"
        )

    def _latents(self, item: Item) -> Path:
        files = [_stat(path) for path in (item.path, item.source) if path]
        return self._path(
            "latents", files, self.wanted.sizes, self.wanted.lengths, self.sources.preset.fps
        )

    def _text(self, item: Item, prompt: str) -> Path:
        seen = [_stat(item.source), _shape(self._latents(item))] if item.source else None
        return self._path("text", prompt, self._kind(item), seen)

    def _path(self, what: str, *wish) -> Path:
        key = json.dumps([self.owners[what], wish])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.{what}.safetensors"

    @torch.no_grad()
    def _fill_latents(self, items: Sequence[Item], bad: Bad) -> None:
        vae = Kandinsky5.from_sources(
            replace(self.sources, dit=None, text_encoder=None), self.device, self.dtype
        ).vae.to(self.device)
        left = None if self.budget is None else self.budget - Weights.of(vae).total
        limits = {"memory_budget": left} if isinstance(vae, HunyuanVideoVAE) else {}
        preset, wanted = self.sources.preset, self.wanted

        def encode(pixels: Tensor) -> Tensor:
            mean = vae.encode(pixels[None], **limits)[0][0].float()  # [C, T, h, w]
            return (mean.permute(1, 2, 3, 0) * vae.config.scaling_factor).to(LATENT_DTYPE)

        for number, item in enumerate(items, start=1):
            with bad.among(item.path):
                video = read_item(item, wanted.sizes, wanted.lengths, preset.fps)
                tensors = {"latents": encode(video)}
                if item.source:
                    tensors["source"] = encode(read_source(item, video.shape[2:])[:, None])
                self._write(self._latents(item), tensors)
                _log.info(
                    "encoded %s, %d frames of %dx%d, %d of %d",
                    item.path.name,
                    video.shape[1],
                    video.shape[3],
                    video.shape[2],
                    number,
                    len(items),
                )

    def _fill_texts(self, texts: dict[Path, tuple[Item, str]]) -> None:
        sources = replace(self.sources, dit=None, vae=None)
        encoder = Kandinsky5.from_sources(sources, self.device, self.dtype, text_cache=False).text
        with self._placed(encoder) as text, torch.no_grad():
            for path, (item, prompt) in texts.items():
                _, height, width = _shape(self._latents(item))
                seen = (
                    {"images": [read_source(item, (8 * height, 8 * width))]} if item.source else {}
                )
                made = text.encode([prompt], self._kind(item), **seen)
                self._write(
                    path, {"embeds": made.embeds[0, : made.lengths[0]], "pooled": made.pooled[0]}
                )
        _log.info("embedded %d prompts", len(texts))

    @contextmanager
    def _placed(self, text: nn.Module) -> Iterator[nn.Module]:
        """The text encoder on the device, streamed where it does not fit."""
        weights = (
            text.weigh(vision=self.sources.preset.task == "i2i")
            if hasattr(text, "weigh")
            else Weights.of(text)
        )
        ways = list(text_ways(weights))
        if self.budget is None or ways[0].peak_bytes <= self.budget:
            yield text.to(self.device)
            return
        way = next((way for way in ways if way.peak_bytes <= self.budget), ways[-1])
        with (LateOffload if hasattr(text, "placing") else Offload)(text, self.device).on_device(
            way.resident
        ) as placed:
            yield placed

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            with replacing(path) as target:
                save_file(
                    {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, target
                )
        except (OSError, SafetensorError) as error:
            raise OSError(
                "the cache must have room for latents and embeddings, but writing to "
                f"{self.folder} gave {error}; make room or "
                "choose another folder, and start again: what is there is whole and "
                "will be used"
            ) from None


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry, on the CPU, copied: libraries round differently by where in a line
    of the cache a tensor begins."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _stat(path: Path) -> list:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _shape(path: Path) -> tuple[int, int, int]:
    return read_headers([path])["latents"].shape[:3]


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_headers([path]))
    except (OSError, ValueError):
        return False
