# SPDX-License-Identifier: Apache-2.0
"""What NABLA's sparsity costs on learned weights: the tiny checkpoint at several keep_mass beside
dense attention, from the same noise.

    python -m benchmarks.sparsity [--count 96] [--steps 16] [--folder FOLDER] [--json FILE]
    [--picture FILE]

Written: of every keep_mass the kept share of blocks by layer and step, PSNR and SSIM of the frames
to those of dense attention, and how many prompts each follows.
"""

import argparse
import json
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F

from kandinsky_model import pipeline
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.inspection import Watch
from kandinsky_model.media import chart
from kandinsky_model.tiny import scenes as shapes
from kandinsky_model.tiny.check import judged, psnr, shares

RESULTS = Path(__file__).with_name("results")
MASSES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH = 8
LUMA = (0.299, 0.587, 0.114)


def ssim(frames, others):
    """Mean structural similarity of two uint8 videos [F, H, W, 3] (Wang et al. 2004): luma, 11 x 11
    Gaussian window of deviation 1.5."""
    x, y = (
        torch.tensordot(video.double(), torch.tensor(LUMA, dtype=torch.float64), 1)[:, None]
        for video in (frames, others)
    )
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(z):
        return F.conv2d(z, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (
        ((2 * mx * my + a) * (2 * cov + b) / ((mx * mx + my * my + a) * (vx + vy + b)))
        .mean()
        .item()
    )


def run(model, combinations, keep_mass, steps, seed=0):
    """(samples as `judged`, frames of each, kept share of blocks [layer][step] or None) at a
    keep_mass, or with dense attention at None."""
    preset = model.preset
    nabla = replace(preset.nabla, keep_mass=keep_mass or 1.0)
    model.preset, settings = (
        replace(preset, nabla=nabla),
        dict(num_inference_steps=steps, attention="nabla" if keep_mass else "dense"),
    )
    samples, clips, densities = [], [], []
    for start in range(0, len(combinations), BATCH):
        wanted = combinations[start : start + BATCH]
        prompts = [shapes.prompt(c) for c in wanted]
        with Watch(model.dit, 2) as watch:
            videos = model.generate(prompts, seed=seed + start, **settings)
        clips += [video.frames for video in videos]
        samples += [judged(*each) for each in zip(wanted, prompts, videos, strict=True)]
        if keep_mass:
            densities += [watch.density.mean((2, 3))] * len(wanted)
    model.preset = preset
    return samples, clips, torch.stack(densities).mean(0) if densities else None


def measure(folder=TINY, count=96, steps=16, masses=MASSES, seed=0):
    """{"prompts", "steps", "dense": shares, "rows": one for each keep_mass}, and the folder's
    name."""
    model = pipeline.load(folder)
    combinations = list(islice(cycle(shapes.held_out()), count))
    dense, reference, _ = run(model, combinations, None, steps, seed)
    rows = []
    for mass in masses:
        samples, clips, density = run(model, combinations, mass, steps, seed)
        near = [psnr(clip, other) for clip, other in zip(clips, reference, strict=True)]
        alike = [ssim(clip, other) for clip, other in zip(clips, reference, strict=True)]
        rows.append(
            {
                "keep_mass": mass,
                **shares(samples),
                "psnr": sorted(near)[len(near) // 2],
                "psnr_worst": min(near),
                "ssim": sum(alike) / len(alike),
                "density": density.mean().item(),
                "density_by_layer_and_step": density.tolist(),
            }
        )
    return {
        "prompts": count,
        "steps": steps,
        "guidance": model.preset.guidance,
        "seed": seed,
        "window": list(model.preset.nabla.window),
        "dense": shares(dense),
        "rows": rows,
    }


def table(result):
    """The result as lines of a Markdown table."""
    lines = [
        "| keep_mass | kept blocks | PSNR to dense, median / worst | SSIM to dense | shape | "
        "motion | colours | all four words |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['keep_mass']:g} | {row['density']:.1%} | {row['psnr']:.1f} / "
            f"{row['psnr_worst']:.1f} dB | {row['ssim']:.3f} "
            f"| {_words(row)} |"
        )
    return [*lines, f"| dense | - | - | - | {_words(result['dense'])} |"]


def _words(row):
    return " | ".join(
        f"{row[word]:.1%}" for word in ("shape", "motion", "color_and_background", "all")
    )


def picture(result):
    """A figure of four charts in a row."""
    rows, own = result["rows"], max(result["rows"], key=lambda row: row["keep_mass"] == 0.9)
    layers = range(len(own["density_by_layer_and_step"]))

    def over_mass(value):
        return [(row["keep_mass"], value(row)) for row in rows]

    by_layer = {
        f"layer {i}": over_mass(
            lambda row, i=i: sum(row["density_by_layer_and_step"][i]) / result["steps"]
        )
        for i in layers
    }
    by_step = {f"layer {i}": list(enumerate(own["density_by_layer_and_step"][i])) for i in layers}
    words = {
        word: over_mass(lambda row, word=word: row[word])
        for word in ("color", "shape", "motion", "all")
    }
    mass, kept = "keep_mass", "share of all blocks"
    near = {"SSIM": over_mass(lambda row: row["ssim"])}
    whole = (0, 1.04)
    charts = (  # title, x, y, its range (None: of the numbers), curves
        ("Kept blocks", mass, kept, whole, by_layer),
        (f"Kept blocks at keep_mass {own['keep_mass']:g}", "step", kept, None, by_step),
        ("Likeness to dense attention", mass, "SSIM", None, near),
        ("Prompts followed", mass, "share of prompts", whole, words),
    )
    figure = chart.figure(4 * 420, 320)
    for axes, (title, x, y, limits, curves) in zip(figure.subplots(1, 4), charts, strict=True):
        chart.describe(axes, title, x, y)
        chart.curves(axes, curves)
        axes.set_ylim(limits)
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument(
        "--count",
        type=int,
        default=96,
        help="prompts that training never saw; after 48 they come again",
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
