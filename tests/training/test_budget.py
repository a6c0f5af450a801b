# SPDX-License-Identifier: Apache-2.0
"""Memory of training: what is predicted against the tensors alive in a real step, and what fits
where."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kandinsky_kernels  # noqa: F401 - its operators are asked for below
from kandinsky_model.checkpoints.load import empty_dit
from kandinsky_model.config import PRESETS, DiTConfig, NablaConfig
from kandinsky_model.devices.budget import Weights
from kandinsky_model.dit.accounting import Job
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.training.adapters import attach
from kandinsky_model.training.budget import Trained, plan_training, step_bytes, ways_to_train
from kandinsky_model.training.config import LoRAConfig, TrainConfig
from kandinsky_model.training.network import Computation, TrainNetwork
from kandinsky_model.training.trainer import Run

from ..dit.test_transformer import rel_l2
from ..support.live_memory import LiveMemory
from ..support.plain_dit import random_state
from ..support.train_folders import clips

CPU = torch.device("cpu")
CONFIG = DiTConfig(
    in_text_dim=48,
    in_text_dim2=24,
    time_dim=64,
    model_dim=256,
    ff_dim=1024,
    num_text_blocks=1,
    num_visual_blocks=4,
    visual_cond=True,
)


def measured(way, grid, nabla, batch):
    """Bytes of tensors alive at the worst moment of a pass with an adapter, whose gradients are
    there before."""
    dit = DiffusionTransformer3D(CONFIG)
    dit.load_state_dict(random_state(CONFIG))
    network = TrainNetwork(dit.requires_grad_(False).prepare(), CPU, way)
    for parameter in attach(dit, LoRAConfig(4), 0, CPU).values():
        parameter.grad = torch.zeros_like(parameter)
    clean, noise = torch.randn(2, batch, grid.T, 2 * grid.Y, 2 * grid.X, 16)
    text, pooled, plan = (
        torch.randn(batch, 16, 48),
        torch.randn(batch, 24),
        make_layout(CONFIG, grid, (1.0, 1.0, 1.0), nabla),
    )
    with LiveMemory() as live:
        x = torch.cat([clean + noise, torch.zeros(*clean.shape[:-1], 17)], -1)
        (
            network(x, text, pooled, 1000 * torch.rand(batch), plan) - (noise - clean)
        ).square().mean().backward()
    return live.peak


@pytest.mark.skipif(
    not hasattr(torch.ops.kandinsky_kernels, "norm_rope_backward"),
    reason="accounts for operators with own gradients",
)
@pytest.mark.parametrize(
    ("way", "grid", "nabla", "batch"),
    [
        (Computation(), Grid(2, 8, 16), None, 1),
        (Computation(tokens=64), Grid(2, 16, 16), NablaConfig(0.5, (3, 1, 1)), 1),
        (Computation(tokens=128), Grid(1, 16, 16), None, 2),
        (Computation(tokens=128, resident=0), Grid(2, 8, 16), NablaConfig(0.5, (3, 1, 1)), 1),
    ],
    ids=["whole", "nabla", "batch", "streamed"],
)
def test_predictions_hold(way, grid, nabla, batch):
    job = Job(
        CONFIG, grid, torch.float32, batch, nabla=nabla is not None, text_tokens=16, on_cpu=True
    )
    actual, predicted = measured(way, grid, nabla, batch), step_bytes(job, way)
    print(f"measured {actual / 1e6:.2f} MB, predicted {predicted / 1e6:.2f} MB")
    assert actual <= predicted <= 1.2 * actual


def job_of(name, batch=1):
    preset = PRESETS[name]
    height, width = preset.sizes[0]
    grid = Grid((preset.frames - 1) // 4 + 1, height // 16, width // 16)
    return Job(
        preset.dit,
        grid,
        torch.bfloat16,
        batch,
        nabla=preset.nabla is not None,
        text_tokens=preset.text_max_length,
    )


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("t2v-lite-sft-5s", 12),
        ("t2v-lite-sft-10s", 12),
        ("t2v-lite-sft-5s", 5),
        ("t2i-lite-sft", 12),
    ],
)
def test_adapters_fit(name, gigabytes):
    """A LoRA of rank 32, at the size and length of the preset."""
    job = job_of(name)
    dit = empty_dit(job.config).to(torch.bfloat16)
    plan = plan_training(job, Weights.of(dit), Trained.of(dit, TrainConfig()), gigabytes * 10**9)
    print(f"{name}: {plan}")
    assert plan.peak_bytes <= gigabytes * 10**9


def test_ways_need_less_and_less_and_the_least_is_named():
    job = job_of("t2v-lite-sft-5s")
    dit = empty_dit(job.config).to(torch.bfloat16)
    weights, trained = Weights.of(dit), Trained.of(dit, TrainConfig())
    needs = [way.peak_bytes for way in ways_to_train(job, weights, trained)]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) >= 30
    with pytest.raises(
        ValueError, match=f"training requires a memory budget of at least {needs[-1]} bytes"
    ):
        plan_training(job, weights, trained, needs[-1] - 1)


def test_the_readme_says_what_adapters_need():
    readme = (Path(__file__).parents[2] / "kandinsky_model/training/README.md").read_text(
        encoding="utf-8"
    )
    chosen, least = [], []
    for name in ("t2v-lite-sft-5s", "t2v-lite-sft-10s"):
        job = job_of(name)
        dit = empty_dit(job.config).to(torch.bfloat16)
        weights, trained = Weights.of(dit), Trained.of(dit, TrainConfig())
        chosen.append(f"{plan_training(job, weights, trained, 12 * 10**9).peak_bytes / 1e9:.3g} GB")
        least.append(
            f"{min(way.peak_bytes for way in ways_to_train(job, weights, trained)) / 1e9:.3g} GB"
        )
    assert (
        f"{chosen[0]} for 5 s\nclips and {chosen[1]} for 10 s; at the least {least[0]} and "
        f"{least[1]}."
    ) in readme


def test_all_weights_are_not_streamed():
    job, config = job_of("t2v-lite-sft-5s"), TrainConfig(lora=None)
    dit = empty_dit(job.config)
    trained = Trained.of(dit, config)
    assert trained.numbers == 2_007_702_848 and trained.state == 4 * 4 * trained.numbers
    ways = list(ways_to_train(job, Weights.of(dit), trained))
    assert all(
        way.computation.resident is None and way.weights == Weights.of(dit).total for way in ways
    )
    distilled = list(
        ways_to_train(job, Weights.of(dit), Trained.of(dit, replace(config, distill="dense")))
    )
    assert distilled[0].weights == 2 * ways[0].weights


def test_a_budget_changes_nothing_but_rounding(tmp_path):
    """Without one, with one that all weights fit in, and with so little that all blocks are
    streamed: gradients of a pass, then a step."""
    data = clips(tmp_path / "data", 2)
    config = TrainConfig(
        lora=LoRAConfig(4),
        sizes=((64, 64),),
        lengths=(5,),
        batch=2,
        passes=1,
        steps=1,
        device="cpu",
        drop=0.0,
        cache=str(tmp_path / "cache"),
    )
    gradients, ways = [], []
    for budget in (None, 60 * 10**6, 30 * 10**6):
        run = Run(data, tmp_path / f"within {budget}", replace(config, memory_budget=budget))
        run.begin(resume=False)
        run._losses(run.drawn(0)).mean().backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in run.parameters.values()])
        )
        ways.append(run.network.computation)
        run.state.optimizer.zero_grad()
        run.advance()
        assert (run.out / "lora.safetensors").is_file()
    assert ways == [
        Computation(checkpoint=False),
        Computation(),
        Computation(host=True, resident=0, tokens=4096),
    ]
    assert max(rel_l2(found, gradients[0]) for found in gradients[1:]) <= 1e-5
