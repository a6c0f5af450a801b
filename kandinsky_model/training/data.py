# SPDX-License-Identifier: Apache-2.0
"""A folder of clips and pictures with captions: found, checked, cut to sizes and lengths.

The caption of `walk.mp4` is in `walk.txt` beside it, or in a line of `captions.jsonl` such as
{"file": "walk.mp4", "caption": "..."}. For image editing `walk.png` is the result,
`walk.source.png` the picture before, and the caption says what to change.
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
SOURCE = ".source."  # in the name of a picture before an edit
POLICIES = ("stop", "skip")
USUAL_FPS = 24  # of a clip that does not tell its own

_log = logging.getLogger(__name__)


class BadData(ValueError):
    """A file cannot be trained on. The text gives the reason without the file's name."""


@dataclass
class Bad:
    """The policy for files that cannot be trained on: "stop" raises ValueError at the first one,
    "skip" logs a warning and leaves it out."""

    policy: str = "stop"
    skipped: dict[str, str] = field(default_factory=dict)  # reasons by file name

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"bad data can {' or '.join(POLICIES)} the training, got {self.policy!r}; "
                "choose one of them"
            )

    @contextmanager
    def among(self, path: Path) -> Iterator[None]:
        """Apply the policy to `path` where the body raises BadData."""
        try:
            yield
        except BadData as error:
            if self.policy == "stop":
                raise ValueError(
                    f"{path} cannot be trained on: {error}; "
                    "mend or remove it, or skip such with --bad-data skip"
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


def find_items(
    folder: Path,
    bad: Bad,
    edits: bool = False,
) -> list[Item]:
    """The clips and pictures of `folder` with their captions, in the order of their names.

    Folders inside it are not searched. edits: each picture needs its picture before the edit.
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
    sources = {}
    if edits:
        sources = {path.name.split(SOURCE)[0]: path for path in files if SOURCE in path.name}
    captions = _captions(folder / CAPTIONS)
    items = []
    for path in files:
        if path in sources.values():
            continue
        with bad.among(path):
            if edits and path.stem not in sources:
                wanted = f"{path.stem}.source{path.suffix}"
                raise BadData(f"the picture before the edit is missing, {wanted}")
            items.append(Item(path, _caption(path, captions), sources.get(path.stem)))
    if not items:
        raise ValueError(
            f"{folder} must hold clips ({', '.join(CLIPS)}) or pictures ({', '.join(PICTURES)}) "
            f"with captions, got none that can be used of {len(files)}; add some"
        )
    return items


def _captions(path: Path) -> dict[str, str]:
    """The captions of a file of JSON lines, by file name; none where the file is missing."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[entry["file"]] = entry["caption"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f'line {number} of {path} must be like {{"file": "walk.mp4", "caption": "..."}}, '
                f"got {line[:80]!r}; correct it"
            ) from None
    return captions


def _caption(path: Path, captions: dict[str, str]) -> str:
    """The caption of a file as one line, from the .txt beside it or else from `captions`."""
    beside = path.with_suffix(".txt")
    try:
        known = captions.get(path.name)
        caption = beside.read_text(encoding="utf-8") if beside.is_file() else known
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"its caption {beside.name} cannot be read ({error})") from None
    if not isinstance(caption, str) or not caption.strip():
        raise BadData(f"it has no caption, neither in {beside.name} nor in {CAPTIONS}")
    return " ".join(caption.split())


def nearest_size(
    height: int,
    width: int,
    sizes: Sequence[tuple[int, int]],
) -> tuple[int, int]:
    """The one of `sizes` (height, width) whose aspect ratio is nearest to height / width.

    Two ratios are compared by their quotient, so that twice as wide is as far as half as wide.
    """

    def distance(size: tuple[int, int]) -> float:
        quotient = (size[0] * width) / (size[1] * height)
        return max(quotient, 1 / quotient)

    return min(sizes, key=distance)


def read_item(
    item: Item,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    fps: int,
) -> Tensor:
    """The frames of a clip, or the one frame of a picture: uint8 [3, F, H, W].

    F is the longest of `lengths` that the clip has at `fps`, counted from its first frame. (H, W)
    is the nearest of `sizes`; what does not fit its shape is cut off on both sides. Raises BadData.
    """
    if item.is_clip:
        frames = read_clip(item.path, fps, max(lengths), sizes)
    else:
        frames = [_fitted(_picture(item.path), sizes)]
    fitting = [length for length in lengths if length <= len(frames)]
    if not fitting:
        what = f"has {len(frames)} frames at {fps} per second" if item.is_clip else "is a picture"
        raise BadData(f"it {what}, but the shortest length asked for is {min(lengths)} frames")
    if item.is_clip and max(fitting) == 1:
        raise BadData("it is a clip, but only pictures are asked for")
    return torch.stack(frames[: max(fitting)], dim=1)


def read_source(item: Item, size: tuple[int, int]) -> Tensor:
    """The picture before the edit at `size` (height, width), that of the result: uint8 [3, H, W].

    Raises BadData.
    """
    return _fitted(_picture(item.source), [size])


def _picture(path: Path) -> Tensor:
    try:
        return read_image(path)
    except (ValueError, OSError) as error:
        raise BadData(str(error)) from None


def _fitted(image: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """An image, uint8 [3, h, w], cut and scaled to the nearest of `sizes`."""
    height, width = nearest_size(*image.shape[1:], sizes)
    return resize(crop(image, height, width), height, width)


def read_clip(
    path: Path,
    fps: int,
    most: int,
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """At most `most` frames of a clip at `fps` frames per second, each uint8 [3, H, W] of the size
    that is nearest to the first frame's.

    Whatever the clip's own rate, frame i is the one on screen in the middle of the i-th interval
    of 1 / fps seconds. Raises BadData.
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
        reason = error.strerror or error
        raise BadData(f"it cannot be decoded after {len(frames)} frames ({reason})") from None
    if not frames:
        raise BadData("it cannot be decoded: there is not one frame")
    return frames


def _shown(container) -> Iterator[tuple[object, float]]:
    """Each frame of the first video stream, with the time in seconds, counted from the first
    frame, until which it is on screen."""
    stream = container.streams.video[0]
    length = 1 / float(stream.average_rate or stream.guessed_rate or USUAL_FPS)
    before = None
    first = now = 0.0
    for frame in container.decode(stream):
        if frame.pts is None:
            raise BadData("its frames have no times")
        now = float(frame.pts * frame.time_base)
        if before is None:
            first = now
        else:
            yield before, now - first
        before = frame
    if before is not None:
        yield before, now - first + length


def _upright(frame) -> Tensor:
    """The pixels of a frame, uint8 [3, H, W], turned as the camera was held.

    PyAV gives the angle in degrees, counterclockwise, which is also how rot90 turns.
    """
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)  # [3, H, W]
    return torch.rot90(pixels, round(frame.rotation / 90), (1, 2))
