# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory runs of the released checkpoints are predicted to need, worked out by the
same planner as ``kandinsky generate --memory``.

``python -m benchmarks.budgets`` prints a table of several presets.
``python -m benchmarks.budgets --budget 12GB t2v-pro-sft-5s`` prints the placement of one run.

Nothing is measured: the networks live on the meta device, with shapes and dtypes but no weights.
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

# Bytes of the text encoders. Qwen2.5-VL-7B runs in bf16 without its head and its vision part:
QWEN_LAYERS = (2 * 233_057_792,) * 28
QWEN_TABLE = 2 * 152_064 * 3584  # the embeddings of its vocabulary
CLIP = 4 * 123_060_480  # CLIP-L's text model, in fp32
# Bytes of FLUX.1's VAE in bf16, which the image presets use.
FLUX_VAE = 2 * 83_819_683

BUDGETS = ("8GB", "12GB", "24GB")  # columns of the table
VIDEO_PRESETS = (
    "t2v-lite-sft-5s",
    "t2v-lite-sft-10s",
    "t2v-pro-sft-5s",
    "t2v-pro-sft-10s",
    "t2v-pro-sft-5s-hd",
    "t2v-pro-sft-10s-hd",
)
# Rows of the table: preset and policy of decoding.
ROWS = [(name, policy) for name in VIDEO_PRESETS for policy in ("official", "global")]
ROWS += [("t2i-lite-sft", "global"), ("i2i-lite-sft", "global")]


@cache
def dit_weights(config: DiTConfig) -> Weights:
    """Bytes of a transformer in bf16, with the parameters that stay in fp32 counted as such."""
    with torch.device("meta"):
        dit = DiffusionTransformer3D(config).bfloat16()
    for name, parameter in dit.named_parameters():
        if any(part in name for part in FP32_NAMES):
            parameter.data = parameter.data.float()
    return Weights.of(dit)


@cache
def video_vae(config: VAEConfig) -> HunyuanVideoVAE:
    """The video VAE in bf16 on the meta device."""
    with torch.device("meta"):
        return HunyuanVideoVAE(config).bfloat16()


def networks(preset: Preset) -> dict[str, Weights]:
    """Bytes of the weights of each network that a preset loads."""
    vae = Weights.of(video_vae(preset.vae)) if preset.vae else Weights(rest=FLUX_VAE)
    return {
        "text": Weights(QWEN_LAYERS, QWEN_TABLE, CLIP),
        "dit": dit_weights(preset.dit),
        "vae": vae,
    }


def ways(preset: Preset, policy: str | None = None) -> dict[str, list[Way]]:
    """Stage -> the ways to do it, for a run of the preset with its default size, length and steps.

    ``policy`` is the policy of decoding; by default the one that the pipeline picks for the size.
    """
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
    return ways_to_run(
        networks(preset),
        job,
        preset.vae and video_vae(preset.vae),
        policy or default_policy(preset.frames, height, width),
        pictures=preset.task in ("i2v", "i2i"),
    )


def choose_placement(preset: Preset, budget: int, policy: str | None = None) -> Placement:
    """The placement chosen for a default run within ``budget`` bytes of GPU memory.

    Raises ValueError if the budget does not suffice.
    """
    return choose_ways(ways(preset, policy), host_bytes(preset), budget)


def host_bytes(preset: Preset) -> int:
    """Bytes of all weights, which streaming keeps in host memory."""
    return sum(weights.total for weights in networks(preset).values())


def table() -> str:
    """Every row at every budget, in Markdown."""
    lines = [
        f"| run, decoding | least | weights in host memory | {' | '.join(BUDGETS)} |",
        "|---|---:|---:|" + "---|" * len(BUDGETS),
    ]
    for name, policy in ROWS:
        preset = PRESETS[name]
        stages = ways(preset, policy).values()
        least = max(min(way.peak_bytes for way in stage) for stage in stages)
        cells = [
            f"{name}, {policy}",
            f"{least / 1e9:.1f} GB",
            f"{host_bytes(preset) / 1e9:.1f} GB",
            *(cell(preset, parse_bytes(budget), policy) for budget in BUDGETS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(preset: Preset, budget: int, policy: str) -> str:
    """The placement of one row within one budget, in a few words; "-" where it does not suffice."""
    try:
        chosen = choose_placement(preset, budget, policy)
    except ValueError:
        return "-"
    if chosen.together:
        return f"{chosen.peak_bytes / 1e9:.1f} GB, nothing moves"
    sampling = chosen.stages["sampling"]
    decoding = chosen.stages["decoding"]
    count = len(dit_weights(preset.dit).layers)
    streamed = count - sampling.resident
    layers = f"{streamed} of {count} streamed" if streamed else "all resident"
    scheme = decoding.how.removesuffix(" for each tile")
    return (
        f"{sampling.peak_bytes / 1e9:.1f} GB, {layers}; "
        f"{decoding.peak_bytes / 1e9:.1f} GB, {scheme}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "preset",
        nargs="?",
        choices=[name for name in PRESETS if name != "tiny"],
        help="print the placement of this preset (default: a table of several)",
    )
    parser.add_argument(
        "--budget",
        type=parse_bytes,
        default=12 * 10**9,
        metavar="SIZE",
        help="GPU memory for the placement of one preset (default: 12GB)",
    )
    parser.add_argument(
        "--policy",
        choices=("global", "official"),
        help="policy of decoding (default: by the clip's size)",
    )
    options = parser.parse_args()
    if options.preset:
        print(choose_placement(PRESETS[options.preset], options.budget, options.policy))
    else:
        print(table())


if __name__ == "__main__":
    main()
