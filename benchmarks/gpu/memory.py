# SPDX-License-Identifier: Apache-2.0
"""Whole runs at full size within memory budgets, on random weights: what was predicted of every
stage, and what it took."""

import gc
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from kandinsky_model.checkpoints.load import FP32_NAMES
from kandinsky_model.config import PRESETS, DiTConfig, Preset, VAEConfig
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.pipeline import Kandinsky5
from kandinsky_model.text.embeddings import Conditioning
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from ..budgets import CLIP, QWEN_LAYERS
from .card import FULL, Clock, Size

PROMPT_TOKENS, INSTRUCTION_TOKENS, PATTERN = 256, 129, 1 << 22
# preset, budgets in GB
RUNS = {FULL[0].name: ("t2v-lite-sft-10s", (12, 8)), FULL[1].name: ("t2v-pro-sft-5s", (12,))}
TOY_DIT = DiTConfig(
    in_text_dim=64,
    in_text_dim2=32,
    model_dim=128,
    ff_dim=256,
    num_visual_blocks=2,
    visual_cond=True,
)
TOY_VAE = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)


class TextInSize(nn.Module):
    """Stands in for the text encoders: layers of as many bytes as Qwen2.5-VL-7B's, one matrix each,
    and CLIP's bytes beside them."""

    def __init__(
        self, config: DiTConfig, layer_bytes: tuple[int, ...], rest_bytes: int, dtype: torch.dtype
    ):
        super().__init__()
        self.config, width = config, config.in_text_dim
        self.layers = nn.ModuleList(
            nn.Linear(width, size // width // dtype.itemsize, bias=False, dtype=dtype)
            for size in layer_bytes
        )
        self.register_buffer("rest", torch.empty(rest_bytes // dtype.itemsize, dtype=dtype))

    @torch.no_grad()
    def encode(self, prompts: list[str], kind: str = "video") -> Conditioning:
        width, B = self.config.in_text_dim, len(prompts)
        x = torch.ones(B, INSTRUCTION_TOKENS + PROMPT_TOKENS, width).to(self.rest)
        for layer in self.layers:
            x = torch.nn.functional.normalize(layer(x)[..., :width], dim=-1)
        pooled = self.rest[: B * self.config.in_text_dim2].view(B, -1)
        return Conditioning(
            x[:, INSTRUCTION_TOKENS:], torch.full((B,), PROMPT_TOKENS), pooled.clone()
        )


def fill(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights on the CPU: one random pattern over and over, because drawing 19 billion numbers
    would take minutes."""
    network = network.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
    pattern = 0.02 * torch.randn(PATTERN)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if any(part in name for part in FP32_NAMES):
            tensor.data = torch.empty(tensor.shape)
        for piece in tensor.data.view(-1).split(PATTERN):
            piece.copy_(pattern[: len(piece)])
    return network


def random_model(preset: Preset, device: torch.device, toy: bool) -> Kandinsky5:
    dtype = torch.float32 if toy else torch.bfloat16
    sizes = ((4 * 64 * 256,) * 3, 4096) if toy else (QWEN_LAYERS, CLIP)
    with torch.device("meta"):
        networks = (
            TextInSize(preset.dit, *sizes, dtype),
            DiffusionTransformer3D(preset.dit),
            HunyuanVideoVAE(preset.vae),
        )
    text, dit, vae = (fill(network, dtype) for network in networks)
    return Kandinsky5(
        text, dit.prepare(), vae.to(memory_format=torch.channels_last_3d), preset, device=device
    )


def memory(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """One step and the decoding of Lite at 10 s within 12 and 8 GB, of Pro at 5 s within 12 GB,
    everything from host memory."""
    toy = size.name not in RUNS
    name, budgets = ("tiny", (0.024, 1.0)) if toy else RUNS[size.name]
    preset = replace(PRESETS[name], dit=TOY_DIT, vae=TOY_VAE) if toy else PRESETS[name]
    settings = dict(height=64, width=96, num_frames=9) if toy else {}
    model = random_model(preset, clock.device, toy)
    for budget in budgets:
        gc.collect()
        yield {
            "op": "memory",
            "size": f"{name}, {budget:g} GB",
            **run(model, int(budget * 1e9), settings),
        }


def run(model: Kandinsky5, budget: int, settings: dict) -> dict:
    """Times and peaks by stage of one step without guidance. A first run, whose weights are moved
    into pinned memory, is not counted."""
    stages, on_gpu = (
        dict(num_inference_steps=1, guidance_scale=1.0, seed=0, memory_budget=budget, **settings),
        model.device.type == "cuda",
    )
    model.generate("warm", **stages)
    marks = [("start", 0.0, 0, 0)]

    def mark(stage: str) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        peaks = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            if on_gpu
            else (0, 0)
        )
        marks.append((stage, time.perf_counter(), *peaks))
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    mark("start")
    video = model.generate(
        "a cat",
        callback=lambda stage, step, *_: mark("text") if (stage, step) == ("sampling", 0) else None,
        **stages,
    )
    mark("sampling")
    for _ in video.decode():
        pass
    mark("decoding")
    ends = {
        stage: end - begin
        for (_, begin, *_), (stage, end, *_) in zip(marks[1:], marks[2:], strict=False)
    }
    row = {
        "ms": {
            "ours": 1e3 * sum(ends.values()),
            **{stage: 1e3 * seconds for stage, seconds in ends.items()},
        },
        "placement": str(model.placement).splitlines(),
        "predicted_gb": gigabytes(model.placement.stages[stage].peak_bytes for stage in ends),
    }
    if on_gpu:
        peaks, predicted = (
            [peak for *_, peak, _ in marks[2:]],
            [model.placement.stages[stage].peak_bytes for stage in ends],
        )
        row |= {
            "measured_gb": gigabytes(peaks),
            "reserved_gb": gigabytes(reserved for *_, reserved in marks[2:]),
            "budget_over_peak": budget / max(peaks),
            "predicted_over_peak": min(
                guess / peak for guess, peak in zip(predicted, peaks, strict=True)
            ),
        }
    return row


def gigabytes(sizes: Iterator[int] | list[int]) -> list[float]:
    return [round(size / 1e9, 3) for size in sizes]
