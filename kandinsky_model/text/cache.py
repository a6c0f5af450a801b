# SPDX-License-Identifier: Apache-2.0
"""What text encoders computed, kept on disk: with a prompt that was read before, 16 GB of encoders
need not be read again.

An entry is a safetensors file named by the SHA-256 of all that it was computed from. Prompts
themselves are not written down.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing

LIMIT_BYTES = 2**30  # 584 prompts of 256 tokens, in bf16
ENCODER_FILES = {".safetensors", ".json", ".txt"}

_log = logging.getLogger(__name__)


class TensorCache:
    """Named tensors by what they were made from; the least recently used entries go when all
    together exceed `limit` bytes.

    owner: what every entry depends on besides its own wish, as JSON; `identity` says it of an
    encoder. folder: where the entries lie. A folder that cannot be read or written costs the time
    to compute, nothing else.
    """

    def __init__(self, owner, folder: Path | None = None, limit: int = LIMIT_BYTES):
        self.owner, self.folder, self.limit = owner, folder or default_folder(), limit

    def remember(self, make: Callable[[], Mapping[str, Tensor]], **wish) -> dict[str, Tensor]:
        """The CPU tensors kept for `wish`, of JSON values, or else what `make` returns, which is
        then kept."""
        key = json.dumps([self.owner, wish], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        tensors = _read(path)
        if tensors is None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            self._write(path, tensors)
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as target:
                save_file(tensors, target, {"sha256": checksum(tensors)})
            self._shrink()
        except (OSError, SafetensorError) as error:
            _log.info("cannot keep what was computed from this prompt: %s", error)

    def _shrink(self) -> None:
        entries = sorted(
            ((path.stat(), path) for path in self.folder.iterdir()),
            key=lambda entry: entry[0].st_mtime_ns,
            reverse=True,
        )
        total = 0
        for stat, path in entries:
            total += stat.st_size
            if total > self.limit:
                path.unlink(missing_ok=True)


def default_folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "kandinsky_model" / "text"


def identity(folders: Iterable[Path], dtype: torch.dtype) -> list:
    """What the results of an encoder in `folders` depend on: its files by name, size and time, its
    dtype, and the code that runs it."""
    files = sorted(
        {path for folder in folders for path in folder.iterdir() if path.suffix in ENCODER_FILES}
    )
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    stats = [(path, path.stat()) for path in files]
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    return [
        [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        str(dtype),
        hashlib.sha256(sources).hexdigest(),
        transformers,
    ]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The entry at `path`, if there is one and it is whole; it becomes the most recently used."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if (file.metadata() or {}).get("sha256") != checksum(tensors):
                return None
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):  # of a folder that may only be read
        os.utime(path)
    return tensors
