# SPDX-License-Identifier: Apache-2.0
"""Training of the bundled tiny model from nothing, on drawn clips.

There are two stages, "vae" and "flow". Each leaves networks that load, and an entry in
training.json; a later run can go on from there. Between them the clips are encoded once.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoints.load import load_dit, load_vae, save_dit, save_vae
from ..config import PRESETS, Preset
from ..dit.transformer import DiffusionTransformer3D
from ..files import read_json, replacing
from ..text.tiny import TinyTextEncoder
from ..training.tensors import write_tensors
from .optimizer import machine
from .train_flow import FlowRecipe, Pool, encode_pool, new_networks, pool_scenes, train_flow
from .train_vae import VAERecipe, train_vae

logger = logging.getLogger(__name__)
LOG_NAME, POOL_NAME = "training.json", "pool.safetensors"


def save_networks(
    networks: nn.ModuleDict,
    folder: Path,
    preset: Preset,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write transformer/ and text_encoder/ of a model, their weights in `dtype`."""
    dit = cast(DiffusionTransformer3D, networks["transformer"])
    text = cast(TinyTextEncoder, networks["text_encoder"])
    save_dit(copy.deepcopy(dit).to(dtype), folder / "transformer", preset.nabla)
    text.save(folder / "text_encoder", dtype)


def load_networks(folder: Path) -> nn.ModuleDict:
    """The networks that `save_networks` wrote, in fp32 and trainable."""
    networks = {
        "transformer": load_dit(folder / "transformer", dtype=torch.float32),
        "text_encoder": TinyTextEncoder.load(folder / "text_encoder"),
    }
    return nn.ModuleDict(networks).train().requires_grad_(True)


def write_log(folder: Path, entry: dict) -> None:
    """Put the entry of a stage into training.json. It replaces the entry of the same run, with the
    same stage and seed, or comes last."""
    run = (entry["stage"], entry["seed"])
    others = [old for old in read_log(folder) if (old["stage"], old["seed"]) != run]
    text = json.dumps({"stages": [*others, entry]}, indent=1) + "\n"
    with replacing(folder / LOG_NAME) as target:
        target.write_text(text, encoding="utf-8")


def read_log(folder: Path) -> list[dict]:
    """The entries of training.json in `folder`; none where it is missing. ValueError for a file of
    another kind."""
    path = folder / LOG_NAME
    if not path.is_file():
        return []
    stages = read_json(path).get("stages")
    if isinstance(stages, list):
        entries = [one for one in stages if isinstance(one, dict) and {"stage", "seed"} <= set(one)]
        if len(entries) == len(stages):
            return entries
    raise ValueError(
        f"{path} must list the stages of a training with their seeds, but does not; "
        "remove it, or train into another folder"
    )


def train_tiny(
    out_dir: str | Path,
    seed: int = 2026,
    vae_recipe: VAERecipe | None = None,
    flow_recipe: FlowRecipe | None = None,
    resume: bool = False,
    device: str = "cpu",
) -> Path:
    """Train a model into `out_dir` and return the folder: vae/, transformer/, text_encoder/, and
    training.json with seeds, recipes, losses and machine.

    resume: keep an existing vae/, or train it further where a `vae_recipe` is given, and train
        existing networks further. The optimiser starts anew, with other random numbers.

    The encoded clips stay in out_dir/pool.safetensors, which is not part of the model.
    """
    folder = Path(out_dir)
    preset = PRESETS["tiny"]
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        (folder / LOG_NAME).unlink(missing_ok=True)
    has_vae = resume and (folder / "vae").is_dir()
    if vae_recipe or not has_vae:
        _vae_stage(folder, seed, device, vae_recipe or VAERecipe(), has_vae)

    recipe = flow_recipe or FlowRecipe()
    pool = make_pool(folder, recipe.copies, seed, device)
    has_networks = resume and (folder / "transformer").is_dir()
    networks = load_networks(folder) if has_networks else new_networks(preset.dit, seed)
    networks = networks.to(device)
    entry = _entry(folder, "flow", seed, has_networks, recipe)

    def keep(average: nn.ModuleDict, losses: list[dict]) -> None:
        save_networks(average, folder, preset)
        if losses:
            steps = losses[-1]["step"] + 1
            seconds = losses[-1]["seconds"]
            write_log(folder, {**entry, "steps": steps, "seconds": seconds, "losses": losses})

    average, losses = train_flow(networks, pool, recipe, preset, entry["seed"], keep)
    keep(average, losses)
    return folder


def _vae_stage(folder: Path, seed: int, device: str, recipe: VAERecipe, continued: bool) -> None:
    entry = _entry(folder, "vae", seed, continued, recipe)
    start = load_vae(folder / "vae", dtype=torch.float32) if continued else None
    config = PRESETS["tiny"].vae
    assert config is not None
    vae, losses = train_vae(config, recipe, entry["seed"], device, start)
    save_vae(vae.half(), folder / "vae")
    (folder / POOL_NAME).unlink(missing_ok=True)
    write_log(folder, {**entry, "seconds": losses[-1]["seconds"], "losses": losses})


def _entry(
    folder: Path,
    stage: str,
    seed: int,
    continued: bool,
    recipe: VAERecipe | FlowRecipe,
) -> dict:
    """The beginning of an entry of training.json. Its seed grows by one with each earlier run of
    the stage."""
    return {
        "stage": stage,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": seed + sum(old["stage"] == stage for old in read_log(folder)),
        "machine": machine(),
        "continued": continued,
        "plan": asdict(recipe),  # under the name that the bundled file has
    }


def make_pool(folder: Path, copies: int, seed: int, device: str) -> Pool:
    """The pool of `folder`: read where its file is whole and has the same scenes, else encoded and
    written."""
    path = folder / POOL_NAME
    scenes = pool_scenes(copies, seed)
    about = {"seed": str(seed), "copies": str(copies)}
    if path.is_file():
        latents = _read_pool(path, about)
        if latents is not None and len(latents) == len(scenes):
            return Pool(latents, scenes)
    vae = load_vae(folder / "vae", dtype=torch.float32, device=device)
    pool = encode_pool(vae, scenes)
    write_tensors(path, {"latents": pool.latents}, about)
    return pool


def _read_pool(path: Path, about: dict[str, str]) -> Tensor | None:
    """The latents of a pool's file; None where it is damaged or about other scenes."""
    try:
        with safe_open(path, framework="pt") as file:
            same = file.metadata() == about
            return file.get_tensor("latents") if same else None
    except (OSError, SafetensorError):
        return None
