# SPDX-License-Identifier: Apache-2.0
"""Configurations of networks: read from a config.json, or inferred from a transformer's tensors,
and compared with the tensors before a network is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..config import DiTConfig, NablaConfig, VAEConfig
from ..files import read_json
from .headers import CONFIG_NAME, Entry, first_few, printable

# The rotary axes of all released checkpoints; shapes alone do not show how a head is divided.
AXES_BY_HEAD_DIM = {64: (16, 24, 24), 128: (32, 48, 48)}


def dit_config_json(config: DiTConfig, nabla: NablaConfig | None, quantization: str | None) -> dict:
    """The config.json of a transformer as diffusers writes it. That of a quantised one makes
    diffusers refuse to load it, because diffusers would take 8-bit values for weights."""
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
    """What `folder`'s config.json says of a transformer and its attention; (None, None) where there
    is no such file or it says nothing of them. ValueError where it says what cannot be."""
    values = _read_config(folder)
    if "model_dim" not in values:
        return None, None
    nabla = None
    if values.get("attention_type") == "nabla":
        names = ("attention_P", "attention_wT", "attention_wH", "attention_wW")
        missing = [name for name in names if values.get(name) is None]
        if missing:
            raise ValueError(
                f"{folder / CONFIG_NAME} must give {', '.join(names)} for NABLA, but "
                f"{first_few('missing', missing)}; download it again"
            )
        keep_mass, *window = (values[name] for name in names)
        nabla = _made(NablaConfig, folder, {"keep_mass": keep_mass, "window": tuple(window)})
    return _made(DiTConfig, folder, values), nabla


def read_vae_config(folder: Path) -> VAEConfig:
    """What `folder`'s config.json says of a video VAE; the released sizes where it says nothing.
    ValueError where it says what cannot be."""
    values = _read_config(folder)
    for key in ("spatial_compression", "temporal_compression"):
        if f"{key}_ratio" in values:
            values[key] = values[f"{key}_ratio"]
    return _made(VAEConfig, folder, values)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def _made(kind: type, folder: Path, values: Mapping):
    """A `kind` of configuration with those of the values that it has fields for."""
    known = {
        field.name: values[field.name]
        for field in fields(kind)
        if values.get(field.name) is not None
    }
    for name, value in known.items():
        if isinstance(value, list):
            known[name] = tuple(value)
    try:
        return kind(**known)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} cannot be used: {printable(str(error))}"
        ) from error


def infer_dit_config(entries: Mapping[str, Entry]) -> DiTConfig:
    """The configuration a bare checkpoint must have had, read off its shapes. ValueError when they
    are not those of a transformer."""
    sizes: dict[str, Any] = dict(_dit_sizes(entries))
    head_dim = sizes.pop("head dim")
    if head_dim not in AXES_BY_HEAD_DIM:
        raise ValueError(
            f"the rotary axes of head dim {head_dim} are not known from shapes "
            f"(64 and 128 are); put a {CONFIG_NAME} with axes_dims beside the file or pass config"
        )
    in_channels = sizes.pop("in_channels")
    channels = sizes["out_visual_dim"]
    bare = DiTConfig(in_visual_dim=channels, axes_dims=AXES_BY_HEAD_DIM[head_dim])
    return replace(bare, **sizes, visual_cond=in_channels == 2 * channels + 1)


def check_dit_config(config: DiTConfig, entries: Mapping[str, Entry]) -> None:
    """ValueError unless the sizes that a configuration claims are those of the tensors.

    To be called before the network is built: a configuration of a billion blocks would be believed
    otherwise, until the memory is full.
    """
    claimed = {
        **{field.name: getattr(config, field.name) for field in fields(config)},
        "head dim": config.head_dim,
        "in_channels": config.in_channels,
    }
    compare_sizes(claimed, _dit_sizes(entries, math.prod(config.patch_size)))


def check_vae_config(config: VAEConfig, entries: Mapping[str, Entry]) -> None:
    """`check_dit_config` for a VAE, of videos or of pictures."""
    levels = count_blocks(entries, "encoder.down_blocks")
    if not levels:
        raise ValueError(
            "the file must hold a VAE, but "
            f"{first_few('missing', ['encoder.conv_in.conv.weight'])}, "
            f"{first_few('found', sorted(entries))}; check that this is the right file"
        )
    convolution = "encoder.down_blocks.{}.resnets.0.conv1{}.weight"
    widths = []
    for i in range(levels):
        names = (convolution.format(i, infix) for infix in (".conv", ""))
        shapes = [entries[name].shape for name in names if name in entries]
        widths.append(shapes[0][0] if shapes and shapes[0] else 0)
    found = {
        "block_out_channels": tuple(widths),
        "layers_per_block": count_blocks(entries, "encoder.down_blocks.0.resnets"),
    }
    compare_sizes({name: getattr(config, name) for name in found}, found)


def compare_sizes(claimed: Mapping[str, object], found: Mapping[str, object]) -> None:
    wrong = [
        f"{name} {claimed[name]} instead of {value}"
        for name, value in found.items()
        if claimed[name] != value
    ]
    if wrong:
        raise ValueError(
            "the configuration must have the sizes of the weights, but "
            f"{first_few('wrong', wrong)}; check that file and configuration belong together"
        )


def _dit_sizes(
    entries: Mapping[str, Entry], patch: int = math.prod(DiTConfig.patch_size)
) -> dict[str, int]:
    """The sizes of a transformer that its tensors show: fields of `DiTConfig`, and "head dim" and
    "in_channels". patch: latent pixels of a token."""
    marks = {
        "visual": "visual_embeddings.in_layer.weight",
        "text": "text_embeddings.in_layer.weight",
        "pooled": "pooled_text_embeddings.in_layer.weight",
        "out": "out_layer.out_layer.weight",
        "feed_forward": "visual_transformer_blocks.0.feed_forward.in_layer.weight",
        "query_norm": "visual_transformer_blocks.0.self_attention.query_norm.weight",
    }
    missing = [name for name in marks.values() if name not in entries]
    if missing:
        raise ValueError(
            "the file must hold a Kandinsky 5 transformer, but "
            f"{first_few('missing', missing)}, "
            f"{first_few('found', sorted(entries))}; check that this is the right file"
        )
    shapes = {mark: entries[name].shape for mark, name in marks.items()}
    flat = [
        f"{name} {list(shapes[mark])}"
        for mark, name in marks.items()
        if len(shapes[mark]) != (1 if mark == "query_norm" else 2)
    ]
    if flat:
        raise ValueError(
            "the file must hold matrices where a Kandinsky 5 transformer has them, but "
            f"{first_few('found', flat)}; check that this is the right file"
        )
    return {
        "in_channels": shapes["visual"][1] // patch,
        "in_text_dim": shapes["text"][1],
        "in_text_dim2": shapes["pooled"][1],
        "time_dim": shapes["pooled"][0],
        "out_visual_dim": shapes["out"][0] // patch,
        "model_dim": shapes["visual"][0],
        "ff_dim": shapes["feed_forward"][0],
        "num_text_blocks": count_blocks(entries, "text_transformer_blocks"),
        "num_visual_blocks": count_blocks(entries, "visual_transformer_blocks"),
        "head dim": shapes["query_norm"][0],
    }


def count_blocks(entries: Mapping[str, Entry], prefix: str) -> int:
    """How many blocks there are whose tensors are called `prefix`.0., `prefix`.1. and so on.

    ValueError where numbers are left out: the highest number alone may be any.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,18}})\.")
    matches = (pattern.match(name) for name in entries)
    numbers = {int(match[1]) for match in matches if match}
    left_out = next((i for i in range(len(numbers)) if i not in numbers), None)
    if left_out is not None:
        raise ValueError(
            f"the file must hold all blocks of a network, but {prefix}.{left_out} is missing while "
            f"there is a {prefix}.{max(numbers)}; download it again"
        )
    return len(numbers)
