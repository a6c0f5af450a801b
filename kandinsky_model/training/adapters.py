# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in training: matrices beside the frozen weights, and the files that hold them
afterwards.

Names and files are the official ones: `lora.safetensors` with `<module>.lora_A.weight` [r, in] and
`<module>.lora_B.weight` [out, r], and `config_lora.json` as PEFT writes it. The header repeats rank
and alpha for diffusers, and has the trigger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.lora import Additions
from ..dit.attention import Linear
from ..media.video import replacing
from .config import TARGETS, LoRAConfig

NAME = "trained"  # of the adapter among a layer's additions
WEIGHTS_NAME, CONFIG_NAME = "lora.safetensors", "config_lora.json"


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


def save_lora(
    folder: Path, matrices: Mapping[str, Tensor], config: LoRAConfig, dtype: torch.dtype, model: str
) -> Path:
    """Write both files, each whole or not at all, and return the path of the weights. model: what
    it was trained on."""
    alpha = config.alpha or config.rank
    peft = {"r": config.rank, "lora_alpha": alpha, "target_modules": list(config.targets)}
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **peft,
    }
    with replacing(folder / CONFIG_NAME) as target:
        target.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(peft)} | (
        {"trigger": config.trigger} if config.trigger else {}
    )
    with replacing(folder / WEIGHTS_NAME) as target:
        save_file(
            {
                name: matrix.detach().to("cpu", dtype).contiguous()
                for name, matrix in matrices.items()
            },
            target,
            metadata,
        )
    return folder / WEIGHTS_NAME
