# SPDX-License-Identifier: Apache-2.0
"""What runs of the released checkpoints are predicted to need on a GPU, by the accounting that
`kandinsky generate --memory` plans with.

``python -m benchmarks.budgets`` prints a table; ``python -m benchmarks.budgets --budget 12GB
t2v-pro-sft-5s`` the plan of one run. Nothing is measured: the networks have shapes and dtypes only.
"""

import argparse
from functools import cache

import torch

from kandinsky_model.checkpoints.load import FP32_NAMES
from kandinsky_model.config import PRESETS, DiTConfig, Preset, VAEConfig
from kandinsky_model.devices.available import parse_bytes
from kandinsky_model.devices.budget import Placement, Way, Weights, choose_ways
from kandinsky_model.dit.accounting import Job
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.placement import ways_to_run
from kandinsky_model.sampling.settings import default_policy
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

# Qwen2.5-VL-7B in bf16 without its head and vision part (28 decoder layers, the table of tokens),
# and CLIP-L's text model in fp32.
QWEN_LAYERS, QWEN_TABLE, CLIP = (2 * 233_057_792,) * 28, 2 * 152_064 * 3584, 4 * 123_060_480
FLUX_VAE = 2 * 83_819_683
BUDGETS = ("8GB", "12GB", "24GB")
ROWS = [
    (f"t2v-{name}", policy)
    for name in (
        "lite-sft-5s",
        "lite-sft-10s",
        "pro-sft-5s",
        "pro-sft-10s",
        "pro-sft-5s-hd",
        "pro-sft-10s-hd",
    )
    for policy in ("official", "global")
] + [("t2i-lite-sft", "global"), ("i2i-lite-sft", "global")]


@cache
def dit_weights(config: DiTConfig) -> Weights:
    with torch.device("meta"):
        dit = DiffusionTransformer3D(config).bfloat16()
    for name, parameter in dit.named_parameters():
        if any(part in name for part in FP32_NAMES):
            parameter.data = parameter.data.float()
    return Weights.of(dit)


@cache
def video_vae(config: VAEConfig) -> HunyuanVideoVAE:
    with torch.device("meta"):
        return HunyuanVideoVAE(config).bfloat16()


def networks(preset: Preset) -> dict[str, Weights]:
    vae = Weights.of(video_vae(preset.vae)) if preset.vae else Weights(rest=FLUX_VAE)
    return {
        "text": Weights(QWEN_LAYERS, QWEN_TABLE, CLIP),
        "dit": dit_weights(preset.dit),
        "vae": vae,
    }


def ways(preset: Preset, policy: str | None = None) -> dict[str, list[Way]]:
    """Those of a preset's default run."""
    height, width = preset.sizes[0]
    grid = Grid((preset.frames - 1) // 4 + 1, height // 16, width // 16)
    job = Job(
        preset.dit,
        grid,
        steps=preset.steps,
        guided=preset.guidance != 1,
        nabla=preset.nabla is not None,
        text_tokens=preset.text_max_length,
    )
    policy = policy or default_policy(preset.frames, height, width)
    return ways_to_run(
        networks(preset),
        job,
        preset.vae and video_vae(preset.vae),
        policy,
        pictures=preset.task in ("i2v", "i2i"),
    )


def plan(preset: Preset, budget: int, policy: str | None = None) -> Placement:
    """ValueError where the budget does not suffice."""
    return choose_ways(ways(preset, policy), host_bytes(preset), budget)


def host_bytes(preset: Preset) -> int:
    return sum(weights.total for weights in networks(preset).values())


def table() -> str:
    """In Markdown."""
    lines = [
        f"| run, decoding | least | weights in host memory | {' | '.join(BUDGETS)} |",
        "|---|---:|---:|" + "---|" * len(BUDGETS),
    ]
    for name, policy in ROWS:
        preset, stages = PRESETS[name], ways(PRESETS[name], policy)
        least = max(min(stage.peak_bytes for stage in one) for one in stages.values())
        cells = [cell(preset, parse_bytes(budget), policy) for budget in BUDGETS]
        lines.append(
            f"| {name}, {policy} | {least / 1e9:.1f} GB | {host_bytes(preset) / 1e9:.1f} "
            f"GB | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def cell(preset: Preset, budget: int, policy: str) -> str:
    try:
        chosen = plan(preset, budget, policy)
    except ValueError:
        return "-"
    sampling, count = chosen.stages["sampling"], len(dit_weights(preset.dit).layers)
    if chosen.together:
        return f"{chosen.peak_bytes / 1e9:.1f} GB, nothing moves"
    layers = (
        "all resident"
        if sampling.resident == count
        else (f"{count - sampling.resident} of {count} streamed")
    )
    decoding, scheme = (
        chosen.stages["decoding"],
        chosen.stages["decoding"].how.removesuffix(" for each tile"),
    )
    return (
        f"{sampling.peak_bytes / 1e9:.1f} GB, {layers}; {decoding.peak_bytes / 1e9:.1f} GB, "
        f"{scheme}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "preset",
        nargs="?",
        choices=[name for name in PRESETS if name != "tiny"],
        help="default: a table of several",
    )
    parser.add_argument(
        "--budget",
        type=parse_bytes,
        default=12 * 10**9,
        metavar="SIZE",
        help="of one preset's plan (default: 12GB)",
    )
    parser.add_argument(
        "--policy", choices=("global", "official"), help="of decoding (default: by the clip's size)"
    )
    options = parser.parse_args()
    print(
        plan(PRESETS[options.preset], options.budget, options.policy) if options.preset else table()
    )


if __name__ == "__main__":
    main()
