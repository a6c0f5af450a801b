# SPDX-License-Identifier: Apache-2.0
"""diffusers' models as installed and accelerated, side by side in one process:

    python -m benchmarks.diffusers

diffusers' NABLA needs a compiled FlexAttention. PyTorch cannot compile it for CPUs, and uncompiled
it attends to everything. On the CPU NABLA is therefore represented by dense attention under a mask
of the blocks that diffusers chooses; on a GPU (`benchmarks.gpu --only diffusers`) by the compiled
FlexAttention.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from kandinsky_kernels import selection_density
from kandinsky_model import accelerate
from kandinsky_model.config import LITE_DIT, DiTConfig, VAEConfig
from kandinsky_model.dit import nabla
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE
from tests.support.diffusers_dit import dense_mask, without_cast
from tests.support.tiny_models import diffusers_video_vae

from .clock import keep_memory, machine, measure, roofs
from .gpu.card import FULL, Clock, Size, ratios
from .ops import results_file
from .report import insert

# Random weights spread attention evenly, so that the share of blocks that NABLA keeps is nearly the
# share of the attention that it is to keep.
KEEP_MASS = 0.25
WINDOW = (3, 1, 1)
SCALE = (1.0, 2.0, 2.0)
TINY = DiTConfig(
    in_text_dim=64,
    in_text_dim2=32,
    time_dim=64,
    model_dim=128,
    ff_dim=512,
    num_text_blocks=1,
    num_visual_blocks=2,
    visual_cond=True,
)
TRANSFORMERS = {
    "tiny model": (TINY, Grid(5, 32, 32)),
    "one block of Lite": (
        replace(LITE_DIT, num_text_blocks=0, num_visual_blocks=1),
        Grid(2, 32, 48),
    ),
}
MARKERS = ("<!-- diffusers: begin -->", "<!-- diffusers: end -->")
VAES = {"VAE, full size, decoding latents 2x16x16": (VAEConfig(), (2, 16, 16))}


def random_model(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' transformer with NABLA.

    Every parameter is random, because fresh modulations are zero and would switch the blocks off.
    """
    from diffusers import Kandinsky5Transformer3DModel

    names = {
        key: getattr(config, key) for key in config.__dataclass_fields__ if key != "instruct_type"
    }
    w_t, w_y, w_x = WINDOW
    with torch.device(device):
        model = (
            Kandinsky5Transformer3DModel(
                **names,
                attention_type="nabla",
                attention_P=KEEP_MASS,
                attention_wT=w_t,
                attention_wH=w_y,
                attention_wW=w_x,
            )
            .eval()
            .requires_grad_(False)
        )
    for name, parameter in model.named_parameters():
        parameter.normal_(float(name.endswith("norm.weight")), 0.05)
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.to(dtype)
    return model


def arguments(
    config: DiTConfig, grid: Grid, device: torch.device, dtype: torch.dtype
) -> tuple[dict, dict]:
    """What a pipeline passes to the transformer, and the `sparse_params` that it adds for
    NABLA."""
    from diffusers import Kandinsky5T2VPipeline

    make = dict(device=device, dtype=dtype)
    shape = (1, grid.T, 2 * grid.Y, 2 * grid.X, config.in_channels)
    data = dict(
        hidden_states=torch.randn(shape, **make),
        encoder_hidden_states=torch.randn(1, 64, config.in_text_dim, **make),
        pooled_projections=torch.randn(1, config.in_text_dim2, **make),
        timestep=torch.tensor([700.0], device=device),
        visual_rope_pos=[torch.arange(n, device=device) for n in (grid.T, grid.Y, grid.X)],
        text_rope_pos=torch.arange(64, device=device),
        scale_factor=SCALE,
        return_dict=False,
    )
    near = Kandinsky5T2VPipeline.fast_sta_nabla(
        grid.T, grid.Y // 8, grid.X // 8, *WINDOW, device=device
    )
    w_t, w_y, w_x = WINDOW
    return data, {
        "sta_mask": near[None, None],
        "to_fractal": True,
        "P": KEEP_MASS,
        "wT": w_t,
        "wH": w_y,
        "wW": w_x,
    }


def density(call: Callable) -> float:
    """The share of blocks that NABLA keeps in the first visual block of a call."""
    chosen = []
    select = nabla.select_blocks

    def watch(query_means: Tensor, *rest) -> Tensor:
        chosen.append((select(query_means, *rest), query_means.shape[2]))
        return chosen[-1][0]

    with mock.patch.object(nabla, "select_blocks", watch):
        call()
    return selection_density(*chosen[0])


