# SPDX-License-Identifier: Apache-2.0
"""Drawn clips: one flat shape in front of one flat background, moving or not.

The bundled tiny model is trained on them. A clip is described by four words, a `Combination`; some
combinations are held out of training, and the model is judged by whether it draws those.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT = WIDTH = 160
FRAMES = 17

# RGB in 0..255. The colour of an object is at least 110 (Euclidean distance) away from every other
# colour that it can meet.
OBJECT_COLORS = {
    "red": (205, 25, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (255, 240, 80),
    "purple": (180, 40, 200),
    "orange": (250, 140, 20),
}
BACKGROUNDS = {
    "blue": OBJECT_COLORS["blue"],
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
}
PALETTE = {**OBJECT_COLORS, **BACKGROUNDS}
# unit vectors (x, y); y points down
MOTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
HELD_OUT = 48


def _regular(
    count: int,
    radius: float,
    inner: float | None = None,
    phase: float = -math.pi / 2,
) -> list[tuple[float, float]]:
    """The corners (x, y) of a regular polygon, or of a star whose inner corners have the radius
    `inner`. phase: the angle of the first corner, which is on top by default."""
    corners = 2 * count if inner else count
    points = []
    for i in range(corners):
        r = inner if inner and i % 2 else radius
        angle = phase + 2 * math.pi * i / corners
        points.append((r * math.cos(angle), r * math.sin(angle)))
    return points


# Outlines in units of a scene's radius, their centroids at the origin. None stands for the disc.
SHAPES: dict[str, list[tuple[float, float]] | None] = {
    "circle": None,
    "square": _regular(4, 0.92 * math.sqrt(2), phase=-math.pi / 4),
    "triangle": _regular(3, 1.4),
    "star": _regular(5, 1.4, inner=0.6),
}


@dataclass(frozen=True)
class Combination:
    """The four words of a prompt."""

    color: str
    shape: str
    motion: str
    background: str


@dataclass(frozen=True)
class Scene:
    """A combination with its random numbers. radius: of the object, start: its centre (x, y) in the
    first frame, travel: the length of its path, all in pixels."""

    combination: Combination
    radius: float
    start: tuple[float, float]
    travel: float


@functools.cache
def combinations() -> tuple[Combination, ...]:
    """All combinations in a fixed order. Object and background have different colours."""
    product = itertools.product(OBJECT_COLORS, SHAPES, MOTIONS, BACKGROUNDS)
    return tuple(Combination(*words) for words in product if words[0] != words[3])


@functools.cache
def held_out() -> tuple[Combination, ...]:
    """The 48 combinations that no training clip shows: those whose words have the smallest SHA-256,
    so that the choice looks random and never changes."""

    def key(one: Combination) -> str:
        words = f"{one.color} {one.shape} {one.motion} {one.background}"
        return hashlib.sha256(words.encode()).hexdigest()

    return tuple(sorted(combinations(), key=key)[:HELD_OUT])


@functools.cache
def training_combinations() -> tuple[Combination, ...]:
    """All combinations that are not held out."""
    hidden = set(held_out())
    return tuple(one for one in combinations() if one not in hidden)


# Wordings of a prompt. Those that name all four words come first.
_FULL = (
    "{a} {color} {shape} {verb} on a {background} background",
    "{color} {shape} {verb}, {background} background",
    "on a {background} background {a} {color} {shape} is {verb}",
    "{a} {color} {shape} in front of a {background} background, {verb}",
)
_PARTIAL = (
    "{a} {color} {shape} {verb}",
    "{a} {color} {shape} on a {background} background",
    "{a} {color} {shape}",
)
FULL = len(_FULL)
WORDINGS = _FULL + _PARTIAL


def prompt(combination: Combination, wording: int = 0) -> str:
    """A combination in English. Wordings 0 to 3 name all four words; 4 to 6 leave motion or
    background open."""
    still = combination.motion == "still"
    return WORDINGS[wording].format(
        a="an" if combination.color[0] in "aeiou" else "a",
        color=combination.color,
        shape=combination.shape,
        verb="standing still" if still else f"moving {combination.motion}",
        background=combination.background,
    )


def random_prompt(combination: Combination, generator: random.Random) -> str:
    """A combination in a random wording. One in eight leaves something open."""
    if generator.random() < 0.125:
        return prompt(combination, FULL + generator.randrange(len(_PARTIAL)))
    return prompt(combination, generator.randrange(FULL))


def random_scene(combination: Combination, generator: random.Random) -> Scene:
    """A scene with a radius of 30 +- 2 pixels and a path of 46 +- 4, whose middle is within 6
    pixels of the frame's."""
    radius = 30 + generator.uniform(-2, 2)
    travel = 46 + generator.uniform(-4, 4)
    x = WIDTH / 2 + generator.uniform(-6, 6)
    y = HEIGHT / 2 + generator.uniform(-6, 6)
    dx, dy = MOTIONS[combination.motion]
    start = (x - dx * travel / 2, y - dy * travel / 2)
    return Scene(combination, radius, start, travel)


