# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk -> a quantised one, tensor by tensor: no more than one shard of the result is in memory."""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .locate import locate
from .quant import check_mode, kind_of, pack, report_lines, weight_error
from .weights import (
    CONFIG_NAME,
    QUANTIZATION_KEY,
    WEIGHTS_NAME,
    check_names,
    dit_config_json,
    empty_dit,
    find_weights,
    infer_dit_config,
    opened,
    read_dit_config,
    read_headers,
    read_quantization,
)

SHARD_BYTES = 5 * 10**9
_log = logging.getLogger(__name__)


def quantize_file(model: str | Path, folder: str | Path, mode: str) -> list[str]:
    """Write the transformer of `model` (a preset, path or hub repository), quantised in `mode`, into `folder`; lines about its error.

    The folder, which must be new or empty, gets config.json and shards in diffusers' layout, to stand as `transformer/` in a model's
    folder. What is not quantised keeps its dtype. Raises what `locate` and `load_dit` raise, and ValueError: a folder with something in
    it, weights that are quantised already or not finite.
    """
    check_mode(mode)
    folder, sources = Path(folder), locate(model, parts=("dit",))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"a quantised model is written into a new or empty folder, got {folder}; choose another")
    files, home = find_weights(sources.dit, "transformer")
    entries = read_headers(files)
    if read_quantization(files):
        raise ValueError(f"quantising requires weights of full width, but {files[0]} is in {read_quantization(files)} already; "
                         "take the original")
    config, nabla = read_dit_config(home)
    if config is None:
        config, nabla = infer_dit_config(entries), sources.preset.nabla
    check_names({name: tuple(tensor.shape) for name, tensor in empty_dit(config).state_dict().items()}, entries)
    folder.mkdir(parents=True, exist_ok=True)
    shards, errors = Shards(folder, {QUANTIZATION_KEY: mode}), {}
    for file in files:
        _quantize_into(shards, file, mode, errors)
    written = shards.close()
    (folder / CONFIG_NAME).write_text(json.dumps(dit_config_json(config, nabla, mode), indent=2) + "\n")
    before, after = (sum(path.stat().st_size for path in paths) / 1e9 for paths in (files, written))
    return [*report_lines(errors), f"{before:.3f} GB became {after:.3f} GB in {len(written)} file{'s' if len(written) > 1 else ''}"]


def _quantize_into(shards: Shards, path: Path, mode: str, errors: dict[str, tuple[float, float]]) -> None:
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor, layer = file.get_tensor(name), name.removesuffix(".weight")
            if layer == name or not kind_of(layer):
                shards.add({name: tensor})
                continue
            packed = pack(layer, tensor, mode)
            errors[layer] = weight_error(tensor, *packed.values())
            _log.info("%s", layer)
            shards.add(packed)


class Shards:
    """Safetensors files in a folder, each of at most `SHARD_BYTES` unless one tensor is larger, and the index that names them."""

    def __init__(self, folder: Path, metadata: Mapping[str, str]):
        self.folder, self.metadata = folder, {"format": "pt", **metadata}
        self.held: dict[str, Tensor] = {}
        self.files: list[tuple[Path, list[str]]] = []
        self.total = self.bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self.held and self.bytes + tensor.nbytes > SHARD_BYTES:
                self._write()
            self.held[name] = tensor
            self.bytes += tensor.nbytes

    def close(self) -> list[Path]:
        """Write what is left, give the files their names and, where they are several, write the index; the files."""
        self._write()
        if len(self.files) == 1:
            return [self.files[0][0].rename(self.folder / WEIGHTS_NAME)]
        places, stem = {}, Path(WEIGHTS_NAME).stem
        for i, (path, names) in enumerate(self.files):
            final = path.rename(self.folder / f"{stem}-{i + 1:05}-of-{len(self.files):05}.safetensors")
            places |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return sorted({self.folder / name for name in places.values()})

    def _write(self) -> None:
        path = self.folder / f"{len(self.files):05}.safetensors.part"
        save_file(self.held, path, self.metadata)
        self.files.append((path, list(self.held)))
        self.total += self.bytes
        self.held, self.bytes = {}, 0
