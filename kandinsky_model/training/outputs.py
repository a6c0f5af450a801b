# SPDX-License-Identifier: Apache-2.0
"""What a training of all weights leaves: a model's folder, its transformer written, its other parts
links to those it was trained with."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.configs import dit_config_json
from ..checkpoints.load import cast, save_tensors
from ..checkpoints.locate import PRESET_KEY, Sources
from ..dit.transformer import DiffusionTransformer3D
from ..files import replacing
from .config import LoRAConfig

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

_log = logging.getLogger(__name__)


def save_model(
    folder: Path,
    dit: DiffusionTransformer3D,
    weights: Mapping[str, Tensor],
    sources: Sources,
    dtype: torch.dtype,
) -> None:
    """Write `weights`, in the dtypes of a released checkpoint, as a folder that loads like one.
    Parts that exist there stay."""
    tensors = {
        name: cast(name, tensor.detach(), dtype).cpu().contiguous()
        for name, tensor in weights.items()
    }
    config = dit_config_json(dit.config, sources.preset.nabla, None) | {
        PRESET_KEY: sources.preset.name
    }
    save_tensors(tensors, folder / "transformer", config)
    for name in PARTS:
        source, place = getattr(sources, name), folder / name
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


WEIGHTS_NAME, CONFIG_NAME = "lora.safetensors", "config_lora.json"


def save_lora(
    folder: Path, matrices: Mapping[str, Tensor], config: LoRAConfig, dtype: torch.dtype, model: str
) -> Path:
    """Write both files, each whole or not at all, and return the path of the weights. model: what
    it was trained on."""
    alpha = config.alpha or config.rank
    peft = {"r": config.rank, "lora_alpha": alpha, "target_modules": list(config.targets)}
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **peft,
    }
    with replacing(folder / CONFIG_NAME) as target:
        target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(peft)} | (
        {"trigger": config.trigger} if config.trigger else {}
    )
    with replacing(folder / WEIGHTS_NAME) as target:
        save_file(
            {
                name: matrix.detach().to("cpu", dtype).contiguous()
                for name, matrix in matrices.items()
            },
            target,
            metadata,
        )
    return folder / WEIGHTS_NAME
