# SPDX-License-Identifier: Apache-2.0
"""A folder of clips and pictures with captions: found, checked, cut to sizes and lengths.

`captions.LAYOUTS` says where captions are read from. For image editing `walk.png` is the result,
`walk.source.png` the picture before, and the caption says what to change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..media.picture import read_image
from .captions import LAYOUTS, caption_of, read_tables
from .clips import BadData, fitted, read_clip

CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOURCE = ".source."  # in the name of a picture before an edit
POLICIES = ("stop", "skip")

_log = logging.getLogger(__name__)


@dataclass
class Bad:
    """The policy for files that cannot be trained on: "stop" raises ValueError at the first one,
    "skip" logs a warning and leaves it out."""

    policy: str = "stop"
    skipped: dict[Path, str] = field(default_factory=dict)  # reasons by file

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"bad data can {' or '.join(POLICIES)} the training, got {self.policy!r}; "
                "choose one of them"
            )

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Apply the policy to `path` where the body, which reads it and does nothing else, fails
        in whatever way: libraries have many ways to fail on a damaged file."""
        try:
            yield
        except Exception as error:
            reason = str(error)
            if not isinstance(error, BadData):
                first = (reason.splitlines() or [""])[0]
                reason = f"reading it failed with {type(error).__name__} ({first})"
            if self.policy == "stop":
                raise ValueError(
                    f"{path} cannot be trained on: {reason}; "
                    "mend or remove it, or skip such with --bad-data skip"
                ) from None
            self.skipped[path] = reason
            _log.warning("skipped %s: %s", path, reason)

    def refuse(self, sentence: str) -> None:
        """Apply the policy to something else that is wrong with the data."""
        if self.policy == "stop":
            raise ValueError(f"{sentence}; correct it, or skip such with --bad-data skip")
        _log.warning("skipped: %s", sentence)


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another: its path in the data's folder, its size in bytes, and the
    time of its last change in nanoseconds."""

    name: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, folder: Path) -> Stamp:
        stat = path.stat()
        return cls(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Item:
    """A file to train on. source: the picture before an edit. stamps: of both files, in this
    order."""

    path: Path
    caption: str
    source: Path | None = None
    stamps: tuple[Stamp, ...] = ()

    @property
    def name(self) -> str:
        """Its path in the data's folder."""
        return self.stamps[0].name

    @property
    def is_clip(self) -> bool:
        return self.path.suffix.lower() in CLIPS


def find_items(
    folder: Path,
    bad: Bad,
    edits: bool = False,
    without: Collection[Path] = (),
) -> list[Item]:
    """The clips and pictures of `folder`, and of the folders in it, with their captions, in the
    order of their paths.

    edits: each picture needs its picture before the edit. without: folders that are not searched.
    Raises FileNotFoundError without the folder, ValueError where it holds nothing to train on.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            "training data are a folder of clips or pictures with captions, "
            f"but {folder} is none; check the path"
        )
    files: list[Path] = []
    captions: dict[str, str] = {}
    for place in _folders(folder, without):
        files += [path for path in place.iterdir() if _is_data(path)]
        captions |= read_tables(place, bad.refuse)
    files.sort()
    sources = {}
    if edits:
        sources = {_edited(path): path for path in files if SOURCE in path.name}
    items = []
    for path in files:
        if path in sources.values():
            continue
        with bad.reading(path):
            source = sources.get(path.with_suffix(""))
            if edits and source is None:
                wanted = f"{path.stem}.source{path.suffix}"
                raise BadData(f"the picture before the edit is missing, {wanted}")
            caption = caption_of(path, captions)
            both = [path] if source is None else [path, source]
            if not all(one.is_file() for one in both):  # opening a pipe would wait for ever
                raise BadData("it is no ordinary file")
            stamps = tuple(Stamp.of(one, folder) for one in both)
            items.append(Item(path, caption, source, stamps))
    if not items:
        raise ValueError(
            f"{folder} must hold clips ({', '.join(CLIPS)}) or pictures ({', '.join(PICTURES)}) "
            f"with captions, got none that can be used of {len(files)}; {LAYOUTS}"
        )
    return items


def _folders(folder: Path, without: Collection[Path]) -> Iterator[Path]:
    """`folder` and all folders in it that are not hidden, each once, however links lead there."""
    seen = {os.path.realpath(path) for path in without}
    for place, folders, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place)


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in CLIPS + PICTURES and not path.name.startswith(".")


def _edited(source: Path) -> Path:
    """The path without suffix of the result whose picture before the edit is `source`."""
    return source.with_name(source.name.split(SOURCE)[0])


def read_item(
    item: Item,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    fps: int,
) -> Tensor:
    """The frames of a clip, or the one frame of a picture: uint8 [3, F, H, W].

    F is the longest of `lengths` that the clip has at `fps`, counted from its first frame. (H, W)
    is the nearest of `sizes`; what does not fit its shape is cut off on both sides. Raises BadData,
    and for damaged files whatever the libraries that read them raise.
    """
    if item.is_clip:
        frames = read_clip(item.path, fps, max(lengths), sizes)
    else:
        frames = [fitted(_picture(item.path), sizes)]
    fitting = [length for length in lengths if length <= len(frames)]
    if not fitting:
        what = f"has {len(frames)} frames at {fps} per second" if item.is_clip else "is a picture"
        raise BadData(f"it {what}, but the shortest length asked for is {min(lengths)} frames")
    if item.is_clip and max(fitting) == 1:
        raise BadData("it is a clip, but only pictures are asked for")
    return torch.stack(frames[: max(fitting)], dim=1)


def read_source(item: Item, size: tuple[int, int]) -> Tensor:
    """The picture before the edit at `size` (height, width), that of the result: uint8 [3, H, W].

    Raises as `read_item` does.
    """
    return fitted(_picture(item.source), [size])


def _picture(path: Path | None) -> Tensor:
    if path is None:
        raise BadData("it has no picture before the edit")
    try:
        return read_image(path)
    except (ValueError, OSError) as error:
        raise BadData(str(error)) from None
