# SPDX-License-Identifier: Apache-2.0
"""Judges a clip of the bundled model: which colour, shape, background and motion it shows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from .scenes import MOTIONS, PALETTE, SHAPES, coverage


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; a word is "none" where nothing of the kind could be measured."""

    color: str
    shape: str
    motion: str
    background: str
    travel: tuple = (0.0, 0.0)
    overlap: float = 0.0


def _nearest_color(rgb):
    return min(
        PALETTE,
        key=lambda name: sum((float(a) - b) ** 2 for a, b in zip(rgb, PALETTE[name], strict=True)),
    )


def _best_shape(mask, center):
    """Compare a mask [H, W] with every outline redrawn at the same centroid and area. Returns
    (word, intersection over union)."""
    area = float(mask.sum())
    margin = int(math.sqrt(area) / 2)  # an outline of this area may reach beyond the mask
    rows, columns = (mask.any(1).nonzero()[[0, -1], 0], mask.any(0).nonzero()[[0, -1], 0])
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
    mask = mask[top : int(rows[1]) + margin + 1, left : int(columns[1]) + margin + 1]
    scores = {}
    for shape, corners in SHAPES.items():
        unit = math.pi if corners is None else _area(corners)
        x, y = torch.tensor(center)[:, None]
        redrawn = coverage(shape, x, y, math.sqrt(area / unit), (top, left, *mask.shape))[0] >= 0.5
        scores[shape] = float((redrawn & mask).sum()) / max(1.0, float((redrawn | mask).sum()))
    best = max(scores, key=scores.get)
    return (best if scores[best] >= 0.75 else "none"), scores[best]


def _area(corners):
    return (
        abs(
            sum(
                x0 * y1 - x1 * y0
                for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True)
            )
        )
        / 2
    )


def judge(frames):
    """Measure a clip: uint8 [F, H, W, 3] -> Verdict, from the first, middle and last frame, by
    arithmetic alone.

    Background: palette colour nearest to the median of the border. Object: pixels further than 55
    (RGB) from it, 1 to 50 % of the frame. Colour: palette colour nearest to the object's median.
    Shape: the outline with the best overlap, at least 0.75, in at least two of three frames.
    Motion: the axis along which the centroid moves, still below 20 px, none when it moves
    diagonally. Raises ValueError for another layout or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"judge needs frames uint8 [F, H, W, 3], got {frames.dtype} "
            f"{tuple(frames.shape)}: convert the clip to 8-bit RGB"
        )
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]].float()  # [3, H, W, 3]
    sides = (chosen[:, :4], chosen[:, -4:], chosen[:, :, :4], chosen[:, :, -4:])
    border = torch.cat([side.flatten(0, 2) for side in sides])  # [pixels, 3]
    ground = border.median(0).values
    background = _nearest_color(ground)
    masks = (chosen - ground).square().sum(-1).sqrt() > 55  # [3, H, W]
    share = masks.float().mean((1, 2))
    if share.min() < 0.01 or share.max() > 0.5:
        return Verdict("none", "none", "none", background)
    color = _nearest_color(chosen[masks].median(0).values)
    rows, columns = torch.arange(masks.shape[1]) + 0.5, torch.arange(masks.shape[2]) + 0.5
    centers = [
        (float((m.sum(0) * columns).sum() / m.sum()), float((m.sum(1) * rows).sum() / m.sum()))
        for m in masks
    ]
    seen = [_best_shape(m, c) for m, c in zip(masks, centers, strict=True)]
    shape, votes = Counter(word for word, _ in seen).most_common(1)[0]
    travel = (centers[-1][0] - centers[0][0], centers[-1][1] - centers[0][1])
    overlap = sum(score for _, score in seen) / len(seen)
    return Verdict(
        color, shape if votes >= 2 else "none", _direction(travel), background, travel, overlap
    )


def _direction(travel):
    long, short = max(map(abs, travel)), min(map(abs, travel))
    if long < 20:
        return "still"
    if short > long / 2:
        return "none"
    return max(
        MOTIONS, key=lambda word: MOTIONS[word][0] * travel[0] + MOTIONS[word][1] * travel[1]
    )


def marks(verdict, combination):
    """Which of the four words a verdict got right: {"color": bool, "shape": ..., "motion": ...,
    "background": ...}."""
    return {
        word: getattr(verdict, word) == getattr(combination, word)
        for word in ("color", "shape", "motion", "background")
    }
