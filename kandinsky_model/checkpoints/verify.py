# SPDX-License-Identifier: Apache-2.0
"""What a file of weights is: which network and presets it belongs to, whether it is whole, and its
checksum. Reads, never loads."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from ..config import PRESETS
from ..vae.hunyuan import HunyuanVideoVAE
from .configs import infer_dit_config, read_dit_config, read_vae_config
from .headers import check_names, find_weights, read_headers
from .load import empty_dit, read_quantization
from .locate import recognise

NETWORKS = {"visual_embeddings.in_layer.weight": "transformer", "post_quant_conv.weight": "VAE"}
CHUNK = 1 << 24


def verify(path: str | Path) -> list[str]:
    """Lines about the transformer or VAE at `path` (file or folder). Raises FileNotFoundError, or
    ValueError: not safetensors, cut short, of no known network, tensors missing, surplus or of the
    wrong shape (the first five are named)."""
    files, folder = find_weights(path, "transformer")
    entries = read_headers(files)
    network = next((kind for name, kind in NETWORKS.items() if name in entries), None)
    if network is None:
        raise ValueError(
            f"{path} must hold a Kandinsky 5 transformer or its video VAE, got "
            f"{len(entries)} tensors such as "
            f"{', '.join(sorted(entries)[:3]) or 'none'}; a LoRA or a text encoder "
            "is neither"
        )
    quantization = read_quantization(files)
    if network == "VAE":
        with torch.device("meta"):
            module = HunyuanVideoVAE(read_vae_config(folder))
    else:
        module = empty_dit(read_dit_config(folder)[0] or infer_dit_config(entries), quantization)
    check_names(
        {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, entries
    )
    parameters = sum(
        math.prod(entry.shape)
        for name, entry in entries.items()
        if not name.endswith(".weight_scale")
    )
    lines = [
        f"{network}, complete: {len(entries)} tensors, {parameters:,} parameters, {_dtypes(files)}"
    ]
    if quantization:
        lines.append(f"quantised: {quantization}")
    if network == "transformer":
        presets = _presets(module.config, files[0], Path(path))
        lines.append(
            f"presets: {', '.join(presets) or 'none; its sizes are those of no released checkpoint'}"
        )
    return [*lines, *(f"{file.name}: sha256 {_sha256(file)}" for file in files)]


def _presets(config, file: Path, given: Path) -> list[str]:
    """The preset published under this name, else all whose network has these sizes."""
    named = recognise(file) or recognise(given)
    if named is not None and named.dit == config:
        return [preset.name for preset in PRESETS.values() if preset.filename == named.filename]
    return [preset.name for preset in PRESETS.values() if preset.dit == config]


def _dtypes(files: list[Path]) -> str:
    counts = Counter()
    for path in files:
        with safe_open(path, framework="pt") as file:
            counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a mapping
    return ", ".join(
        f"{dtype} in {count}" if len(counts) > 1 else dtype for dtype, count in counts.most_common()
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
