# SPDX-License-Identifier: Apache-2.0
"""Train the bundled tiny checkpoint: VAE, text encoder and diffusion transformer, on clips drawn by
`shapes`.

Stages: `vae` (reconstruct), `pool` (encode clips once), `flow` (flow matching over the pool). Each
leaves a complete, loadable folder behind and one entry in training.json; a later run resumes after
it.
"""

import copy
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..checkpoints.load import load_dit, load_vae, save_dit, save_vae
from ..config import PRESETS
from ..text.tiny import TinyTextEncoder
from .optimizer import machine
from .train_flow import FlowPlan, Pool, encode_pool, new_networks, pool_scenes, train_flow
from .train_vae import VAEPlan, train_vae

logger = logging.getLogger(__name__)
LOG_NAME, POOL_NAME = "training.json", "pool.safetensors"


def save_networks(networks, folder, preset, dtype=torch.float16):
    """Write transformer/ and text_encoder/ of a bundle, weights stored as `dtype`."""
    save_dit(copy.deepcopy(networks["transformer"]).to(dtype), folder / "transformer", preset.nabla)
    networks["text_encoder"].save(folder / "text_encoder", dtype)


def load_networks(folder):
    """The two networks of a bundle, in fp32 and trainable."""
    dit = load_dit(folder / "transformer", dtype=torch.float32)
    return (
        nn.ModuleDict(
            {"transformer": dit, "text_encoder": TinyTextEncoder.load(folder / "text_encoder")}
        )
        .train()
        .requires_grad_(True)
    )


def write_log(folder, entry):
    """Put a stage's entry into training.json: it replaces an earlier state of the same run (same
    stage and seed), or comes last."""
    stages = [
        old
        for old in read_log(folder)
        if (old["stage"], old["seed"]) != (entry["stage"], entry["seed"])
    ]
    (folder / LOG_NAME).write_text(json.dumps({"stages": [*stages, entry]}, indent=1) + "\n")


def read_log(folder):
    """The stages that training.json of `folder` tells of, none where it is missing."""
    return (
        json.loads((folder / LOG_NAME).read_text())["stages"]
        if (folder / LOG_NAME).is_file()
        else []
    )


def train_tiny(out_dir, seed=2026, vae_plan=None, flow_plan=None, resume=False, device="cpu"):
    """Train the bundle into `out_dir`: vae/, transformer/, text_encoder/ and training.json with
    seed, plans, losses and machine.

    With `resume` an existing vae/ is kept, or trained further where a `vae_plan` is given, and
    existing networks are trained further; each time with a fresh optimizer and other random
    numbers. training.json gets one more entry per stage run, so that it tells how the weights came
    about. Returns the folder. Encoded clips stay in out_dir/pool.safetensors, which is not part of
    the bundle.
    """
    folder, preset = Path(out_dir), PRESETS["tiny"]
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        (folder / LOG_NAME).unlink(missing_ok=True)
    vae_known = resume and (folder / "vae").is_dir()
    if vae_plan or not vae_known:
        entry, vae_plan = _entry(folder, "vae", seed, vae_known, vae_plan or VAEPlan())
        start = load_vae(folder / "vae", dtype=torch.float32) if vae_known else None
        vae, losses = train_vae(preset.vae, vae_plan, entry["seed"], device, start)
        save_vae(vae.half(), folder / "vae")
        (folder / POOL_NAME).unlink(missing_ok=True)
        write_log(folder, {**entry, "seconds": losses[-1]["seconds"], "losses": losses})
    flow_plan = flow_plan or FlowPlan()
    pool = make_pool(folder, flow_plan.copies, seed, device)

    known = resume and (folder / "transformer").is_dir()
    networks = (load_networks(folder) if known else new_networks(preset.dit, seed)).to(device)
    entry, flow_plan = _entry(folder, "flow", seed, known, flow_plan)

    def keep(average, losses):
        save_networks(average, folder, preset)
        if losses:
            write_log(
                folder,
                {
                    **entry,
                    "steps": losses[-1]["step"] + 1,
                    "seconds": losses[-1]["seconds"],
                    "losses": losses,
                },
            )

    keep(*train_flow(networks, pool, flow_plan, preset, entry["seed"], keep))
    return folder


def _entry(folder, stage, seed, continued, plan):
    """The head of a stage's log entry, and its plan. The seed grows by one with each earlier run of
    the stage."""
    seed += sum(old["stage"] == stage for old in read_log(folder))
    return {
        "stage": stage,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": seed,
        "machine": machine(),
        "continued": continued,
        "plan": asdict(plan),
    }, plan


def make_pool(folder, copies, seed, device):
    """The pool of `folder`, from its file or encoded now."""
    path, scenes = folder / POOL_NAME, pool_scenes(copies, seed)
    if path.is_file() and len(latents := load_file(path)["latents"]) == len(scenes):
        return Pool(latents, scenes)
    pool = encode_pool(load_vae(folder / "vae", dtype=torch.float32, device=device), scenes)
    save_file({"latents": pool.latents}, path)
    return pool
