# SPDX-License-Identifier: Apache-2.0
"""Folders to train on, small clips of drawn shapes with captions, and the options of a small
training."""

import random
from pathlib import Path

from kandinsky_model.media import video
from kandinsky_model.tiny import scenes

SMALL = [
    *("--size", "64x64"),
    *("--frames", "5"),
    *("--lora-rank", "4"),
    *("--batch", "2"),
    *("--passes", "2"),
    *("--rate", "1e-2"),
    *("--warmup", "2"),
    *("--device", "cpu"),
]


def clips(folder: Path, count: int = 4, frames: int = 5, window=(32, 32, 96, 80)) -> Path:
    """`count` clips of `frames` frames with captions; window: the part of the frame they show."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(1)
    for i in range(count):
        scene = scenes.training_scene(37 * i, generator)
        drawn = scenes.draw(scene, range(frames), window)
        video.save(drawn, folder / f"clip{i}.mp4")
        (folder / f"clip{i}.txt").write_text(scenes.prompt(scene.combination) + "\n")
    return folder


def pictures(folder: Path, count: int = 2) -> Path:
    """`count` pictures of 64 x 64 pixels with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(2)
    for i in range(count):
        scene = scenes.training_scene(41 * i, generator)
        drawn = scenes.draw(scene, [0], (48, 48, 64, 64))
        video.save(drawn, folder / f"picture{i}.png")
        (folder / f"picture{i}.txt").write_text(scenes.prompt(scene.combination) + "\n")
    return folder
