# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk -> a quantised one, tensor by tensor: one tensor is in memory at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..dit.quantized import check_mode, kind_of, pack, report_lines, weight_error
from .configs import dit_config_json, infer_dit_config, read_dit_config
from .headers import (
    CONFIG_NAME,
    INDEX_NAMES,
    WEIGHTS_NAME,
    check_names,
    find_weights,
    opened,
    read_headers,
)
from .load import QUANTIZATION_KEY, empty_dit, read_quantization
from .locate import locate

SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 2**20  # for 5,000 tensors and more; Pro has 2,000 when quantised
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_log = logging.getLogger(__name__)


def quantize_file(model: str | Path, folder: str | Path, mode: str) -> list[str]:
    """Write the transformer of `model` (a preset, path or hub repository), quantised in `mode`,
    into `folder`; lines about its error.

    The folder, which must be new or empty, gets config.json and shards in diffusers' layout, to
    stand as `transformer/` in a model's folder. What is not quantised keeps its dtype. Raises what
    `locate` and `load_dit` raise, and ValueError: a folder with something in it, weights that are
    quantised already or not finite.
    """
    check_mode(mode)
    folder = Path(folder)
    sources = locate(model, parts=("dit",))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"a quantised model is written into a new or empty folder, got {folder}; choose another"
        )
    # perhaps: the file is the first that was found there
    in_shards = sources.dit.is_file() and Path(model).is_dir()
    files, home = find_weights(sources.dit.parent if in_shards else sources.dit, "transformer")
    entries = read_headers(files)
    if read_quantization(files):
        raise ValueError(
            f"quantising requires weights of full width, but {files[0]} is in "
            f"{read_quantization(files)} already; "
            "take the original"
        )
    config, nabla = read_dit_config(home)
    if config is None:
        config = infer_dit_config(entries)
        nabla = sources.preset.nabla
    check_names(
        {name: tuple(tensor.shape) for name, tensor in empty_dit(config).state_dict().items()},
        entries,
    )
    folder.mkdir(parents=True, exist_ok=True)
    shards = Shards(folder, {QUANTIZATION_KEY: mode})
    errors = {}
    for file in files:
        _quantize_into(shards, file, mode, errors)
    written = shards.close()
    (folder / CONFIG_NAME).write_text(
        json.dumps(dit_config_json(config, nabla, mode), indent=2) + "\n"
    )
    before, after = (sum(path.stat().st_size for path in paths) / 1e9 for paths in (files, written))
    return [
        *report_lines(errors),
        f"{before:.3f} GB became {after:.3f} GB in {len(written)} "
        f"file{'s' if len(written) > 1 else ''}",
    ]


def _quantize_into(
    shards: Shards, path: Path, mode: str, errors: dict[str, tuple[float, float]]
) -> None:
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            layer = name.removesuffix(".weight")
            if layer == name or not kind_of(layer):
                shards.add(name, tensor)
                continue
            packed = pack(layer, tensor, mode)
            errors[layer] = weight_error(tensor, *packed.values())
            _log.info("%s", layer)
            for part in packed.items():
                shards.add(*part)


class Shards:
    """Safetensors files in a folder, each with at most `SHARD_BYTES` of tensors unless one alone is
    larger, and the index that names them.

    A tensor is written as it comes; the library's writer wants all of a file at once. The header,
    known last, has its place kept free, and what it does not need of it is spaces, as the format
    allows.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str]):
        self.folder = folder
        self.metadata = {"format": "pt", **metadata}
        self.files: list[tuple[Path, dict[str, dict]]] = []  # each with the entries of its header
        self.size = self.total = 0  # bytes of tensors: in the last file, in those before

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.files or self.size + tensor.nbytes > SHARD_BYTES:
            self._finish()
            self.files.append((self.folder / f"{len(self.files):05}.safetensors.part", {}))
            self.files[-1][0].write_bytes(bytes(8 + HEADER_BYTES))
        path, entries = self.files[-1]
        with path.open("ab") as file:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        span = [self.size, self.size + tensor.nbytes]
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        self.size += tensor.nbytes

    def close(self) -> list[Path]:
        """Finish the last file, give all their names and, where they are several, write the index;
        the files."""
        self._finish()
        if len(self.files) == 1:
            return [self.files[0][0].rename(self.folder / WEIGHTS_NAME)]
        written, places, stem = [], {}, Path(WEIGHTS_NAME).stem
        for path, entries in self.files:
            written.append(
                path.rename(
                    self.folder
                    / f"{stem}-{len(written) + 1:05}-of-{len(self.files):05}.safetensors"
                )
            )
            places |= dict.fromkeys(entries, written[-1].name)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / INDEX_NAMES[0]).write_text(json.dumps(index, indent=2) + "\n")
        return written

    def _finish(self) -> None:
        if self.files:
            path, entries = self.files[-1]
            header = json.dumps({"__metadata__": self.metadata, **entries}).encode()
            with path.open("r+b") as file:
                file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
        self.total, self.size = self.total + self.size, 0
