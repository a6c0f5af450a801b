# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other programs write them: names with a prefix, several networks in one file,
weights in fp8 with and without a scale.

`of_network` finds the tensors of one network among those of a file, by the names that the network
gives them; `read` gives a tensor's values, whatever they are stored as.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .headers import Entry, first_few, opened, printable, read_metadata

# A tensor that every network of its kind has, and by which its prefix is found.
TRANSFORMER_MARK = "visual_embeddings.in_layer.weight"
VAE_MARK = "post_quant_conv.weight"
# The other networks in an all-in-one file.
_OTHER_NETWORKS = (
    "vae.",
    "first_stage_model.",
    "text_encoder",
    "cond_stage_model.",
    "conditioner.",
    "clip_",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
)

# Of a layer in fp8: the factor its weight lacks, under the names that programs give it.
_SCALES = ("scale_weight", "weight_scale")
# Of such a layer or file: what is about its input or says how it is stored, and changes no weight.
_ASIDE = ("scale_input", "input_scale", "comfy_quant")
_ASIDE_FILE = "scaled_fp8"
_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}
_FORMATS_KEY = "_quantization_metadata"  # of a header: the formats of all layers, as JSON
_NARROW = {torch.float8_e4m3fn, torch.float8_e5m2}
# Refused by name rather than as a tensor too many: formats that this package does not read.
_FOREIGN = {
    "weight_scale_2": "NVFP4",
    "weight_scale_inv": "fp8 in blocks",
    "absmax": "bitsandbytes' 4 or 8 bits",
    "SCB": "bitsandbytes' 8 bits",
    "qweight": "GPTQ's or AWQ's integers",
    "svdq_l": "SVDQuant",
    "smooth_factor": "SVDQuant",
}


def of_network(entries: Mapping[str, Entry], mark: str) -> dict[str, Entry]:
    """The entries of the network that has a tensor called `mark`, by its own names for them.

    Prefixes are dropped, and the tensors of other networks with them; a scale becomes that of its
    weight. Entries without such a tensor stay as they are, for the caller to refuse. Raises
    ValueError for weights in a format that cannot be read, by its name.
    """
    prefix = prefix_of(entries, mark)
    own = {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    if prefix:
        own |= {
            name: entry
            for name, entry in entries.items()
            if not name.startswith(prefix) and not name.startswith(_OTHER_NETWORKS)
        }
    return with_scales(own)


def prefix_of(entries: Iterable[str], mark: str) -> str:
    prefixes = sorted(
        name.removesuffix(mark) for name in entries if name == mark or name.endswith(f".{mark}")
    )
    if len(prefixes) > 1:
        raise ValueError(
            "a file must hold one network of a kind, but "
            f"{first_few('found', [prefix or 'one without a prefix' for prefix in prefixes])}; "
            "split it"
        )
    return prefixes[0] if prefixes else ""


def with_scales(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries, of which those of scales have become part of those of weights."""
    result = dict(entries)
    result.pop(_ASIDE_FILE, None)
    for name, entry in entries.items():
        layer, _, last = name.rpartition(".")
        if last in _FOREIGN:
            raise ValueError(
                f"weights must be of full width, in fp8, int8 or GGUF, but {entry.path.name} is in "
                f"{_FOREIGN[last]} ({printable(name)}); take another file of the model"
            )
        weight = entries.get(f"{layer}.weight")
        if last in _ASIDE and weight is not None:
            del result[name]
        elif last in _SCALES and weight is not None:
            _check_scale(name, entry, weight)
            result[f"{layer}.weight"] = replace(weight, scale=entry.key)
            del result[name]
    return result


def _check_scale(name: str, scale: Entry, weight: Entry) -> None:
    rows = weight.shape[:1]
    if scale.path != weight.path or scale.shape not in ((), (1,), rows, (*rows, 1)):
        raise ValueError(
            "the scale of a weight must be one number, or one of each row, in the same file, but "
            f"{printable(name)} is {list(scale.shape)} in {scale.path.name}; "
            "take another file of the model"
        )


def check_formats(files: Iterable[Path], entries: Mapping[str, Entry]) -> None:
    """ValueError where a file says that a layer is stored in a format that is not known here: its
    values might be taken for others."""
    for path in files:
        about = read_metadata(path).get(_FORMATS_KEY)
        formats = _formats(about) if about else {}
        marks = [
            entry
            for name, entry in entries.items()
            if name.endswith(".comfy_quant") and entry.path == path
        ]
        if marks:
            with opened(path) as file:
                for entry in marks:
                    said = file.get_tensor(entry.key).numpy().tobytes()
                    formats |= {entry.key: _format(said)}
        unknown = sorted(set(formats.values()) - _FORMATS)
        if unknown:
            raise ValueError(
                f"weights must be in one of {', '.join(sorted(_FORMATS))} or of full width, but "
                f"{path.name} has layers in {printable(unknown[0])}; take another file of the model"
            )


def _formats(about: str) -> dict[str, str]:
    try:
        layers = json.loads(about)["layers"]
        return {layer: str(said["format"]) for layer, said in layers.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {"": "a form that cannot be read"}


def _format(said: bytes) -> str:
    try:
        return str(json.loads(said)["format"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return "a form that cannot be read"


def read(file: Any, entry: Entry) -> Tensor:
    """The values of a tensor of an `opened` file: as stored, but with its scale multiplied in, in
    fp32, and fp8 without one in bf16, which holds each of its values."""
    tensor = file.get_tensor(entry.key)
    if entry.scale is not None:
        scale = file.get_tensor(entry.scale).float()
        columns = (-1, *[1] * (tensor.dim() - 1)) if scale.numel() > 1 else ()
        return tensor.float() * scale.reshape(columns)
    if not tensor.is_floating_point():
        raise ValueError(
            f"weights in {tensor.dtype} must have a scale, but {printable(entry.key)} in "
            f"{entry.path.name} has none; take another file of the model"
        )
    return tensor.bfloat16() if tensor.dtype in _NARROW else tensor
