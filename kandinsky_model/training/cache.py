# SPDX-License-Identifier: Apache-2.0
"""Latents and embedded captions of the training data, computed once and kept as safetensors.

An entry is a file named by the SHA-256 of everything that it was computed from. It is written
beside its place and then renamed, so that it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.headers import read_headers
from ..checkpoints.locate import Sources
from ..config import KINDS
from ..devices.available import free_bytes
from ..devices.budget import Weights, text_ways
from ..devices.offload import LateOffload, Offload
from ..pipeline import Kandinsky5
from ..text.cache import identity
from ..vae.hunyuan import HunyuanVideoVAE
from .data import Bad, Item, Stamp, read_item, read_source
from .tensors import write_tensors

# Latents lie within about +-10, where fp16 keeps 11 bits of them and bf16 would keep 8.
LATENT_DTYPE = torch.float16
VAE_STRIDE = 8  # pixels per latent pixel, in height and width
COLOURS = 2  # how clips become RGB: entries that were made in another way are made again
# the tensors of each kind of entry, with the number of their dimensions
LATENTS = {"latents": 4}
EDIT = {"latents": 4, "source": 4}
TEXT = {"embeds": 2, "pooled": 1}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What entries are made with.

    sizes: (height, width) in pixels. lengths: in frames, 4k + 1. trigger: words that are put before
    captions that lack them. null: the prompt that stands for no prompt.
    """

    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    trigger: str = ""
    null: str = ""


@dataclass(frozen=True)
class Sample:
    """An item whose entries are complete.

    latents: a file with `latents` [T, h, w, C], scaled as the transformer sees them, and for an
    edit with those of the picture before, `source`. text, null: files with the embeddings `embeds`
    [L, Dt] and `pooled` [Dp] of the caption and of the null prompt. shape: (T, h, w).
    """

    name: str
    caption: str
    latents: Path
    text: Path
    null: Path
    shape: tuple[int, int, int]


