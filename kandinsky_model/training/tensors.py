# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that are whole or absent, and equal byte by byte where their contents are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing

_LENGTH_BYTES = 8  # at the beginning of a file: the length of its header, little-endian


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors from any device. Raises OSError or SafetensorError where that fails."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as target:
        save_file(on_cpu, target, dict(metadata) if metadata else None)
        _sort_metadata(target)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a header in order. The library writes them in one that differs from
    process to process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        data = text.encode("utf-8").ljust(length)  # the library pads with spaces too
        if len(data) != length:
            raise ValueError(
                f"a header must keep its {length} bytes when its metadata are sorted, "
                f"got {len(data)}; report this with the version of safetensors"
            )
        file.seek(_LENGTH_BYTES)
        file.write(data)
