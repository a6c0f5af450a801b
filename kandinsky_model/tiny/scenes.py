# SPDX-License-Identifier: Apache-2.0
"""Procedurally drawn clips: one flat shape in front of one flat background, moving or not.

They are the training data of the bundled tiny checkpoint, the prompts that describe them, the list
of combinations that training never sees, and a judge that measures what a clip shows without any
network.
"""

import functools
import hashlib
import itertools
import math
from dataclasses import dataclass

import torch

HEIGHT = WIDTH = 160
FRAMES = 17

# RGB 0..255; every object colour is at least 110 (Euclidean) away from every other colour it can
# meet.
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
# unit vectors (x, y), y down
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
HELD_OUT = 48
REACH = 1.45  # no outline is further than this from its centroid, in radii


def _regular(count, radius, inner=None, phase=-math.pi / 2):
    """Vertices of a regular polygon, or of a star when `inner` is given; first vertex on top."""
    corners = 2 * count if inner else count
    radii = [inner if inner and i % 2 else radius for i in range(corners)]
    return [
        (
            r * math.cos(phase + 2 * math.pi * i / corners),
            r * math.sin(phase + 2 * math.pi * i / corners),
        )
        for i, r in enumerate(radii)
    ]


# Outline in units of the radius, area centroid at the origin; None is the disc.
SHAPES = {
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
    """A combination with its random numbers fixed: radius and centre path in pixels."""

    combination: Combination
    radius: float
    start: tuple
    travel: float


@functools.cache
def combinations():
    """Every drawable combination (object and background colours differ), in a fixed order."""
    product = itertools.product(OBJECT_COLORS, SHAPES, MOTIONS, BACKGROUNDS)
    return tuple(Combination(*words) for words in product if words[0] != words[3])


@functools.cache
def held_out():
    """The 48 combinations no training clip shows: the first ones by SHA-256 of their words, so the
    list never changes."""

    def key(c):
        return hashlib.sha256(f"{c.color} {c.shape} {c.motion} {c.background}".encode()).hexdigest()

    return tuple(sorted(combinations(), key=key)[:HELD_OUT])


@functools.cache
def training_combinations():
    """Every combination that is not held out."""
    hidden = set(held_out())
    return tuple(c for c in combinations() if c not in hidden)


_FULL = (
    "{a} {color} {shape} {verb} on a {background} background",
    "{color} {shape} {verb}, {background} background",
    "on a {background} background {a} {color} {shape} is {verb}",
    "{a} {color} {shape} in front of a {background} background, {verb}",
)
FULL = len(_FULL)  # templates that name all four words come first
_PARTIAL = (
    "{a} {color} {shape} {verb}",
    "{a} {color} {shape} on a {background} background",
    "{a} {color} {shape}",
)


def prompt(combination, template=0):
    """English for a combination. Templates 0..3 name all four words; 4..6 leave motion or
    background open."""
    text = (_FULL + _PARTIAL)[template]
    verb = "standing still" if combination.motion == "still" else f"moving {combination.motion}"
    article = "an" if combination.color[0] in "aeiou" else "a"
    return text.format(
        a=article,
        color=combination.color,
        shape=combination.shape,
        verb=verb,
        background=combination.background,
    )


def random_prompt(combination, generator):
    """A random wording; one in eight leaves something open. `generator` is a random.Random."""
    if generator.random() < 0.125:
        return prompt(combination, FULL + generator.randrange(len(_PARTIAL)))
    return prompt(combination, generator.randrange(FULL))


def random_scene(combination, generator):
    """Radius 30 +- 2 px, path 46 +- 4 px long with its middle within 6 px of the frame's.
    `generator` is a random.Random."""
    radius, travel = 30 + generator.uniform(-2, 2), 46 + generator.uniform(-4, 4)
    middle = [side / 2 + generator.uniform(-6, 6) for side in (WIDTH, HEIGHT)]
    start = tuple(
        m - direction * travel / 2
        for m, direction in zip(middle, MOTIONS[combination.motion], strict=True)
    )
    return Scene(combination, radius, start, travel)


def _signed_distance(shape, x, y):
    """Distance in radii to the outline of `shape`, negative inside. x, y: same shape, in units of
    the radius."""
    corners = SHAPES[shape]
    if corners is None:
        return torch.sqrt(x * x + y * y) - 1
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = (((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - x0 - along * ex) ** 2 + (y - y0 - along * ey) ** 2)
        if y0 != y1:  # even-odd rule along the ray to the right
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * ex / ey)
    return nearest.sqrt() * torch.where(inside, -1.0, 1.0)


def coverage(shape, center_x, center_y, radius, window):
    """Anti-aliased share of each pixel that `shape` covers.

    center_x, center_y: fp32 [F] in pixels; window = (top, left, height, width) in pixels. Returns
    fp32 [F, height, width] in 0..1.
    """
    top, left, height, width = window
    # [F, height, 1]
    y = (torch.arange(height) + top + 0.5)[None, :, None] - center_y[:, None, None]
    x = (torch.arange(width) + left + 0.5)[None, None, :] - center_x[:, None, None]  # [F, 1, width]
    x, y = torch.broadcast_tensors(x / radius, y / radius)
    return (0.5 - _signed_distance(shape, x, y) * radius).clamp(0, 1)


def draw(scene, frames=range(FRAMES), window=None):
    """Draw the named frames of a scene, or a window (top, left, height, width) of them. Returns
    uint8 [F, height, width, 3]."""
    window = window or (0, 0, HEIGHT, WIDTH)
    words = scene.combination
    dx, dy = MOTIONS[words.motion]
    along = torch.tensor([i / (FRAMES - 1) for i in frames]) * scene.travel
    share = coverage(
        words.shape, scene.start[0] + dx * along, scene.start[1] + dy * along, scene.radius, window
    )[..., None]
    front, back = (
        torch.tensor(OBJECT_COLORS[words.color]),
        torch.tensor(BACKGROUNDS[words.background]),
    )
    return (back + share * (front - back)).round().to(torch.uint8)  # [F, height, width, 3]


def training_scene(index, generator):
    """A random scene of the training combinations; `index` picks the combination cyclically."""
    choices = training_combinations()
    return random_scene(choices[index % len(choices)], generator)
