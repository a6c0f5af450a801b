# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685) of a network: y = W x + scale * alpha / r * B (A x), several at
once, kept apart from the weights or merged into them. adapter_files.py reads them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..dit.linear import Additions, Linear
from .adapter_files import read_adapter

# The names that programs give to every adapter: their folder's says more.
_COMMON_NAMES = ("lora", "adapter_model", "pytorch_lora_weights")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """One file: which modules it adds to, and the words that call it."""

    path: str
    name: str
    modules: tuple[str, ...]
    rank: int
    trigger: str


class Adapters:
    """The LoRAs of one network: `load`, `set` which are active and how strongly, `merge` or
    `remove` them."""

    def __init__(self, network: nn.Module | None):
        self.network = network
        self.loaded: dict[str, Adapter] = {}
        self.scales: dict[str, float] = {}  # of the active ones

    def load(
        self,
        path: str | Path,
        name: str | None = None,
        scale: float = 1.0,
        trigger: str | None = None,
    ) -> Adapter:
        """Add the adapter in `path` (a .safetensors file, or a folder with one) and make it active
        beside those that already are.

        name: its file's or folder's by default. trigger: words put before every prompt; None takes
        those in the file's metadata.
        Raises FileNotFoundError, or ValueError: a file that is no LoRA, modules the network lacks,
        other widths, a name taken.
        """
        file = find_adapter(path)
        if name is None:
            name = file.parent.name if file.stem in _COMMON_NAMES else file.stem
        if name in self.loaded:
            raise ValueError(
                f"adapters need different names, got {name!r} twice; pass another name"
            )
        _check_scale(name, scale)
        if self.network is None:
            raise RuntimeError(
                "an adapter requires the model's dit part, which was not loaded; load it too"
            )
        read = read_adapter(file, self.network)
        for module, (down, up) in read.matrices.items():
            layer = self.network.get_submodule(module)
            assert isinstance(layer, Linear), "read_adapter checks that"
            additions = layer.additions if isinstance(layer.additions, Additions) else Additions()
            layer.additions = additions
            device = layer.weight.device
            additions.matrices[name] = (down.to(device), up.to(device))
        self.loaded[name] = Adapter(
            str(path),
            name,
            tuple(read.matrices),
            max(down.shape[0] for down, _ in read.matrices.values()),
            read.trigger if trigger is None else trigger,
        )
        self.set({**self.scales, name: scale})
        _log.info("adapter %s adds to %d modules", name, len(read.matrices))
        return self.loaded[name]

    def set(self, scales: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each with its strength; {} switches all off."""
        for name, scale in scales.items():
            if name not in self.loaded:
                raise ValueError(
                    "an adapter must be one of "
                    f"{', '.join(self.loaded) or 'none yet'}, got {name!r}; load it first"
                )
            _check_scale(name, scale)
        self.scales = {name: scale for name, scale in scales.items() if scale}
        for _, additions in self._additions():
            additions.scales = {
                name: scale for name, scale in self.scales.items() if name in additions.matrices
            }

    def merge(self) -> None:
        """Put the active adapters into the weights for good and forget all; the triggers of the
        merged ones stay.

        A quantised weight is quantised anew with the sum: its steps swallow part of a small change,
        which a layer with additions does not.
        """
        for layer, additions in self._additions():
            if additions.scales:
                layer.add(additions.change())
            layer.additions = None
        self.loaded = {
            name: adapter for name, adapter in self.loaded.items() if name in self.scales
        }

    def remove(self) -> None:
        """Forget all adapters, as if none had been loaded."""
        for layer, _ in self._additions():
            layer.additions = None
        self.loaded = {}
        self.scales = {}

    def prompt(self, prompt: str) -> str:
        """`prompt` with the triggers of the active adapters before it, where it does not contain
        them already."""
        missing = [
            self.loaded[name].trigger
            for name in self.scales
            if name in self.loaded and self.loaded[name].trigger not in prompt
        ]
        return " ".join([*missing, prompt])

    def active(self) -> tuple[str, ...]:
        """ "path:scale" of the active adapters, as the command line takes them: the path absolute,
        so that it can be found from another folder, and the scale with all its digits."""
        return tuple(
            f"{os.path.abspath(self.loaded[name].path)}:{_digits(scale)}"
            for name, scale in self.scales.items()
        )

    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of the matrices of each active adapter, in the order of `active`."""
        named = self.network.named_modules() if self.network else ()
        layers = [
            (name, layer.additions)
            for name, layer in named
            if isinstance(layer, Linear) and layer.additions is not None
        ]
        return tuple(_fingerprint(adapter, layers) for adapter in self.scales)

    def _additions(self) -> list[tuple[Linear, Additions]]:
        """The layers that adapters add to, with what they add."""
        modules = self.network.modules() if self.network is not None else ()
        layers = [layer for layer in modules if isinstance(layer, Linear)]
        return [(one, one.additions) for one in layers if isinstance(one.additions, Additions)]


def _digits(scale: float) -> str:
    """As few digits as give the same float back."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(float(scale))


def _fingerprint(adapter: str, layers: Sequence[tuple[str, Additions]]) -> str:
    digest = hashlib.sha256()
    for name, additions in layers:
        for matrix in additions.matrices.get(adapter, ()):
            digest.update(f"{name} {matrix.dtype} {list(matrix.shape)} ".encode())
            digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(
            f"an adapter's scale must be a finite number, got {scale} for {name}; 1 is usual"
        )


def find_adapter(path: str | Path) -> Path:
    """The file of the LoRA at a path: itself, or the only one in a folder. Raises FileNotFoundError
    where there is none."""
    path = Path(path)
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) != 1:
        raise FileNotFoundError(
            "a LoRA is a .safetensors file or a folder with exactly one, got "
            f"{path} with {len(files)}; name the file"
        )
    return files[0]
