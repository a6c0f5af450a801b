# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint has, found in the headers of its files before any tensor is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from ..files import check_regular, read_json, unreadable
from .gguf_file import GGUFFile
from .kinds import describe

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# The indices of shards, as diffusers and transformers call them.
INDEX_NAMES = (f"{WEIGHTS_NAME}.index.json", "model.safetensors.index.json")
CONFIG_NAME = "config.json"

MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SHOWN_NAMES = 5
SHOWN_CHARACTERS = 120

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.IGNORECASE)
# What holds weights but is never opened, because it is or may hold a pickle.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    shape: that of its values. dtype: as the file calls it, "BF16" or "Q4_K". key: its name in the
    file. scale: the name in the same file of the factor that its stored values lack, if any.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str = ""
    key: str = ""
    scale: str | None = None


def find_weights(path: str | Path, subfolder: str) -> tuple[list[Path], Path]:
    """The files of weights at `path`, and the folder whose config.json describes them.

    path: a .safetensors or .gguf file, one of several shards, or a folder that holds one model,
    itself or in its folder `subfolder` or "model". Raises FileNotFoundError, OSError for what is
    neither file nor folder, ValueError where a folder holds several models.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"weights must be a .safetensors file or a folder, got {path}, "
                "which does not exist; check the path"
            )
        check_regular(path)
        return _with_its_shards(path), path.parent
    for folder in (path / subfolder, path, path / "model"):
        files = _files_in(folder)
        if files:
            return files, folder
    others = sorted(file for file in path.iterdir() if file.suffix in _OTHER_WEIGHTS)
    if others:
        raise ValueError(
            f"{path} must hold .safetensors weights, but {others[0].name} is "
            f"{describe(others[0])}; convert it to safetensors"
        )
    raise FileNotFoundError(
        f"{path} must hold .safetensors weights, here or in {subfolder}/ or "
        "model/, got none; check the download"
    )


def _files_in(folder: Path) -> list[Path]:
    """The files of the one model that lies directly in `folder`; none where there is none."""
    for index in (folder / name for name in INDEX_NAMES):
        if index.is_file():
            return _indexed(index)
    files = _with_suffix(folder, ".safetensors") or _with_suffix(folder, ".gguf")
    if folder / WEIGHTS_NAME in files:
        return [folder / WEIGHTS_NAME]
    if files and files == _with_its_shards(files[0]):
        return files
    if len(files) > 1:
        found = first_few("found", [file.name for file in files])
        raise ValueError(
            f"{folder} must hold one model, but {found}; give the path of one of the files"
        )
    return files


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    """The files in `folder` with this suffix, in upper case as well."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() == suffix)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not names or not plain:
        raise ValueError(
            f"{index} must name a file beside it for every tensor in its weight_map, but it does "
            "not; download it again"
        )
    files = [index.parent / name for name in sorted(names)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        name = printable(missing[0])
        raise FileNotFoundError(
            f"the index lists {name}, but {index.parent / name} does not exist; download all shards"
        )
    return files


def _with_its_shards(file: Path) -> list[Path]:
    """`file`, or all shards of the model of which its name says that it is one."""
    match = _SHARD.fullmatch(file.stem)
    if not match or file.suffix.lower() != ".safetensors":
        return [file]
    count = int(match["count"])
    of = file.stem[match.end("number") : match.start("count")]  # "-of-", in its case
    names = [f"{match['stem']}-{i + 1:05}{of}{count:05}{file.suffix}" for i in range(count)]
    shards = [file.with_name(name) for name in names]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FileNotFoundError(
            f"{file.name} is one of {count} shards, but {first_few('missing', missing)}; "
            "download all shards"
        )
    return shards


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of the files by name, from the headers alone. Raises FileNotFoundError or OSError
    for a path without a regular file, ValueError for a file that is not complete and valid, saying
    what it is."""
    entries: dict[str, Entry] = {}
    for path in files:
        check_regular(path)
        try:
            found = _entries(path)
        except OSError as error:
            raise unreadable(path, error) from None
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise ValueError(
                f"the shards of a model must hold different tensors, but {path.name} repeats "
                f"{printable(twice[0])}; check that they belong together"
            )
        entries.update(found)
    return entries


def _entries(path: Path) -> dict[str, Entry]:
    if GGUFFile.is_one(path):
        with opened(path) as file:
            return {
                name: Entry(path, file.shape(name), file.dtype(name), name)
                for name in file.keys()  # noqa: SIM118 - not a mapping
            }
    return {
        name: Entry(path, tuple(item["shape"]), item["dtype"], name)
        for name, item in _read_header(path).items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The free text in a safetensors file's header, by key; {} where there is none."""
    if GGUFFile.is_one(path):
        return {}
    with opened(path) as file:
        return file.metadata() or {}


def _read_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        _check_start(path, start, length, size)
        header_bytes = start[8:] + file.read(length - 1)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        complete = all(map(_is_entry, header.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(
            f"{path} must be a safetensors file, but the {length:,} bytes of its "
            "header are not one; download it again"
        )
    if end != size:
        raise ValueError(
            f"{path} must be a complete safetensors file: its header declares "
            f"{end:,} bytes, the file has {size:,}; download it again"
        )
    return header


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    """ValueError unless a file of `size` bytes that begins like this can be safetensors: the length
    of a JSON object, and the object's brace."""
    if start[8:] != b"{" or length > MOST_HEADER_BYTES:
        raise ValueError(
            f"{path} must be a safetensors file, but is {describe(path)}; give a safetensors file"
        )
    if length > size - 8:
        raise ValueError(
            f"{path} must be a complete safetensors file: its header claims "
            f"{length:,} bytes, the file has {size:,}; it is cut short, so download it again"
        )


def _is_entry(item: dict) -> bool:
    """Whether an item of a header has the form that the format requires."""
    shape = item["shape"]
    return isinstance(item["dtype"], str) and isinstance(shape, list) and all(map(_is_size, shape))


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**62


@contextmanager
def opened(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """The file, to read tensors from by `keys`, `get_tensor` and `metadata`; ValueError where the
    library that reads it finds it invalid, also later, while the body reads."""
    check_regular(path)
    if GGUFFile.is_one(path):
        yield GGUFFile(path, device)
        return
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        _refuse(path, error)


def _refuse(path: Path, error: Exception) -> NoReturn:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(
        f"{path} must be a valid safetensors file, got {printable(reason)}; download it again"
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
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    problems = [first_few(kind, names) for kind, names in kinds.items() if names]
    if problems:
        paths = {entry.path for entry in entries.values()}
        places = sorted(f"{path.parent.name}/{path.name}" for path in paths)
        raise ValueError(
            f"the weights must match the model tensor by tensor, but in "
            f"{', '.join(places) or 'the file'} {'; '.join(problems)}; "
            "check that file and configuration belong together"
        )


def first_few(label: str, names: list[str]) -> str:
    """ "missing (7): a, b, c, d, e and 2 more"."""
    shown = ", ".join(map(printable, names[:SHOWN_NAMES]))
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{label} ({len(names)}): {shown}{more}"


def printable(text: str) -> str:
    """`text` from a file, fit for a sentence on a terminal: without control characters, and cut
    where it is very long."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:SHOWN_CHARACTERS])
    return shown if len(text) <= SHOWN_CHARACTERS else f"{shown}..."