def training_scene(index: int, generator: random.Random) -> Scene:
    """A random scene of the training combination number `index`, counted cyclically."""
    choices = training_combinations()
    return random_scene(choices[index % len(choices)], generator)


def _signed_distance(
    shape: str,
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """The distance of points to the outline of `shape`, negative inside. x, y and the result have
    one shape and are in units of the radius."""
    corners = SHAPES[shape]
    if corners is None:
        return torch.sqrt(x * x + y * y) - 1
    nearest = torch.full_like(x, math.inf)  # squared
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex = x1 - x0
        ey = y1 - y0
        along = ((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey)
        along = along.clamp(0, 1)  # the nearest point of the edge, from its first corner on
        dx = x - x0 - along * ex
        dy = y - y0 - along * ey
        nearest = torch.minimum(nearest, dx**2 + dy**2)
        if y0 != y1:  # a ray to the right that crosses this edge changes sides
            crosses = (y0 <= y) != (y1 <= y)
            inside ^= crosses & (x < x0 + (y - y0) * ex / ey)
    return nearest.sqrt() * torch.where(inside, -1.0, 1.0)


def coverage(
    shape: str,
    center_x: Tensor,
    center_y: Tensor,
    radius: float,
    window: tuple[int, int, int, int],
) -> Tensor:
    """The share of each pixel that `shape` covers, anti-aliased: fp32 [F, height, width] in 0..1.

    center_x, center_y: fp32 [F] in pixels. window: (top, left, height, width) in pixels.
    """
    top, left, height, width = window
    rows = torch.arange(height) + top + 0.5
    columns = torch.arange(width) + left + 0.5
    y = rows[None, :, None] - center_y[:, None, None]  # [F, height, 1]
    x = columns[None, None, :] - center_x[:, None, None]  # [F, 1, width]
    x, y = torch.broadcast_tensors(x / radius, y / radius)  # [F, height, width]
    return (0.5 - _signed_distance(shape, x, y) * radius).clamp(0, 1)


def draw(
    scene: Scene,
    frames: Sequence[int] = range(FRAMES),
    window: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """The given frames of a scene, or a window (top, left, height, width) of them.

    uint8 [F, height, width, 3].
    """
    window = window or (0, 0, HEIGHT, WIDTH)
    words = scene.combination
    dx, dy = MOTIONS[words.motion]
    along = torch.tensor([i / (FRAMES - 1) for i in frames]) * scene.travel  # [F]
    x = scene.start[0] + dx * along
    y = scene.start[1] + dy * along
    share = coverage(
        words.shape,
        x,
        y,
        scene.radius,
        window,
    )[..., None]  # [F, height, width, 1]
    front = torch.tensor(OBJECT_COLORS[words.color])
    back = torch.tensor(BACKGROUNDS[words.background])
    return (back + share * (front - back)).round().to(torch.uint8)  # [F, height, width, 3]