class Cache:
    """The entries in `folder` that one model makes.

    Its VAE and text encoders compute on `device` in `dtype`, within `memory_budget` bytes or, where
    that is None, within what is free.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        wanted: Wanted,
        device: torch.device,
        dtype: torch.dtype,
        memory_budget: int | None = None,
    ):
        self.folder = folder
        self.sources = sources
        self.wanted = wanted
        self.device = device
        self.dtype = dtype
        self.budget = free_bytes(device) if memory_budget is None else memory_budget
        encoders = [place for place in (sources.text_encoder, sources.text_encoder_2) if place]
        assert sources.vae is not None  # all parts were located
        # what entries of each kind depend on, beside the item: see `_path`
        self.owners = {
            "latents": identity([sources.vae], dtype)[:2],
            "text": identity(encoders, dtype),
        }

    def fill(self, items: Sequence[Item], bad: Bad) -> None:
        """Compute and write the entries that are missing for `items`: first latents, then the
        embeddings of items that have latents.

        `bad` decides about items that cannot be read. OSError where the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the cache {self.folder} must be a folder that can be written, got {error}; "
                "choose another"
            ) from None
        missing = [item for item in items if not self._has_latents(item)]
        if missing:
            self._fill_latents(missing, bad)
        texts = {}
        for item in items:
            if not self._has_latents(item):
                continue
            for prompt in (self._caption(item), self.wanted.null):
                path = self._text(item, prompt)
                if not _is_whole(path, TEXT):
                    texts[path] = item, prompt
        if texts:
            self._fill_texts(texts, bad)

    def samples(self, items: Sequence[Item]) -> list[Sample]:
        """The samples of those of `items` that are complete."""
        found = []
        for item in items:
            if not self._has_latents(item):
                continue
            caption = self._caption(item)
            sample = Sample(
                name=item.name,
                caption=caption,
                latents=self._latents(item),
                text=self._text(item, caption),
                null=self._text(item, self.wanted.null),
                shape=_shape(self._latents(item)),
            )
            if _is_whole(sample.text, TEXT) and _is_whole(sample.null, TEXT):
                found.append(sample)
        return found

    def _caption(self, item: Item) -> str:
        trigger = self.wanted.trigger
        return item.caption if trigger in item.caption else f"{trigger} {item.caption}"

    def _kind(self, item: Item) -> str:
        """The kind of result that the text encoder's template names. Where the model makes both,
        it depends on the length of the latents, which must exist."""
        fixed = KINDS.get(self.sources.preset.task)
        return fixed or ("video" if _shape(self._latents(item))[0] > 1 else "image")

    def _latents(self, item: Item) -> Path:
        wanted = self.wanted
        files = [_listed(stamp) for stamp in item.stamps]
        shaped_by = [wanted.sizes, wanted.lengths, self.sources.preset.fps]
        if item.is_clip:
            shaped_by.append(COLOURS)
        return self._path("latents", files, *shaped_by)

    def _has_latents(self, item: Item) -> bool:
        return _is_whole(self._latents(item), EDIT if item.source else LATENTS)

    def _text(self, item: Item, prompt: str) -> Path:
        # an editing model's text encoder sees the picture before the edit, at the result's size
        seen = [_listed(item.stamps[1]), _shape(self._latents(item))] if item.source else None
        return self._path("text", prompt, self._kind(item), seen)

    def _path(self, kind: str, *made_from: object) -> Path:
        key = json.dumps([self.owners[kind], made_from])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.{kind}.safetensors"

    @torch.no_grad()
    def _fill_latents(self, items: Sequence[Item], bad: Bad) -> None:
        sources = replace(self.sources, dit=None, text_encoder=None)
        vae: Any = Kandinsky5.from_sources(sources, self.device, self.dtype).vae
        vae.to(self.device)
        left = None if self.budget is None else self.budget - Weights.of(vae).total
        # an image VAE knows no budget
        limits = {"memory_budget": left} if isinstance(vae, HunyuanVideoVAE) else {}
        wanted = self.wanted

        def encode(pixels: Tensor) -> Tensor:
            """Scaled latents [T, h, w, C] of uint8 [3, F, H, W]."""
            mean = vae.encode(pixels[None], **limits)[0][0].float()  # [C, T, h, w]
            return (mean.permute(1, 2, 3, 0) * vae.config.scaling_factor).to(LATENT_DTYPE)

        for number, item in enumerate(items, start=1):
            video = source = None
            with bad.reading(item.path):
                video = read_item(item, wanted.sizes, wanted.lengths, self.sources.preset.fps)
                if item.source:
                    _, _, height, width = video.shape
                    source = read_source(item, (height, width))  # [3, H, W]
            if video is None or (item.source and source is None):
                continue
            tensors = {"latents": encode(video)}
            if source is not None:
                tensors["source"] = encode(source[:, None])
            self._write(self._latents(item), tensors)
            _, frames, height, width = video.shape
            _log.info(
                "encoded %s, %d frames of %dx%d, %d of %d",
                item.name,
                frames,
                width,
                height,
                number,
                len(items),
            )

    def _fill_texts(self, texts: Mapping[Path, tuple[Item, str]], bad: Bad) -> None:
        """Embed prompts; texts: (item, prompt) by the path of the entry."""
        sources = replace(self.sources, dit=None, vae=None)
        encoder = Kandinsky5.from_sources(sources, self.device, self.dtype, text_cache=False).text
        with self._placed(encoder) as text, torch.no_grad():
            for path, (item, prompt) in texts.items():
                seen = {}
                if item.source:
                    _, height, width = _shape(self._latents(item))
                    size = height * VAE_STRIDE, width * VAE_STRIDE
                    with bad.reading(item.path):
                        seen = {"images": [read_source(item, size)]}
                    if not seen:
                        continue
                made = text.encode([prompt], self._kind(item), **seen)
                embeds = made.embeds[0, : made.lengths[0]]  # [L, Dt]
                self._write(path, {"embeds": embeds, "pooled": made.pooled[0]})
        _log.info("embedded %d prompts", len(texts))

    @contextmanager
    def _placed(self, text: Any) -> Iterator[Any]:
        """The text encoder, of any class, on the device; streamed where it does not fit."""
        if hasattr(text, "weigh"):
            weights = text.weigh(vision=self.sources.preset.task == "i2i")
        else:
            weights = Weights.of(text)
        ways = list(text_ways(weights))
        if self.budget is None or ways[0].peak_bytes <= self.budget:
            yield text.to(self.device)
            return
        way = next((way for way in ways if way.peak_bytes <= self.budget), ways[-1])
        offload = LateOffload if hasattr(text, "placing") else Offload
        with offload(text, self.device).on_device(way.resident) as placed:
            yield placed

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            write_tensors(path, tensors)
        except (OSError, SafetensorError) as error:
            raise OSError(
                "the cache must have room for latents and embeddings, but writing to "
                f"{self.folder} gave {error}; make room or choose another folder, and start "
                "again: what is there is whole and will be used"
            ) from None


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry, on the CPU.

    They are copied out of the mapped file: libraries round differently by where in a cache line a
    tensor begins.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise OSError(
            "the cache must stay as it is while a training runs, "
            f"but {path} gave {error}; start again with --resume"
        ) from None


def _listed(stamp: Stamp) -> list:
    return [stamp.name, stamp.size, stamp.changed]


def _shape(path: Path) -> tuple[int, int, int]:
    """(T, h, w) of the latents in an entry."""
    T, h, w, _ = read_headers([path])["latents"].shape
    return T, h, w


def _is_whole(path: Path, dimensions: Mapping[str, int]) -> bool:
    """Whether an entry is there, with its tensors, which have so many dimensions each."""
    try:
        entries = read_headers([path])
    except (OSError, ValueError):
        return False
    found = {name: len(entry.shape) for name, entry in entries.items()}
    return found == dict(dimensions)
