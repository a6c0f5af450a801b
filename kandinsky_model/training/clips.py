# SPDX-License-Identifier: Apache-2.0
"""The frames of a clip at a given rate, upright, in the colours that its file means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..media.picture import crop, resize

USUAL_FPS = 24  # of a clip that does not tell its own
HD_HEIGHT = 720  # from which a clip that does not tell its colour matrix has that of BT.709
UNTOLD = (0, 2)  # codes of a matrix for RGB, which needs none, and for "unspecified"
# the codes of ITU-T H.273 for colour matrices, and the names that FFmpeg's filters give them
MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}
RANGES = {1: "limited", 2: "full"}


class BadData(ValueError):
    """A file cannot be trained on. The text gives the reason without the file's name."""


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` (height, width) whose aspect ratio is nearest to height / width.

    Two ratios are compared by their quotient, so that twice as wide is as far as half as wide.
    """

    def distance(size: tuple[int, int]) -> float:
        quotient = (size[0] * width) / (size[1] * height)
        return max(quotient, 1 / quotient)

    return min(sizes, key=distance)


def fitted(image: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """An image, uint8 [3, h, w], cut and scaled to the nearest of `sizes`."""
    shape = image.shape
    height, width = nearest_size(shape[1], shape[2], sizes)
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
    of 1 / fps seconds. Raises BadData, and for damaged files whatever PyAV raises.
    """
    import av

    frames: list[Tensor] = []
    converter = Converter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadData("it has no video stream")
            for picture, until in _shown(container):
                shown = None
                while len(frames) < most and (len(frames) + 0.5) / fps < until:
                    shown = fitted(converter(picture), sizes) if shown is None else shown
                    sizes = [(shown.shape[1], shown.shape[2])]
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


class Converter:
    """Turns frames of PyAV into pixels, uint8 [3, H, W].

    PyAV's own conversion reads BT.709 as BT.601 in its versions up to 16, and guesses the matrix of
    untagged frames without regard to their size in all of them. A filter that is told the matrix
    and the range gives the same colours, within two levels, in every version.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple, Any] = {}  # by all that a frame's conversion depends on

    def __call__(self, frame) -> Tensor:
        kind = (frame.width, frame.height, frame.format.name, matrix_of(frame), range_of(frame))
        if kind not in self._graphs:
            self._graphs[kind] = _graph(frame, matrix_of(frame), range_of(frame))
        graph = self._graphs[kind]
        graph.push(frame)
        pixels = torch.from_numpy(graph.pull().to_ndarray()).permute(2, 0, 1)  # [3, h, w]
        # PyAV gives the angle in degrees, counterclockwise, which is also how rot90 turns
        return torch.rot90(pixels, round(frame.rotation / 90), (1, 2))


def matrix_of(frame) -> str:
    """The colour matrix of a frame by FFmpeg's name. Where the file does not tell it, that of its
    size, which is how players decide."""
    code = int(frame.colorspace)
    if code in UNTOLD:
        return "bt709" if frame.height >= HD_HEIGHT else "bt601"
    if code not in MATRICES:
        raise BadData(f"its colour matrix has the code {code} of H.273, which is none that is read")
    return MATRICES[code]


def range_of(frame) -> str:
    """The range of a frame's levels by FFmpeg's name; "auto" is that of its pixel format."""
    return RANGES.get(int(frame.color_range), "auto")


def _graph(frame, matrix: str, levels: str):
    """A filter from frames like `frame` to RGB."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    scale = graph.add("scale", f"in_color_matrix={matrix}:in_range={levels}:out_range=full")
    rgb = graph.add("format", "pix_fmts=rgb24")
    sink = graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(rgb)
    rgb.link_to(sink)
    graph.configure()
    return graph
