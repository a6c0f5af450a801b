# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in training: matrices that are trained beside the frozen weights of linear layers.

Tensors are named as in the published adapters: `<layer>.lora_A.weight` [r, in] and
`<layer>.lora_B.weight` [out, r].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..dit.linear import Additions, Linear
from .config import TARGETS, LoRAConfig

NAME = "trained"  # of the adapter in training among the additions of a layer


def targeted(dit: nn.Module, targets: Sequence[str]) -> dict[str, Linear]:
    """The linear layers of `dit` whose names end in one of `targets`, by name.

    ValueError for a target that no name ends in.
    """
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, Linear)}
    ends = {target: f".{target}" for target in targets}
    for target, end in ends.items():
        if not any(f".{name}".endswith(end) for name in layers):
            raise ValueError(
                f"a target must be the end of a linear layer's name, such as {TARGETS[0]}, "
                f"got {target!r}, which is none's; correct it"
            )
    return {
        name: layer for name, layer in layers.items() if f".{name}".endswith(tuple(ends.values()))
    }


def check_rank(dit: nn.Module, config: LoRAConfig) -> None:
    """ValueError for a rank above what a change of some targeted layer's weight can have at all.

    `dit` may be on the meta device, so that this is known before any memory is taken.
    """
    for name, layer in targeted(dit, config.targets).items():
        most = min(layer.in_features, layer.out_features)
        if config.rank > most:
            raise ValueError(
                f"the rank of a LoRA must be at most {most}, the smaller side of {name}, "
                f"got {config.rank}; 32 is usual"
            )


def attach(
    dit: nn.Module,
    config: LoRAConfig,
    seed: int,
    device: torch.device,
) -> dict[str, nn.Parameter]:
    """Freeze `dit`, put an fp32 adapter on `device` beside each targeted layer, and return the
    adapter's parameters by their published names.

    A is drawn uniformly from +-1 / sqrt(in) and B is zero, as in PEFT, so that the network computes
    at first what it computed before.
    """
    dit.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in targeted(dit, config.targets).items():
        bound = layer.in_features**-0.5
        a = torch.empty(config.rank, layer.in_features)
        a.uniform_(-bound, bound, generator=generator)
        b = torch.zeros(layer.out_features, config.rank)
        pair = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        layer.additions = layer.additions or Additions()
        layer.additions.matrices[NAME] = pair
        layer.additions.scales[NAME] = config.scale
        parameters[f"{name}.lora_A.weight"], parameters[f"{name}.lora_B.weight"] = pair
    return parameters


@contextmanager
def switched_off(dit: nn.Module) -> Iterator[None]:
    """While the body runs, the network computes without the adapter in training."""
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
            if value is not None:
                scale[NAME] = value
