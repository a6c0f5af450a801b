# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685) of a network: y = W x + scale * alpha / r * B (A x), several at
once, kept apart from the weights or merged into them. adapter_files.py reads them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        file = _find(Path(path))
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
            layer.additions = layer.additions or Additions()
            device = layer.weight.device
            layer.additions.matrices[name] = (down.to(device), up.to(device))
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
                    f"{', '.join(self.loaded) or 'none yet'}, got {name!r}; load it "
                    "first"
                )
            _check_scale(name, scale)
        self.scales = {name: scale for name, scale in scales.items() if scale}
        for layer in self._layers():
            layer.additions.scales = {
                name: scale
                for name, scale in self.scales.items()
                if name in layer.additions.matrices
            }

    def merge(self) -> None:
        """Put the active adapters into the weights for good and forget all; the triggers of the
        merged ones stay.

        A quantised weight is quantised anew with the sum: its steps swallow part of a small change,
        which a layer with additions does not.
        """
        for layer in self._layers():
            if layer.additions.scales:
                layer.add(layer.additions.change())
            layer.additions = None
        self.loaded = {
            name: adapter for name, adapter in self.loaded.items() if name in self.scales
        }

    def remove(self) -> None:
        """Forget all adapters, as if none had been loaded."""
        for layer in self._layers():
            layer.additions = None
        self.loaded, self.scales = {}, {}

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
        """ "path:scale" of the active adapters, as the command line takes them."""
        return tuple(f"{self.loaded[name].path}:{scale:g}" for name, scale in self.scales.items())

    def _layers(self) -> list[Linear]:
        modules = self.network.modules() if self.network else ()
        return [
            layer for layer in modules if isinstance(layer, Linear) and layer.additions is not None
        ]


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(
            f"an adapter's scale must be a finite number, got {scale} for {name}; 1 is usual"
        )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) != 1:
        raise FileNotFoundError(
            "a LoRA is a .safetensors file or a folder with exactly one, got "
            f"{path} with {len(files)}; name the file"
        )
    return files[0]
