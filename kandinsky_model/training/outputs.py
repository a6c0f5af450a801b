# SPDX-License-Identifier: Apache-2.0
"""The results of a training as other programs load them: a LoRA's two files, or the folder of a
whole model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.configs import dit_config_json
from ..checkpoints.load import cast, save_tensors
from ..checkpoints.locate import PRESET_KEY, Sources
from ..dit.transformer import DiffusionTransformer3D
from ..files import replacing
from .config import LoRAConfig
from .tensors import write_tensors

LORA_WEIGHTS, LORA_CONFIG = "lora.safetensors", "config_lora.json"
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

_log = logging.getLogger(__name__)


def save_lora(
    folder: Path,
    parameters: Mapping[str, Tensor],
    config: LoRAConfig,
    dtype: torch.dtype,
    base: str,
) -> None:
    """Write `lora.safetensors` and `config_lora.json`, each whole or not at all.

    base: the model that was trained on. The configuration is in PEFT's form. The header of the
    weights repeats rank and alpha, where diffusers looks for them, and has the trigger.
    """
    peft: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha or config.rank,
        "target_modules": list(config.targets),
        "rank_pattern": {},  # diffusers 0.37 fails without it
    }
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **peft,
    }
    with replacing(folder / LORA_CONFIG) as target:
        target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(peft)}
    if config.trigger:
        metadata["trigger"] = config.trigger
    tensors = {name: tensor.detach().to(dtype) for name, tensor in parameters.items()}
    write_tensors(folder / LORA_WEIGHTS, tensors, metadata)


def save_model(
    folder: Path,
    dit: DiffusionTransformer3D,
    weights: Mapping[str, Tensor],
    sources: Sources,
    dtype: torch.dtype,
) -> None:
    """Write `weights` of `dit` as a folder that loads like a published one, in the dtypes of a
    published checkpoint. The other parts become links to those of `sources`, where they are absent.
    """
    tensors = {
        name: cast(name, tensor.detach(), dtype).cpu().contiguous()
        for name, tensor in weights.items()
    }
    config = dit_config_json(dit.config, sources.preset.nabla, None)
    save_tensors(tensors, folder / "transformer", config | {PRESET_KEY: sources.preset.name})
    for name in PARTS:
        source = getattr(sources, name)
        place = folder / name
        if source is None or place.exists():
            continue
        try:
            os.symlink(source.resolve(), place, target_is_directory=True)
        except OSError as error:
            _log.warning(
                "the model needs its %s, but no link to %s can be made (%s); copy it to %s",
                name,
                source,
                error,
                place,
            )
