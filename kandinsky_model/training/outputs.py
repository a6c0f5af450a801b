# SPDX-License-Identifier: Apache-2.0
"""What a training of all weights leaves: a model's folder, its transformer written, its other parts
links to those it was trained with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.load import cast, dit_config_json, save_tensors
from ..checkpoints.locate import PRESET_KEY, Sources
from ..dit.transformer import DiffusionTransformer3D

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
