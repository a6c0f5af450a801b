# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685): y = W x + scale * alpha / r * B (A x), several at once, kept
apart from the weights or merged.

A file is safetensors with `<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r],
under official names or with the prefixes that diffusers (`transformer.`) and PEFT
(`base_model.model.`, `.default`) add. alpha is read from the configuration beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..dit.linear import Additions, Linear
from .headers import Entry, read_headers

CONFIG_NAMES = ("config_lora.json", "adapter_config.json")
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|diffusion_model\.)+")
_NAME = re.compile(r"(.+)\.lora_([AB])(\.\w+)?\.weight")

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
        self.network, self.loaded, self.scales = network, {}, {}

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
        Raises FileNotFoundError, or ValueError: names that are no LoRA's, modules the network
        lacks, other widths, a name taken.
        """
        file = find_adapter(path)
        name = name or (
            file.parent.name
            if file.stem in ("lora", "adapter_model", "pytorch_lora_weights")
            else file.stem
        )
        if name in self.loaded:
            raise ValueError(
                f"adapters need different names, got {name!r} twice; pass another name"
            )
        _check_scale(name, scale)
        if self.network is None:
            raise RuntimeError(
                "an adapter requires the model's dit part, which was not loaded; load it too"
            )
        pairs = _pairs(read_headers([file]), self.network, file)
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata() or {}
            tensors = {
                module: (source.get_tensor(a), source.get_tensor(b))
                for module, (a, b) in pairs.items()
            }
        alpha = _alpha(file)
        for module, (down, up) in tensors.items():
            layer = self.network.get_submodule(module)
            layer.additions = layer.additions or Additions()
            device = layer.weight.device
            strength = 1.0 if alpha is None else alpha / down.shape[0]
            layer.additions.matrices[name] = (
                down.to(device),
                (up.float() * strength).to(device, up.dtype),
            )
        self.loaded[name] = Adapter(
            str(path),
            name,
            tuple(tensors),
            max(down.shape[0] for down, _ in tensors.values()),
            metadata.get("trigger", "") if trigger is None else trigger,
        )
        self.set({**self.scales, name: scale})
        _log.info("adapter %s adds to %d modules", name, len(tensors))
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

    def _layers(self) -> list[Linear]:
        modules = self.network.modules() if self.network else ()
        return [
            layer for layer in modules if isinstance(layer, Linear) and layer.additions is not None
        ]


def _digits(scale: float) -> str:
    """As few digits as give the same float back."""
    short = f"{scale:g}"
    return short if float(short) == scale else repr(float(scale))


def _fingerprint(adapter: str, layers: Sequence[tuple[str, Additions]]) -> str:
    digest = hashlib.sha256()
    for name, additions in layers:
        for matrix in additions.matrices.get(adapter, ()):
            digest.update(f"{name} {matrix.dtype} {list(matrix.shape)} ".encode())
            digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy())
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


def _pairs(
    entries: Mapping[str, Entry], network: nn.Module, file: Path
) -> dict[str, tuple[str, str]]:
    """module -> the keys of its down and up matrices, checked against the network."""
    halves: dict[str, dict[str, str]] = {}
    for key in entries:
        match = _NAME.fullmatch(_PREFIX.sub("", key))
        if not match:
            raise ValueError(
                f"{file.name} must hold only LoRA tensors <module>.lora_A.weight and "
                f".lora_B.weight, got {key}; "
                "check that this is a LoRA of Kandinsky 5"
            )
        halves.setdefault(match[1], {})[match[2]] = key
    modules = {name: layer for name, layer in network.named_modules() if isinstance(layer, Linear)}
    pairs = {}
    for module, half in halves.items():
        if half.keys() != {"A", "B"} or module not in modules:
            problem = (
                "has only one of its two matrices"
                if module in modules
                else "is no linear layer of this network"
            )
            raise ValueError(
                f"{file.name} must fit the network, but {module} {problem}; check "
                "which checkpoint it was made for"
            )
        (rank, inner), (outer, up_rank) = (entries[half[name]].shape for name in "AB")
        layer = modules[module]
        if (inner, outer, up_rank) != (layer.in_features, layer.out_features, rank):
            raise ValueError(
                f"{file.name} must fit the network, but for {module} "
                f"({layer.in_features} to {layer.out_features} channels) "
                f"it holds {inner} to {rank} and {up_rank} to {outer}; it was made "
                "for a checkpoint of another width"
            )
        pairs[module] = (half["A"], half["B"])
    if not pairs:
        raise ValueError(f"{file.name} must hold LoRA tensors, got none; download it again")
    return pairs


def _alpha(file: Path) -> float | None:
    """lora_alpha from the configuration beside the file; None, which means alpha = rank, where
    there is none."""
    for name in CONFIG_NAMES:
        config = file.parent / name
        if config.is_file():
            try:
                alpha = json.loads(config.read_text()).get("lora_alpha")
            except ValueError as error:
                raise ValueError(
                    f"{config} must be valid JSON, got {error}; download it again"
                ) from error
            return None if alpha is None else float(alpha)
    return None
