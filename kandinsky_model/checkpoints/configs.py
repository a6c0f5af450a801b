# SPDX-License-Identifier: Apache-2.0
"""Configurations of networks: read from either published layout, or inferred from a transformer's
tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from ..config import DiTConfig, NablaConfig, VAEConfig
from ..files import read_json
from .headers import CONFIG_NAME, Entry, first_few

# all released checkpoints; their shapes alone do not tell the split
AXES_BY_HEAD_DIM = {64: (16, 24, 24), 128: (32, 48, 48)}


def dit_config_json(config: DiTConfig, nabla: NablaConfig | None, quantization: str | None) -> dict:
    """The config.json of a transformer, as diffusers writes it; of a quantised one, so that
    diffusers refuses it."""
    values = {"_class_name": "Kandinsky5Transformer3DModel", **asdict(config)}
    if config.instruct_type is None:
        del values["instruct_type"]
    if nabla is not None:
        w_t, w_y, w_x = nabla.window
        values.update(
            attention_type="nabla",
            attention_P=nabla.keep_mass,
            attention_wT=w_t,
            attention_wH=w_y,
            attention_wW=w_x,
            attention_add_sta=True,
            attention_method="topcdf",
        )
    else:
        values.update(attention_type="regular")
    if quantization is not None:
        values["quantization_config"] = {"quant_method": "kandinsky", "mode": quantization}
    return values


def read_dit_config(folder: Path) -> tuple[DiTConfig | None, NablaConfig | None]:
    """What `folder`'s config.json says of a transformer and its attention; (None, None) when there
    is no such file or it is silent."""
    values = _read_config(folder)
    if "model_dim" not in values:
        return None, None
    nabla = None
    if values.get("attention_type") == "nabla":
        nabla = NablaConfig(
            values["attention_P"],
            (values["attention_wT"], values["attention_wH"], values["attention_wW"]),
        )
    return _pick(DiTConfig, values), nabla


def read_vae_config(folder: Path) -> VAEConfig:
    """What `folder`'s config.json says of a VAE; the released sizes where it is silent."""
    values = _read_config(folder)
    for key in ("spatial_compression", "temporal_compression"):
        if f"{key}_ratio" in values:
            values[key] = values[f"{key}_ratio"]
    return _pick(VAEConfig, values)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def _pick(kind: type, values: Mapping):
    known = {
        field.name: values[field.name]
        for field in fields(kind)
        if values.get(field.name) is not None
    }
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in known.items()
        }
    )


def infer_dit_config(entries: Mapping[str, Entry]) -> DiTConfig:
    """The configuration a bare checkpoint must have had, read off its shapes. ValueError when they
    are not those of a transformer."""
    wanted = (
        "visual_embeddings.in_layer.weight",
        "text_embeddings.in_layer.weight",
        "pooled_text_embeddings.in_layer.weight",
        "out_layer.out_layer.weight",
        "visual_transformer_blocks.0.feed_forward.in_layer.weight",
        "visual_transformer_blocks.0.self_attention.query_norm.weight",
    )
    missing = [name for name in wanted if name not in entries]
    if missing:
        raise ValueError(
            "the file must hold a Kandinsky 5 transformer, but "
            f"{first_few('missing', missing)}, "
            f"{first_few('found', sorted(entries))}; check that this is the right file"
        )
    visual, text, pooled, out, feed_forward, query_norm = (entries[name].shape for name in wanted)
    if query_norm[0] not in AXES_BY_HEAD_DIM:
        raise ValueError(
            f"the rotary axes of head dim {query_norm[0]} are not known from shapes "
            "(64 and 128 are); "
            f"put a {CONFIG_NAME} with axes_dims beside the file or pass config"
        )
    patch = math.prod(DiTConfig.patch_size)
    channels = out[0] // patch
    return DiTConfig(
        in_visual_dim=channels,
        in_text_dim=text[1],
        in_text_dim2=pooled[1],
        time_dim=pooled[0],
        out_visual_dim=channels,
        model_dim=visual[0],
        ff_dim=feed_forward[0],
        num_text_blocks=_count(entries, "text_transformer_blocks"),
        num_visual_blocks=_count(entries, "visual_transformer_blocks"),
        axes_dims=AXES_BY_HEAD_DIM[query_norm[0]],
        visual_cond=visual[1] // patch == 2 * channels + 1,
    )


def _count(entries: Mapping[str, Entry], prefix: str) -> int:
    matches = (re.match(rf"{prefix}\.(\d+)\.", name) for name in entries)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