def relative(actual: Tensor, wanted: Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def transformer_row(name: str, config: DiTConfig, grid: Grid, budget_s: float) -> dict:
    """Times of dense attention, NABLA under a mask, and the accelerated model.

    Errors are relative to NABLA under a mask, without diffusers' rounding of queries and keys to
    bf16.
    """
    from diffusers.models.transformers import transformer_kandinsky as module

    torch.manual_seed(0)
    stock = random_model(config, torch.device("cpu"), torch.float32)
    ours = copy.deepcopy(stock)
    data, sparse = arguments(config, grid, torch.device("cpu"), torch.float32)
    accelerate(ours)
    with mock.patch.object(module, "nablaT_v2", dense_mask(module.nablaT_v2)):
        calls = {
            "dense": lambda: stock(**data),
            "mask": lambda: stock(**data, sparse_params=sparse),
            "ours": lambda: ours(**data, sparse_params=sparse),
        }
        with mock.patch.object(
            module.Kandinsky5AttnProcessor, "__call__", without_cast(module.Kandinsky5AttnProcessor)
        ):
            wanted = calls["mask"]()
        errors = {who: relative(call(), wanted) for who, call in calls.items()}
        row = {"case": name, "tokens": grid.tokens, "density": density(calls["ours"])}
        return row | timed(calls, errors, budget_s)


@torch.no_grad()
def vae_row(name: str, config: VAEConfig, latent: tuple[int, int, int], budget_s: float) -> dict:
    """Times of decoding as installed and accelerated; errors relative to diffusers in fp64."""
    torch.manual_seed(0)
    stock = diffusers_video_vae(HunyuanVideoVAE(config).requires_grad_(False))
    z = torch.randn(1, config.latent_channels, *latent)
    ours = copy.deepcopy(stock)
    wanted = copy.deepcopy(stock).double().decode(z.double()).sample
    accelerate(ours)
    calls = {"dense": lambda: stock.decode(z).sample, "ours": lambda: ours.decode(z).sample}
    return {"case": name} | timed(
        calls, {who: relative(call(), wanted) for who, call in calls.items()}, budget_s
    )


def timed(calls: dict[str, Callable], errors: dict[str, float], budget_s: float) -> dict:
    timings = measure(calls, budget_s)
    faster = {
        who: round(timing.median_ms / timings["ours"].median_ms, 2)
        for who, timing in timings.items()
        if who != "ours"
    }
    return {
        "errors": errors,
        "times_faster": faster,
        "timings": {who: timing.record() for who, timing in timings.items()},
    }


def table(result: dict) -> str:
    """The machine and one line for each case, in Markdown: medians, ratios and errors."""
    m = result["machine"]
    lines = [
        f"{m['cpu']}, threads: {m['threads']}, {m['simd']}, torch {m['torch']}, commit "
        f"{m['commit']}.",
        "",
        "| case | blocks kept | as installed, ms | by a mask, ms | accelerated, ms | times "
        "faster | errors: installed, mask, ours |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = [
            f"{row['timings'][who]['median_ms']:.0f}" if who in row["timings"] else "-"
            for who in ("dense", "mask", "ours")
        ]
        errors = ", ".join(
            f"{row['errors'][who]:.1e}" if who in row["errors"] else "-"
            for who in ("dense", "mask", "ours")
        )
        faster = " / ".join(f"{value:.2f}" for value in row["times_faster"].values())
        kept = f"{row['density']:.0%}" if "density" in row else "-"
        case = f"{row['case']}, {row['tokens']:,} tokens" if "tokens" in row else row["case"]
        lines.append(f"| {case} | {kept} | {' | '.join(times)} | {faster} | {errors} |")
    return "\n".join(lines)


@torch.no_grad()
def on_gpu(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """For `benchmarks.gpu`: Lite as installed, dense and by compiled FlexAttention, and
    accelerated. Each of the latter two chooses its blocks itself."""
    if size is FULL[1]:
        return
    toy = size is not FULL[0]
    config, dtype = (TINY, torch.float32) if toy else (LITE_DIT, torch.bfloat16)
    ours = random_model(config, clock.device, dtype)
    dense = copy.deepcopy(ours)
    flex = copy.deepcopy(ours)
    # diffusers sets a backend for all models without one; the second line sets it back
    flex.set_attention_backend("flex")
    dense.set_attention_backend("native")
    if not toy:
        flex.compile_repeated_blocks(fullgraph=True)
    accelerate(ours)
    data, sparse = arguments(config, size.grid, clock.device, dtype)
    calls = {
        "ours": lambda: ours(**data, sparse_params=sparse),
        "dense": lambda: dense(**data),
        "flex": lambda: flex(**data, sparse_params=sparse),
    }
    row = {
        "op": "diffusers, accelerated",
        "size": size.name,
        "density": density(calls["ours"]),
        "ms": clock.measure(calls),
    }
    yield row | ratios(row["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times diffusers' models, and writes results/diffusers-<machine>.json."
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=20.0,
        help="seconds for each provider of a case (default: 20)",
    )
    parser.add_argument(
        "--into", type=Path, help=f"also put the table between {' and '.join(MARKERS)} of this file"
    )
    options = parser.parse_args()
    keep_memory()
    result = {"machine": machine(), "roofs": roofs(), "rows": []}
    for row, cases in ((transformer_row, TRANSFORMERS), (vae_row, VAES)):
        for name, case in cases.items():
            result["rows"].append(row(name, *case, options.budget))
            print(json.dumps(result["rows"][-1]), flush=True)
    path = results_file(result["machine"])
    path.with_name(f"diffusers-{path.name}").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.into:
        options.into.write_text(insert(options.into.read_text(), table(result), MARKERS))


if __name__ == "__main__":
    main()
