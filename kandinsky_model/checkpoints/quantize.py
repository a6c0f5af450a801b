# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk -> a quantised one, tensor by tensor: one tensor is in memory at a time.

Everything is written into a folder beside the one that was asked for, which takes that name as the
last act: a folder that exists is complete. Each finished shard is noted with the tensors in it, so
that the same command goes on after an interruption where the last whole shard ended.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import DiTConfig, NablaConfig
from ..dit.quantized import check_mode, kind_of, pack, report_lines, weight_error
from ..files import read_json, replacing
from .configs import check_dit_config, dit_config_json, infer_dit_config, read_dit_config
from .headers import (
    CONFIG_NAME,
    INDEX_NAMES,
    WEIGHTS_NAME,
    Entry,
    check_names,
    find_weights,
    opened,
    read_headers,
)
from .load import QUANTIZATION_KEY, dit_entries, empty_dit, shapes_of
from .locate import locate
from .variants import read

SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 2**20  # for 5,000 tensors and more; Pro has 2,000 when quantised
PROGRESS_NAME = ".progress.json"
# What a half-finished result may hold: nothing else is taken for one, and removed.
_OWN_NAME = re.compile(
    r"\.progress\.json|\.\d{5}\.safetensors|\..*\.partial-.*|config\.json"
    r"|diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Original:
    """The transformer that is quantised."""

    files: list[Path]
    entries: Mapping[str, Entry]
    config: DiTConfig
    nabla: NablaConfig | None

    def identity(self, mode: str) -> dict:
        """What a half-finished result must have been made from, as JSON values."""
        stats = [(path, path.stat()) for path in self.files]
        return {
            "mode": mode,
            "files": [[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in stats],
        }


@dataclass
class _Progress:
    """What of a result is on disk: the tensors in each whole shard, and the error of each layer."""

    identity: dict
    shards: list[list[str]] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def quantize_file(model: str | Path, folder: str | Path, mode: str) -> list[str]:
    """Write the transformer of `model` (a preset, path or hub repository), quantised in `mode`,
    into `folder`; lines about its error.

    The folder, which must be new or empty, gets config.json and shards in diffusers' layout, to
    stand as `transformer/` in a model's folder. What is not quantised keeps its dtype. It appears
    when it is complete; what an interrupted call has written lies beside it, and the same call goes
    on from there. Raises what `locate` and `load_dit` raise, and ValueError: a folder with
    something in it, weights that are quantised already or not finite; RuntimeError while another
    process writes the same folder.
    """
    check_mode(mode)
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"a quantised model is written into a new or empty folder, got {folder}; choose another"
        )
    original = _original(model)
    partial = folder.with_name(f".{folder.name}.quantizing")
    _check_own(partial, original.files)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        progress = _begin(partial, original.identity(mode))
        shards = Shards(partial, {QUANTIZATION_KEY: mode}, progress)
        try:
            for path in original.files:
                _quantize_into(shards, path, original.entries, mode)
        except ValueError:
            shutil.rmtree(partial, ignore_errors=True)  # going on would find the same fault
            raise
        written = shards.close()
        config = dit_config_json(original.config, original.nabla, mode)
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _finish(partial, folder)
    before, after = (
        sum(path.stat().st_size for path in paths) / 1e9
        for paths in (original.files, [folder / path.name for path in written])
    )
    return [
        *report_lines(progress.errors),
        f"{before:.3f} GB became {after:.3f} GB in {len(written)} "
        f"file{'s' if len(written) > 1 else ''}",
    ]


def _original(model: str | Path) -> _Original:
    """The transformer of `model`, whole and of full width."""
    sources = locate(model, parts=("dit",))
    assert sources.dit is not None, "it was asked for"
    # A folder's own layout is kept, because its transformer may be in several files.
    in_folder = sources.dit.is_file() and Path(model).is_dir()
    files, home = find_weights(sources.dit.parent if in_folder else sources.dit, "transformer")
    entries, stored = dit_entries(files)
    if stored:
        raise ValueError(
            f"quantising requires weights of full width, but {files[0]} is in "
            f"{stored} already; take the original"
        )
    config, nabla = read_dit_config(home)
    if config is None:
        config = infer_dit_config(entries)
        nabla = sources.preset.nabla
    check_dit_config(config, entries)
    check_names(shapes_of(empty_dit(config)), entries)
    return _Original(files, entries, config, nabla)


def _check_own(partial: Path, inputs: list[Path]) -> None:
    """ValueError unless `partial` is absent or a half-finished result of this user, whose files
    may be written to and removed. inputs: the files of the original."""
    if not os.path.lexists(partial):
        return
    if any(path.resolve().is_relative_to(partial) for path in inputs):
        raise ValueError(
            f"a result is made in {partial}, but the model lies there; choose another folder"
        )
    is_own = partial.is_dir() and not partial.is_symlink()
    is_own = is_own and (os.name == "nt" or partial.stat().st_uid == os.getuid())
    if not is_own or not all(map(_is_own, os.scandir(partial))):
        raise ValueError(
            f"what is half-finished is kept in {partial}, but something else lies there; move it "
            "away, or choose another folder"
        )


def _is_own(entry: os.DirEntry) -> bool:
    return bool(_OWN_NAME.fullmatch(entry.name)) and not entry.is_symlink()


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the lock goes with the process."""
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(
            f"one process at a time writes a quantised model, but another is writing {partial}; "
            "wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def _begin(partial: Path, identity: dict) -> _Progress:
    """What an interrupted call for the same result has left in `partial`, or a new beginning."""
    try:
        said = read_json(partial / PROGRESS_NAME)
        progress = _Progress(said["identity"], said["shards"], said["errors"])
        whole = [read_headers([_shard(partial, i)]) for i in range(len(progress.shards))]
        same = [sorted(entries) for entries in whole] == [sorted(s) for s in progress.shards]
        if progress.identity == identity and same:
            _log.info("going on after %d whole files", len(progress.shards))
            return progress
    except (OSError, ValueError, LookupError, TypeError):
        pass  # there is none, or it is damaged
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return _Progress(identity)


def _finish(partial: Path, folder: Path) -> None:
    """Give the complete folder its name."""
    if folder.is_dir():
        folder.rmdir()  # empty; a rename replaces no folder on every system
    os.replace(partial, folder)
    (folder / PROGRESS_NAME).unlink(missing_ok=True)


def _quantize_into(shards: Shards, path: Path, entries: Mapping[str, Entry], mode: str) -> None:
    """Put the tensors of one file into the shards, except those that are there already."""
    with opened(path) as file:
        for name, entry in entries.items():
            if entry.path != path or shards.holds(name):
                continue
            tensor = read(file, entry)
            layer = name.removesuffix(".weight")
            if layer == name or not kind_of(layer):
                shards.add({name: tensor})
                continue
            packed = pack(layer, tensor, mode)
            shards.progress.errors[layer] = weight_error(tensor, *packed.values())
            _log.info("%s", layer)
            shards.add(packed)


class Shards:
    """Safetensors files in a folder, each with at most `SHARD_BYTES` of tensors unless one alone is
    larger, and the index that names them.

    A tensor is written as it comes, while the library's writer wants all of a file at once. The
    header is known last: room for it is kept in front, and filled up with spaces, as the format
    allows.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], progress: _Progress):
        self.folder = folder
        self.metadata = {"format": "pt", **metadata}
        self.progress = progress
        self.done = {name for names in progress.shards for name in names}
        self.header: dict[str, dict] = {}  # the entries of the file that is being written
        self.size = 0  # bytes of the tensors in it

    def holds(self, name: str) -> bool:
        """Whether a whole file has this tensor already."""
        return name in self.done

    @property
    def path(self) -> Path:
        """The file that is being written."""
        return _shard(self.folder, len(self.progress.shards))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong together: they never lie in different files."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.header and self.size + size > SHARD_BYTES:
            self._finish()
        if not self.header:
            self.path.write_bytes(bytes(8 + HEADER_BYTES))
        for name, tensor in tensors.items():
            with self.path.open("ab") as file:
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            self.header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self.size, self.size + tensor.nbytes],
            }
            self.size += tensor.nbytes

    def close(self) -> list[Path]:
        """Finish the last file, give all their names and, where they are several, write the index;
        the files."""
        if self.header:
            self._finish()
        count = len(self.progress.shards)
        stem = Path(WEIGHTS_NAME).stem
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = [WEIGHTS_NAME]
        total = 0
        places: dict[str, str] = {}
        for i, name in enumerate(names):
            total += _shard(self.folder, i).stat().st_size - 8 - HEADER_BYTES
            places |= dict.fromkeys(self.progress.shards[i], name)
            _shard(self.folder, i).rename(self.folder / name)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / INDEX_NAMES[0]).write_text(text, encoding="utf-8")
        return [self.folder / name for name in names]

    def _finish(self) -> None:
        """Write the header of the file, and note that the file is whole."""
        header = json.dumps({"__metadata__": self.metadata, **self.header}).encode()
        with self.path.open("r+b") as file:
            file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
        self.progress.shards.append(list(self.header))
        self.done.update(self.header)
        self.header = {}
        self.size = 0
        with replacing(self.folder / PROGRESS_NAME) as target:
            target.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")


def _shard(folder: Path, i: int) -> Path:
    return folder / f".{i:05}.safetensors"
