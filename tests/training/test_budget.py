# SPDX-License-Identifier: Apache-2.0
"""Memory of training: what is predicted against the tensors alive in a real step, and what fits
where."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kandinsky_kernels  # noqa: F401 - registers the operators that are looked for below
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
from kandinsky_model.training.trainer import Trainer

from ..dit.test_transformer import rel_l2
from ..support.live_memory import LiveMemory
from ..support.plain_dit import random_state
from ..support.train_folders import clips

CPU = torch.device("cpu")
GB = 10**9
SPARSE = NablaConfig(0.5, (3, 1, 1))
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


def measured(computation, grid, nabla, batch):
    """Bytes of tensors alive at the worst moment of a pass with an adapter, whose gradients are
    there before."""
    dit = DiffusionTransformer3D(CONFIG)
    dit.load_state_dict(random_state(CONFIG))
    network = TrainNetwork(dit.requires_grad_(False).prepare(), CPU, computation)
    for parameter in attach(dit, LoRAConfig(4), 0, CPU).values():
        parameter.grad = torch.zeros_like(parameter)
    clean, noise = torch.randn(2, batch, grid.T, 2 * grid.Y, 2 * grid.X, 16)
    text = torch.randn(batch, 16, 48)
    pooled = torch.randn(batch, 24)
    layout = make_layout(CONFIG, grid, (1.0, 1.0, 1.0), nabla)
    with LiveMemory() as live:
        condition = torch.zeros(*clean.shape[:-1], 17)
        x = torch.cat([clean + noise, condition], -1)
        velocity = network(x, text, pooled, 1000 * torch.rand(batch), layout)
        (velocity - (noise - clean)).square().mean().backward()
    return live.peak


@pytest.mark.skipif(
    not hasattr(torch.ops.kandinsky_kernels, "norm_rope_backward"),
    reason="accounts for operators with own gradients",
)
@pytest.mark.parametrize(
    ("computation", "grid", "nabla", "batch"),
    [
        (Computation(), Grid(2, 8, 16), None, 1),
        (Computation(tokens=64), Grid(2, 16, 16), SPARSE, 1),
        (Computation(tokens=128), Grid(1, 16, 16), None, 2),
        (Computation(tokens=128, resident=0), Grid(2, 8, 16), SPARSE, 1),
    ],
    ids=["whole", "nabla", "batch", "streamed"],
)
def test_predictions_hold(computation, grid, nabla, batch):
    job = Job(
        CONFIG,
        grid,
        torch.float32,
        batch,
        nabla=nabla is not None,
        text_tokens=16,
        on_cpu=True,
    )
    actual = measured(computation, grid, nabla, batch)
    predicted = step_bytes(job, computation)
    print(f"measured {actual / 1e6:.2f} MB, predicted {predicted / 1e6:.2f} MB")
    assert actual <= predicted <= 1.2 * actual


def job_of(name):
    """The job of a preset at its first size and its length."""
    preset = PRESETS[name]
    height, width = preset.sizes[0]
    grid = Grid((preset.frames - 1) // 4 + 1, height // 16, width // 16)
    return Job(
        preset.dit,
        grid,
        torch.bfloat16,
        1,
        nabla=preset.nabla is not None,
        text_tokens=preset.text_max_length,
    )


def training_of(name, config=TrainConfig()):  # noqa: B008 - frozen
    """(job, weights, trained) of a preset; the defaults are a LoRA of rank 32."""
    job = job_of(name)
    dit = empty_dit(job.config).to(torch.bfloat16 if config.lora else torch.float32)
    return job, Weights.of(dit), Trained.of(dit, config)


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
    placement = plan_training(*training_of(name), gigabytes * GB)
    print(f"{name}: {placement}")
    assert placement.peak_bytes <= gigabytes * GB


def test_ways_need_less_and_less_and_the_least_is_named():
    training = training_of("t2v-lite-sft-5s")
    needs = [way.peak_bytes for way in ways_to_train(*training)]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) >= 30
    least = f"training requires a memory budget of at least {needs[-1]} bytes"
    with pytest.raises(ValueError, match=least):
        plan_training(*training, needs[-1] - 1)


def test_the_readme_says_what_adapters_need():
    chosen = []
    least = []
    for name in ("t2v-lite-sft-5s", "t2v-lite-sft-10s"):
        training = training_of(name)
        chosen.append(plan_training(*training, 12 * GB).peak_bytes / 1e9)
        least.append(min(way.peak_bytes for way in ways_to_train(*training)) / 1e9)
    words = (
        f"{chosen[0]:.3g} GB for 5 s clips and {chosen[1]:.3g} GB for 10 s; "
        f"at the least {least[0]:.3g} GB and {least[1]:.3g} GB."
    )
    page = Path(__file__).parents[2] / "kandinsky_model" / "training" / "README.md"
    assert words in " ".join(page.read_text(encoding="utf-8").split())


def test_all_weights_are_not_streamed():
    config = TrainConfig(lora=None)
    job, weights, trained = training_of("t2v-lite-sft-5s", config)
    assert trained.numbers == 2_007_702_848
    assert trained.state == 4 * 4 * trained.numbers
    ways = list(ways_to_train(job, weights, trained))
    for way in ways:
        assert way.computation.resident is None
        assert way.weights == weights.total
    distilled = training_of("t2v-lite-sft-5s", replace(config, distill="dense"))
    assert next(ways_to_train(*distilled)).weights == 2 * ways[0].weights


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
    gradients = []
    computations = []
    for budget in (None, 60 * 10**6, 30 * 10**6):
        within = replace(config, memory_budget=budget)
        trainer = Trainer(data, tmp_path / f"within {budget}", within)
        trainer.begin(resume=False)
        trainer.objective.losses(trainer.drawn(0)).mean().backward()
        found = [parameter.grad.flatten() for parameter in trainer.parameters.values()]
        gradients.append(torch.cat(found))
        computations.append(trainer.network.computation)
        trainer.state.optimizer.zero_grad()
        trainer.advance()
        assert (trainer.out / "lora.safetensors").is_file()
    assert computations == [
        Computation(checkpoint=False),
        Computation(),
        Computation(host=True, resident=0, tokens=4096),
    ]
    assert max(rel_l2(found, gradients[0]) for found in gradients[1:]) <= 1e-5
