# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint has: the headers of its safetensors files, read before any tensor is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import read_json

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


# of shards, as diffusers and transformers write them
INDEX_NAMES = (f"{WEIGHTS_NAME}.index.json", "model.safetensors.index.json")


CONFIG_NAME = "config.json"


SHOWN_KEYS = 5


class Entry(NamedTuple):
    """Where a tensor is, and its shape."""

    path: Path
    shape: tuple[int, ...]


def find_weights(path: str | Path, subfolder: str) -> tuple[list[Path], Path]:
    """The safetensors files at `path`, and the folder whose config.json describes them."""
    path = Path(path)
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights must be a .safetensors file or a folder, got {path}, "
            "which does not exist; check the path"
        )
    for folder in (path / subfolder, path, path / "model"):
        for index in (folder / name for name in INDEX_NAMES):
            if index.is_file():
                names = set(read_json(index).get("weight_map", {}).values())
                return [folder / name for name in sorted(names)], folder
        files = sorted(folder.glob("*.safetensors"))
        if folder / WEIGHTS_NAME in files:
            return [folder / WEIGHTS_NAME], folder
        if len(files) > 1:
            found = first_few("found", [file.name for file in files])
            raise ValueError(
                f"{folder} must hold one model, but {found}; give the path of one of the files"
            )
        if files:
            return files, folder
    raise FileNotFoundError(
        f"{path} must hold .safetensors weights, here or in {subfolder}/ or "
        "model/, got none; check the download"
    )


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """Names, places and shapes of all tensors, from the headers alone. ValueError where a file is
    not complete, valid safetensors."""
    entries = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"the index lists {path.name}, but {path} does not exist; download all shards"
            )
        header = _read_header(path)
        entries.update((name, Entry(path, tuple(item["shape"]))) for name, item in header.items())
    return entries


def _read_header(path: Path) -> dict:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} must be a complete safetensors file: its header claims "
                f"{length:,} bytes, the file has {size:,}; "
                "it is cut short or of another kind, so download it again"
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        complete = all(isinstance(item["shape"], list) for item in header.values())
    except (ValueError, LookupError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(
            f"{path} must be a safetensors file, but the {length:,} bytes of its "
            "header are not one; download it again"
        )
    if end != size:
        raise ValueError(
            f"{path} must be a complete safetensors file: its header declares "
            f"{end:,} bytes, the file has {size:,}; "
            "download it again"
        )
    return header


@contextmanager
def opened(path: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """The file, to read tensors from; ValueError where the library finds it to be no safetensors
    file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a valid safetensors file, got {error}; download it again"
        ) from error


def check_names(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]) -> None:
    """ValueError, with the first five of each kind, unless `entries` are exactly the tensors and
    shapes that are expected."""
    missing = [name for name in expected if name not in entries]
    unexpected = sorted(name for name in entries if name not in expected)
    wrong = [
        f"{name} {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    problems = [
        first_few(*problem)
        for problem in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if problem[1]
    ]
    if problems:
        where = (
            ", ".join(
                sorted(
                    {f"{entry.path.parent.name}/{entry.path.name}" for entry in entries.values()}
                )
            )
            or "the file"
        )
        raise ValueError(
            f"the weights must match the model tensor by tensor, but in {where} "
            f"{'; '.join(problems)}; "
            "check that file and configuration belong together"
        )


def first_few(label: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return f"{label} ({len(names)}): {', '.join(names[:SHOWN_KEYS])}{more}"
