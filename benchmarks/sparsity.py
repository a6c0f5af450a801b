# SPDX-License-Identifier: Apache-2.0
"""What NABLA's sparsity costs on learned weights: clips of the bundled model at several values of
keep_mass beside clips with dense attention, from the same noise.

    python -m benchmarks.sparsity [--count 96] [--steps 16] [--folder FOLDER] [--json FILE]
    [--picture FILE]

For every keep_mass it reports the share of blocks kept by layer and step, PSNR and SSIM of the
frames against those of dense attention, and how many prompts the clips follow.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky_model import pipeline
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.inspection import Watch
from kandinsky_model.media import chart
from kandinsky_model.pipeline import Kandinsky5
from kandinsky_model.tiny import scenes
from kandinsky_model.tiny.check import judged, psnr, shares

RESULTS = Path(__file__).with_name("results")
MASSES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH = 8
LUMA = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64)  # of red, green and blue, BT.601


def ssim(frames: Tensor, others: Tensor) -> float:
    """Mean structural similarity of two videos, uint8 [F, H, W, 3].

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", on
    luma, with their Gaussian window of 11 x 11 pixels and standard deviation 1.5.
    """
    x = torch.tensordot(frames.double(), LUMA, 1)[:, None]  # [F, 1, H, W]
    y = torch.tensordot(others.double(), LUMA, 1)[:, None]
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2  # [1, 1, 11, 11]

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(z, window)

    mean_x, mean_y = mean(x), mean(y)
    variance_x = mean(x * x) - mean_x * mean_x
    variance_y = mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    a = (0.01 * 255) ** 2
    b = (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + a) / (mean_x * mean_x + mean_y * mean_y + a)
    structure = (2 * covariance + b) / (variance_x + variance_y + b)
    return (luminance * structure).mean().item()


@dataclass(frozen=True)
class Drawn:
    """The clips of one keep_mass."""

    samples: list[dict]  # what the judge of the bundled model says of each clip
    frames: list[Tensor]  # of each clip, uint8 [F, H, W, 3]
    density: Tensor | None  # kept share of blocks, [layers, steps]; None for dense attention


def draw(
    model: Kandinsky5,
    combinations: Sequence[scenes.Combination],
    keep_mass: float | None,
    steps: int,
    seed: int = 0,
) -> Drawn:
    """Draw a clip for each combination of words; ``keep_mass`` None asks for dense attention."""
    preset = model.preset
    model.preset = replace(preset, nabla=replace(preset.nabla, keep_mass=keep_mass or 1.0))
    attention = "nabla" if keep_mass else "dense"
    samples, frames, densities = [], [], []
    for start in range(0, len(combinations), BATCH):
        wanted = combinations[start : start + BATCH]
        prompts = [scenes.prompt(combination) for combination in wanted]
        with Watch(model.dit, 2) as watch:
            videos = model.generate(
                prompts, seed=seed + start, num_inference_steps=steps, attention=attention
            )
        frames += [video.frames for video in videos]
        samples += [judged(*each) for each in zip(wanted, prompts, videos, strict=True)]
        if keep_mass:
            density = watch.density.mean((2, 3))  # [layers, steps]
            densities += [density] * len(wanted)
    model.preset = preset
    return Drawn(samples, frames, torch.stack(densities).mean(0) if densities else None)


def measure(
    folder: Path = TINY,
    count: int = 96,
    steps: int = 16,
    masses: Sequence[float] = MASSES,
    seed: int = 0,
) -> dict:
    """The whole measurement as the result file holds it, with one row for each keep_mass.

    ``count`` prompts that training never saw; they come again from other noise after the last.
    """
    model = pipeline.load(folder)
    combinations = list(islice(cycle(scenes.held_out()), count))
    dense = draw(model, combinations, None, steps, seed)
    rows = []
    for mass in masses:
        sparse = draw(model, combinations, mass, steps, seed)
        pairs = list(zip(sparse.frames, dense.frames, strict=True))
        near = sorted(psnr(*pair) for pair in pairs)
        alike = [ssim(*pair) for pair in pairs]
        rows.append(
            {
                "keep_mass": mass,
                **shares(sparse.samples),
                "psnr": near[len(near) // 2],
                "psnr_worst": near[0],
                "ssim": sum(alike) / len(alike),
                "density": sparse.density.mean().item(),
                "density_by_layer_and_step": sparse.density.tolist(),
            }
        )
    return {
        "prompts": count,
        "steps": steps,
        "guidance": model.preset.guidance,
        "seed": seed,
        "window": list(model.preset.nabla.window),
        "dense": shares(dense.samples),
        "rows": rows,
    }


def table(result: dict) -> list[str]:
    """The result as the lines of a table in Markdown."""
    lines = [
        "| keep_mass | kept blocks | PSNR to dense, median / worst | SSIM to dense | shape | "
        "motion | colours | all four words |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        likeness = f"{row['psnr']:.1f} / {row['psnr_worst']:.1f} dB | {row['ssim']:.3f}"
        lines.append(
            f"| {row['keep_mass']:g} | {row['density']:.1%} | {likeness} | {_words(row)} |"
        )
    return [*lines, f"| dense | - | - | - | {_words(result['dense'])} |"]


def _words(row: dict) -> str:
    words = ("shape", "motion", "color_and_background", "all")
    return " | ".join(f"{row[word]:.1%}" for word in words)


def picture(result: dict):
    """The result as a matplotlib figure of four charts in a row."""
    rows = result["rows"]
    shown = next((row for row in rows if row["keep_mass"] == 0.9), rows[0])
    layers = range(len(shown["density_by_layer_and_step"]))

    def over_mass(value):
        return [(row["keep_mass"], value(row)) for row in rows]

    def density_of(layer):
        return lambda row: sum(row["density_by_layer_and_step"][layer]) / result["steps"]

    by_layer = {f"layer {i}": over_mass(density_of(i)) for i in layers}
    by_step = {f"layer {i}": list(enumerate(shown["density_by_layer_and_step"][i])) for i in layers}
    words = {
        word: over_mass(lambda row, word=word: row[word])
        for word in ("color", "shape", "motion", "all")
    }
    near = {"SSIM": over_mass(lambda row: row["ssim"])}
    mass = "keep_mass"
    kept = "share of all blocks"
    whole = (0, 1.04)
    charts = (  # title, x axis, y axis, range of y (None: that of the numbers), curves
        ("Kept blocks", mass, kept, whole, by_layer),
        (f"Kept blocks at keep_mass {shown['keep_mass']:g}", "step", kept, None, by_step),
        ("Likeness to dense attention", mass, "SSIM", None, near),
        ("Prompts followed", mass, "share of prompts", whole, words),
    )
    figure = chart.figure(4 * 420, 320)
    for axes, (title, x, y, limits, curves) in zip(figure.subplots(1, 4), charts, strict=True):
        chart.describe(axes, title, x, y)
        chart.curves(axes, curves)
        axes.set_ylim(limits)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=TINY, help="folder of the model")
    parser.add_argument(
        "--count",
        type=int,
        default=96,
        help="prompts that training never saw; after 48 they come again (default: 96)",
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path, default=RESULTS / "tiny_sparsity.json")
    parser.add_argument("--picture", type=Path, default=RESULTS / "tiny_sparsity.png")
    options = parser.parse_args()
    chart.require()
    result = measure(options.folder, options.count, options.steps)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    picture(result).savefig(options.picture)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
