# SPDX-License-Identifier: Apache-2.0
"""A folder of clips and pictures with captions, as training wants it: found, checked, cut to sizes
and lengths.

Beside `walk.mp4` lies its caption, `walk.txt`; or a file `captions.jsonl` has lines {"file":
"walk.mp4", "caption": "..."}. For editing checkpoints `walk.png` is the result, `walk.source.png`
the picture before, and the caption the wish.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..media.picture import crop, read_image, resize

CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "captions.jsonl"
POLICIES = ("stop", "skip")

_log = logging.getLogger(__name__)


class BadData(ValueError):
    """One of the given files cannot be trained on; says why, without the file's name."""


@dataclass
class Bad:
    """What happens to files that cannot be trained on: "stop" raises ValueError with the first,
    "skip" warns and goes on without it."""

    policy: str = "stop"
    skipped: dict[str, str] = field(default_factory=dict)  # file name -> why

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(
                f"bad data can {' or '.join(POLICIES)} the training, got "
                f"{self.policy!r}; choose one of them"
            )

    @contextmanager
    def among(self, path: Path) -> Iterator[None]:
        """For what is done with one file: `BadData` in the body is that file's fault."""
        try:
            yield
        except BadData as error:
            if self.policy == "stop":
                raise ValueError(
                    f"{path} cannot be trained on: {error}; mend or remove it, or "
                    "skip such with --bad-data skip"
                ) from None
            self.skipped[path.name] = str(error)
            _log.warning("skipped %s: %s", path, error)


@dataclass(frozen=True)
class Item:
    """A file to train on. source: the picture before an edit."""

    path: Path
    caption: str
    source: Path | None = None

    @property
    def is_clip(self) -> bool:
        return self.path.suffix.lower() in CLIPS


def find_items(folder: Path, bad: Bad, edits: bool = False) -> list[Item]:
    """All clips and pictures of `folder` in the order of their names, each with its caption.
    Folders inside it are not searched.

    Raises FileNotFoundError without the folder, ValueError where it holds nothing to train on.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            "training data are a folder of clips or pictures with captions, "
            f"but {folder} is none; check the path"
        )
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in CLIPS + PICTURES and not path.name.startswith(".")
    )
    sources = (
        {path.name.split(".source.")[0]: path for path in files if ".source." in path.name}
        if edits
        else {}
    )
    captions, items = _captions(folder / CAPTIONS), []
    for path in files:
        if path in sources.values():
            continue
        with bad.among(path):
            if edits and path.stem not in sources:
                raise BadData(
                    f"the picture before the edit is missing, {path.stem}.source{path.suffix}"
                )
            items.append(Item(path, _caption(path, captions), sources.get(path.stem)))
    if not items:
        raise ValueError(
            f"{folder} must hold clips ({', '.join(CLIPS)}) or pictures "
            f"({', '.join(PICTURES)}) with captions, got none that "
            f"can be used of {len(files)}; add some"
        )
    return items


def _captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                entry = json.loads(line)
                captions[entry["file"]] = entry["caption"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"line {number} of {path} must be like "
                f'{{"file": "walk.mp4", "caption": "..."}}, got {line[:80]!r}; '
                "correct it"
            ) from None
    return captions


def _caption(path: Path, captions: dict[str, str]) -> str:
    beside = path.with_suffix(".txt")
    try:
        caption = (
            beside.read_text(encoding="utf-8") if beside.is_file() else captions.get(path.name)
        )
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"its caption {beside.name} cannot be read ({error})") from None
    if not isinstance(caption, str) or not caption.strip():
        raise BadData(f"it has no caption, neither in {beside.name} nor in {CAPTIONS}")
    return " ".join(caption.split())


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` (height, width) whose shape is nearest, by the ratio of its sides' ratio
    to the given one."""
    return min(
        sizes,
        key=lambda size: max(
            size[0] * width / (size[1] * height), size[1] * height / (size[0] * width)
        ),
    )


def read_item(
    item: Item, sizes: Sequence[tuple[int, int]], lengths: Sequence[int], fps: int
) -> Tensor:
    """uint8 [3, F, H, W]: the first frames of the clip, as many as the longest of `lengths` that it
    has, or the picture; cut to the middle of the shape of the nearest of `sizes`, and scaled to it.
    Raises BadData.
    """
    frames = (
        read_clip(item.path, fps, max(lengths), sizes)
        if item.is_clip
        else [_fitted(_picture(item.path), sizes)]
    )
    fitting = [length for length in lengths if length <= len(frames)]
    if not fitting:
        what = f"has {len(frames)} frames at {fps} per second" if item.is_clip else "is a picture"
        raise BadData(f"it {what}, but the shortest length asked for is {min(lengths)} frames")
    if not item.is_clip or max(fitting) > 1:
        return torch.stack(frames[: max(fitting)], dim=1)
    raise BadData("it is a clip, but only pictures are asked for")


def read_source(item: Item, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W]: the picture before the edit, at the size of the result. Raises BadData."""
    return _fitted(_picture(item.source), [size])


def _picture(path: Path) -> Tensor:
    try:
        return read_image(path)
    except (ValueError, OSError) as error:
        raise BadData(str(error)) from None


def _fitted(image: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """uint8 [3, h, w] cut and scaled to the nearest size."""
    height, width = nearest_size(*image.shape[1:], sizes)
    return resize(crop(image, height, width), height, width)


def read_clip(path: Path, fps: int, most: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """At most `most` frames uint8 [3, H, W] of a clip at `fps` frames per second, all of the size
    that fits the first one.

    A frame is the one on screen in the middle of its interval, whatever the clip's own rate is.
    Raises BadData.
    """
    import av

    frames: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadData("it has no video stream")
            for picture, until in _shown(container):
                shown = None
                while len(frames) < most and (len(frames) + 0.5) / fps < until:
                    shown = _fitted(_upright(picture), sizes) if shown is None else shown
                    sizes = [shown.shape[1:]]
                    frames.append(shown)
                if len(frames) == most:
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise BadData(
            f"it cannot be decoded after {len(frames)} frames ({error.strerror or error})"
        ) from None
    if not frames:
        raise BadData("it cannot be decoded: there is not one frame")
    return frames


def _shown(container) -> Iterator[tuple[object, float]]:
    """Each frame of the first video stream, and the time in seconds after the first one until which
    it is on screen."""
    stream = container.streams.video[0]
    length = 1 / float(stream.average_rate or stream.guessed_rate or 24)
    before = first = None
    for frame in container.decode(stream):
        if frame.pts is None:
            raise BadData("its frames have no times")
        now = float(frame.pts * frame.time_base)
        first = now if first is None else first
        if before is not None:
            yield before, now - first
        before = frame
    if before is not None:
        yield before, now - first + length


def _upright(frame) -> Tensor:
    """uint8 [3, H, W], turned as the camera was held: PyAV's angle is in degrees and
    counterclockwise, as rot90 turns."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90), (1, 2))
