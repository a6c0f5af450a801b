# SPDX-License-Identifier: Apache-2.0
"""Small pictures of numbers, drawn with Pillow: lines over one axis, and rows and columns of
maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INK, FAINT, PAPER = (50, 52, 58), (226, 228, 232), (255, 255, 255)
# from the first line to the last
RAMP = ((43, 45, 124), (27, 124, 150), (74, 160, 88), (222, 142, 30), (196, 52, 60))
SHARP = 2  # drawn so many times larger and then reduced, which smooths the lines


@dataclass(frozen=True)
class Axes:
    """Title and names of a chart's axes. log: y is logarithmic. y_range: (low, high), None for that
    of the numbers."""

    title: str
    x: str
    y: str
    log: bool = False
    y_range: tuple[float, float] | None = None


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    axes: Axes,
    size: tuple[int, int] = (560, 360),
):
    """A PIL image of `size` (width, height) pixels with one line for each name, through its (x, y)
    points; what is not finite is left out.

    Names stand where the lines end; of many lines, only some are named. Raises ValueError where
    there is not one finite point.
    """
    from PIL import Image, ImageDraw

    series = {
        name: [
            (x, y)
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not axes.log)
        ]
        for name, points in series.items()
    }
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(
            "a chart requires at least one finite number, got none for "
            f"{axes.title!r}; record something first"
        )
    picture = Image.new("RGB", (size[0] * SHARP, size[1] * SHARP), PAPER)
    frame = _Frame(ImageDraw.Draw(picture), size, axes, points)
    frame.draw()
    for i, line in enumerate(series.values()):
        frame.line(line, _color(i, len(series)))
    frame.names(series)
    return picture.resize(size, Image.LANCZOS)


class _Frame:
    """Where numbers lie in the picture, and everything around the lines."""

    def __init__(self, brush, size: tuple[int, int], axes: Axes, points: list[tuple[float, float]]):
        self.brush, self.axes = brush, axes
        self.left, self.top, self.right, self.bottom = 56, 50, size[0] - 76, size[1] - 44
        xs, ys = zip(*points, strict=True)
        self.x_ticks, self.y_ticks = (
            _ticks(min(xs), max(xs)),
            _decades(ys) if axes.log else _ticks(*(axes.y_range or (min(ys), max(ys)))),
        )
        self.x_range = min(xs), max(max(xs), min(xs) + 1e-9)
        self.y_range = axes.y_range or (min(*self.y_ticks, *ys), max(*self.y_ticks, *ys))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of the large picture."""
        (low, high), scale = self.y_range, math.log if self.axes.log else float
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        up = (scale(y) - scale(low)) / max(scale(high) - scale(low), 1e-12)
        return SHARP * (self.left + across * (self.right - self.left)), SHARP * (
            self.bottom - up * (self.bottom - self.top)
        )

    def text(self, x: float, y: float, text: str, anchor: str, color=INK, size: int = 12) -> None:
        from PIL import ImageFont

        self.brush.text(
            (SHARP * x, SHARP * y),
            text,
            fill=color,
            anchor=anchor,
            font=ImageFont.load_default(SHARP * size),
        )

    def draw(self) -> None:
        for tick in self.y_ticks:
            if self.y_range[0] <= tick <= self.y_range[1]:
                _, y = self.at(self.x_range[0], tick)
                self.brush.line(
                    (SHARP * self.left, y, SHARP * self.right, y), fill=FAINT, width=SHARP
                )
                self.text(self.left - 6, y / SHARP, f"{tick:g}", "rm")
        for tick in self.x_ticks:
            if self.x_range[0] <= tick <= self.x_range[1]:
                x, _ = self.at(tick, self.y_range[0])
                self.text(x / SHARP, self.bottom + 6, f"{tick:g}", "mt")
        self.brush.line(
            (SHARP * self.left, SHARP * self.bottom, SHARP * self.right, SHARP * self.bottom),
            fill=INK,
            width=SHARP,
        )
        self.text(8, 8, self.axes.title, "lt", size=14)
        self.text((self.left + self.right) / 2, self.bottom + 24, self.axes.x, "mt")
        self.text(8, 34, self.axes.y, "lm")

    def line(self, points: list[tuple[float, float]], color) -> None:
        places = [self.at(*point) for point in points]
        if len(places) > 1:
            self.brush.line(places, fill=color, width=2 * SHARP, joint="curve")
        for x, y in places if len(places) <= 20 else ():
            self.brush.ellipse(
                (x - 3 * SHARP, y - 3 * SHARP, x + 3 * SHARP, y + 3 * SHARP), fill=color
            )

    def names(self, series: Mapping[str, list[tuple[float, float]]]) -> None:
        every = -(-len(series) // 10)
        ends = sorted(
            (self.at(*line[-1])[1] / SHARP, name, i)
            for i, (name, line) in enumerate(series.items())
            if line and i % every == 0
        )
        lowest = self.top - 14.0
        for place, (y, name, i) in enumerate(ends):
            room = self.bottom - 14 * (len(ends) - 1 - place)  # for those that come after it
            lowest = max(lowest + 14, min(y, room))
            self.text(self.right + 8, lowest, name, "lm", _color(i, len(series)))


def cells(maps, names: tuple[str, str] = ("row", "column"), title: str = "", side: int = 96):
    """A PIL image of maps [R, C, N, N] in 0..1, black to white: R rows and C columns of squares of
    `side` pixels.

    names: what a row and what a column is called. A map larger than its square is averaged down.
    """
    import torch
    from PIL import Image, ImageDraw, ImageFont

    rows, columns, gap, margin, head = *maps.shape[:2], 4, 64, 48
    font, large = ImageFont.load_default(12), ImageFont.load_default(14)
    width = max(margin + columns * (side + gap), 12 + math.ceil(large.getlength(title)))
    picture = Image.new("RGB", (width, head + rows * (side + gap)), PAPER)
    brush = ImageDraw.Draw(picture)
    brush.text((6, 6), title, fill=INK, font=large)
    method = (
        {"size": (side, side), "mode": "nearest"}
        if maps.shape[-1] < side
        else {"size": (side, side), "mode": "area"}
    )
    # [R, C, side, side]
    pixels = (
        torch.nn.functional.interpolate(maps.float(), **method)
        .mul(255)
        .round()
        .to(torch.uint8)
        .cpu()
    )
    for row in range(rows):
        brush.text(
            (6, head + row * (side + gap) + side / 2),
            f"{names[0]} {row}",
            fill=INK,
            font=font,
            anchor="lm",
        )
        for column in range(columns):
            place = margin + column * (side + gap), head + row * (side + gap)
            picture.paste(Image.fromarray(pixels[row, column].numpy()), place)
            brush.rectangle(
                (place[0] - 1, place[1] - 1, place[0] + side, place[1] + side), outline=FAINT
            )
    for column in range(columns):
        brush.text(
            (margin + column * (side + gap) + side / 2, head - 6),
            f"{names[1]} {column}",
            fill=INK,
            font=font,
            anchor="mb",
        )
    return picture


def beside(pictures):
    """PIL images in one row."""
    from PIL import Image

    whole = Image.new(
        "RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)), PAPER
    )
    left = 0
    for one in pictures:
        whole.paste(one, (left, 0))
        left += one.width
    return whole


def _color(index: int, count: int) -> tuple[int, ...]:
    place = index / max(count - 1, 1) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    return tuple(
        round(a + (place - low) * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)
    )


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers that span low..high."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    unit = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(
        unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= wanted + 1e-9
    )
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    numbers = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    return [x for x in numbers if min(values) / 2.5 <= x <= max(values) * 2.5]
