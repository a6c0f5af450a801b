# SPDX-License-Identifier: Apache-2.0
"""A judge without a network: which colour, shape, background and motion a clip shows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import MOTIONS, PALETTE, SHAPES, Combination, coverage

WORDS = ("color", "background", "shape", "motion")
NONE = "none"  # stands for a word where nothing of the kind could be measured
BORDER = 4  # pixels along each side that are taken for background
CONTRAST = 55  # distance in RGB from the background, from which a pixel belongs to the object
OBJECT_SHARE = (0.01, 0.5)  # of the frame that an object covers
LEAST_OVERLAP = 0.75  # intersection over union with an outline, from which it is that shape
LEAST_TRAVEL = 20  # pixels between first and last frame, from which an object moves


@dataclass(frozen=True)
class Verdict:
    """What a clip shows. travel: of the object's centroid, (x, y) in pixels. overlap: of the object
    with the outline of the shape, a mean over frames."""

    color: str
    shape: str
    motion: str
    background: str
    travel: tuple[float, float] = (0.0, 0.0)
    overlap: float = 0.0


def judge(frames: Tensor) -> Verdict:
    """Measure the first, middle and last frame of a clip, uint8 [F, H, W, 3].

    Background: the palette's colour nearest to the median of the border. Object: the pixels that
    are far from the background. Colour: the palette's colour nearest to the object's median. Shape:
    the outline with the best overlap, in at least two of the three frames. Motion: the axis along
    which the centroid moves; "none" when it moves diagonally. Raises ValueError for another layout
    or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"judge needs frames uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}: "
            "convert the clip to 8-bit RGB"
        )
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]].float()  # [3, H, W, 3]
    sides = (
        chosen[:, :BORDER],
        chosen[:, -BORDER:],
        chosen[:, :, :BORDER],
        chosen[:, :, -BORDER:],
    )
    border = torch.cat([side.flatten(0, 2) for side in sides])  # [pixels, 3]
    ground = border.median(0).values  # [3]
    background = _nearest_color(ground)
    masks = (chosen - ground).square().sum(-1).sqrt() > CONTRAST  # [3, H, W]
    share = masks.float().mean((1, 2))  # [3]
    if share.min() < OBJECT_SHARE[0] or share.max() > OBJECT_SHARE[1]:
        return Verdict(NONE, NONE, NONE, background)

    centers = [_centroid(mask) for mask in masks]
    outlines = [_best_shape(mask, center) for mask, center in zip(masks, centers, strict=True)]
    shape, votes = Counter(word for word, _ in outlines).most_common(1)[0]
    (x0, y0), (x1, y1) = centers[0], centers[-1]
    travel = (x1 - x0, y1 - y0)
    return Verdict(
        color=_nearest_color(chosen[masks].median(0).values),
        shape=shape if votes >= 2 else NONE,
        motion=_direction(travel),
        background=background,
        travel=travel,
        overlap=sum(overlap for _, overlap in outlines) / len(outlines),
    )


def marks(verdict: Verdict, combination: Combination) -> dict[str, bool]:
    """Whether each word of a combination is the one that was seen."""
    return {word: getattr(verdict, word) == getattr(combination, word) for word in WORDS}


def _nearest_color(rgb: Tensor) -> str:
    def distance(name: str) -> float:
        return sum((float(a) - b) ** 2 for a, b in zip(rgb, PALETTE[name], strict=True))

    return min(PALETTE, key=distance)


def _centroid(mask: Tensor) -> tuple[float, float]:
    """(x, y) in pixels of a mask [H, W]."""
    rows = torch.arange(mask.shape[0]) + 0.5
    columns = torch.arange(mask.shape[1]) + 0.5
    x = (mask.sum(0) * columns).sum() / mask.sum()
    y = (mask.sum(1) * rows).sum() / mask.sum()
    return float(x), float(y)


def _best_shape(mask: Tensor, center: tuple[float, float]) -> tuple[str, float]:
    """Compare a mask [H, W] with every outline, drawn at the same centroid and of the same area.

    Returns the word and the intersection over union.
    """
    area = float(mask.sum())
    # Only a window around the mask is drawn; an outline of its area may reach a little beyond it.
    margin = int(math.sqrt(area) / 2)
    rows = mask.any(1).nonzero()[:, 0]
    columns = mask.any(0).nonzero()[:, 0]
    top = max(0, int(rows[0]) - margin)
    left = max(0, int(columns[0]) - margin)
    mask = mask[top : int(rows[-1]) + margin + 1, left : int(columns[-1]) + margin + 1]
    x, y = torch.tensor(center)[:, None]
    scores = {}
    for shape, corners in SHAPES.items():
        unit = math.pi if corners is None else _area(corners)
        radius = math.sqrt(area / unit)
        redrawn = (
            coverage(
                shape,
                x,
                y,
                radius,
                (top, left, *mask.shape),
            )[0]
            >= 0.5
        )
        union = float((redrawn | mask).sum())
        scores[shape] = float((redrawn & mask).sum()) / max(1.0, union)
    best = max(scores, key=scores.__getitem__)
    return (best if scores[best] >= LEAST_OVERLAP else NONE), scores[best]


def _area(corners: list[tuple[float, float]]) -> float:
    """Of a polygon, by the shoelace formula."""
    following = corners[1:] + corners[:1]
    twice = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, following, strict=True))
    return abs(twice) / 2


def _direction(travel: tuple[float, float]) -> str:
    long = max(map(abs, travel))
    short = min(map(abs, travel))
    if long < LEAST_TRAVEL:
        return "still"
    if short > long / 2:
        return NONE

    def along(word: str) -> float:
        dx, dy = MOTIONS[word]
        return dx * travel[0] + dy * travel[1]

    return max(MOTIONS, key=along)
