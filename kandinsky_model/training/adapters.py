# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in training: matrices beside the frozen weights, and the files that hold them
afterwards.

Names and files are the official ones: `lora.safetensors` with `<module>.lora_A.weight` [r, in] and
`<module>.lora_B.weight` [out, r], and `config_lora.json` as PEFT writes it. The header repeats rank
and alpha for diffusers, and has the trigger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..dit.linear import Additions, Linear
from .config import TARGETS, LoRAConfig

NAME = "trained"  # of the adapter among a layer's additions


def targeted(dit: nn.Module, targets: Sequence[str]) -> dict[str, Linear]:
    """The linear layers whose names end in one of `targets`; ValueError where one of them names
    none."""
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                "a target must be the end of a linear layer's name, such as "
                f"{TARGETS[0]}, got {target!r}, which is none's; "
                "correct it"
            )
    return {
        name: layer
        for name, layer in layers.items()
        if f".{name}".endswith(tuple(f".{target}" for target in targets))
    }


def attach(
    dit: nn.Module, config: LoRAConfig, seed: int, device: torch.device
) -> dict[str, nn.Parameter]:
    """Put an adapter of fp32 matrices beside each targeted layer, on `device`, and return them by
    their official names.

    A is drawn uniformly from +-1 / sqrt(in), B is zero, as in PEFT: the network begins as it was.
    The other weights are frozen.
    """
    dit.requires_grad_(False)
    generator, parameters = torch.Generator().manual_seed(seed), {}
    for name, layer in targeted(dit, config.targets).items():
        bound = layer.in_features**-0.5
        down = (
            torch.empty(config.rank, layer.in_features)
            .uniform_(-bound, bound, generator=generator)
            .to(device)
        )
        up = torch.zeros(layer.out_features, config.rank, device=device)
        pair = nn.Parameter(down), nn.Parameter(up)
        layer.additions = layer.additions or Additions()
        layer.additions.matrices[NAME], layer.additions.scales[NAME] = pair, config.scale
        parameters |= {
            f"{name}.lora_{half}.weight": matrix for half, matrix in zip("AB", pair, strict=True)
        }
    return parameters


@contextmanager
def switched_off(dit: nn.Module) -> Iterator[None]:
    """The network without the adapter in training, while the body runs."""
    scales = [
        layer.additions.scales
        for layer in dit.modules()
        if isinstance(layer, Linear) and layer.additions is not None
    ]
    kept = [scale.pop(NAME, None) for scale in scales]
    try:
        yield
    finally:
        for scale, value in zip(scales, kept, strict=True):
            scale |= {} if value is None else {NAME: value}
