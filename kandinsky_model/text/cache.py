# SPDX-License-Identifier: Apache-2.0
"""What text encoders computed, kept on disk: for a prompt that was embedded before, 16 GB of
encoders need not be read again.

An entry is a safetensors file, named by the SHA-256 of everything its tensors were computed from.
Prompts themselves are not written down. The folder of entries belongs to the cache and can be
entered by its user alone; a file in it that has not the name of an entry is neither counted nor
touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import remove_leftovers, replacing

LIMIT_BYTES = 2**30  # 584 prompts of 256 tokens, in bf16
ENCODER_FILES = {".safetensors", ".gguf", ".json", ".txt"}

_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_CLOCK_SLACK_NS = 10**9  # file systems and clocks differ by less

_log = logging.getLogger(__name__)


class TensorCache:
    """Named tensors on disk, found by what they were computed from.

    owner: what every entry depends on besides its own key, as JSON values; for an encoder,
    `identity`. folder: where the entries lie. limit: when all entries together exceed so many
    bytes, the least recently used ones are removed.

    Whatever is wrong with the folder or a file in it costs the time to compute, and nothing else.
    """

    def __init__(self, owner, folder: Path | None = None, limit: int = LIMIT_BYTES):
        self.owner = owner
        self.folder = folder or default_folder()
        self.limit = limit

    def remember(self, make: Callable[[], Mapping[str, Tensor]], **key) -> dict[str, Tensor]:
        """The CPU tensors kept for `key`, of JSON values; if there are none, what `make` returns,
        which is then kept."""
        made_from = json.dumps([self.owner, key], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(made_from.encode()).hexdigest()}.safetensors"
        tensors = self._read(path)
        if tensors is None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            self._write(path, tensors)
        return tensors

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """The entry at `path`, which becomes the most recently used, or None where there is no
        whole one."""
        try:
            status = path.lstat()
            # Opening a FIFO would block, and a link or a file of this size is none of ours.
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.limit:
                return None
            self._claim_folder()
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if (file.metadata() or {}).get("sha256") != checksum(tensors):
                    return None
        # A damaged file may fail in any way, and each means that it cannot be used.
        except Exception:
            return None
        with suppress(OSError):  # where the folder may only be read
            os.utime(path)
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim_folder()
            with replacing(path) as target:
                save_file(tensors, target, {"sha256": checksum(tensors)})
            self._shrink()
        except (OSError, SafetensorError) as error:
            _log.info("cannot keep what was computed from this prompt: %s", error)

    def _claim_folder(self) -> None:
        """Let only this user into the folder. OSError where it is another user's, who could have
        put anything into its entries."""
        if os.name == "nt":
            return
        status = self.folder.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user")
        if stat.S_IMODE(status.st_mode) & 0o077:
            self.folder.chmod(0o700)

    def _shrink(self) -> None:
        """Remove the least recently used entries beyond the limit, and what is no entry but has the
        name of one."""
        remove_leftovers(self.folder)
        now = time.time_ns() + _CLOCK_SLACK_NS
        entries = []
        for path, status in self._entries():
            if not stat.S_ISREG(status.st_mode):
                _unlink(path)
                continue
            # An entry dated in the future would otherwise count as the latest for ever.
            used = status.st_mtime_ns if status.st_mtime_ns <= now else 0
            entries.append((used, status.st_size, path))
        total = 0
        for _, size, path in sorted(entries, reverse=True):
            total += size
            if total > self.limit:
                _unlink(path)

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What has the name of an entry, with its own status, not that of what it links to."""
        for path in self.folder.iterdir():
            if _ENTRY_NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process may remove entries as well
                    yield path, path.lstat()


def _unlink(path: Path) -> None:
    with suppress(OSError):  # it is gone already, or it is a folder
        path.unlink()


def default_folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "kandinsky_model" / "text"


def identity(places: Iterable[Path], dtype: torch.dtype, quantize: str | None = None) -> list:
    """What the results of an encoder in `places`, files and folders, depend on: its files by name,
    size and time, its dtype and quantisation, and the code that runs it."""
    paths: set[Path] = set()
    for place in places:
        paths.update(place.iterdir() if place.is_dir() else [place])
    files = sorted(path for path in paths if _is_read(path))
    stats = [(path, path.stat()) for path in files]
    code = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        code.update(source.read_bytes())
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    return [
        [[path.name, status.st_size, status.st_mtime_ns] for path, status in stats],
        f"{dtype} {quantize}" if quantize else str(dtype),
        code.hexdigest(),
        transformers,
    ]


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in ENCODER_FILES and path.is_file()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
