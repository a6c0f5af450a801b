# SPDX-License-Identifier: Apache-2.0
"""The state of a training in one file that is whole or absent: weights, moments of the optimiser,
moving average and losses. A training that goes on from it reaches the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.headers import read_headers
from ..files import replacing
from .config import TrainConfig

ABOUT = "kandinsky_training"  # the key in the header under which `about` of `State.save` is kept
MOMENTS = ("exp_avg", "exp_avg_sq")  # the names that AdamW gives them


class State:
    """Parameters in training, fp32 and by name, with everything that their next step depends on.

    The parameters are changed in place. losses: of every step so far. average: the moving average
    of the parameters, empty where `config.ema` is 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig):
        self.parameters = dict(parameters)
        self.config = config
        self.losses: list[float] = []
        # the fused optimiser needs no memory for intermediate results
        self.fused = all(parameter.is_cuda for parameter in self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            config.rate,
            config.betas,
            weight_decay=config.decay,
            fused=self.fused,
        )
        self.average: dict[str, Tensor] = {}
        if config.ema:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return len(self.losses)

    @property
    def result(self) -> dict[str, Tensor]:
        """The weights to use: the moving average, or where there is none the parameters."""
        return self.average or {name: p.detach() for name, p in self.parameters.items()}

    def update(self, loss: float) -> None:
        """Take one step along the gradients, which are cut to the norm `config.clip` and cleared
        afterwards."""
        config = self.config
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, (self.step + 1) / max(1, config.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, average in self.average.items():
            average_into(average, self.parameters[name], config.ema, self.step)
        self.losses.append(loss)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While the body runs, the network computes with its moving average."""
        own = {name: self.parameters[name].data for name in self.average}
        try:
            for name, average in self.average.items():
                self.parameters[name].data = average
            yield
        finally:
            for name, data in own.items():
                self.parameters[name].data = data

    def save(self, path: Path, about: Mapping) -> None:
        """Write the state after at least one step. about: what was trained, as JSON takes it."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        for name, average in self.average.items():
            tensors[f"average.{name}"] = average
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(path) as target:
            save_file(on_cpu, target, {ABOUT: json.dumps(about)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote of a training of the same parameters."""
        with safe_open(path, framework="pt") as file:
            self.losses = file.get_tensor("losses").tolist()
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                device = parameter.device if self.fused else torch.device("cpu")
                moments = {
                    moment: file.get_tensor(f"{moment}.{name}").to(parameter.device, copy=True)
                    for moment in MOMENTS
                }
                steps = torch.tensor(float(self.step), device=device)
                self.optimizer.state[parameter] = {"step": steps, **moments}
            for name, average in self.average.items():
                average.copy_(file.get_tensor(f"average.{name}"))


def read_about(path: Path) -> dict:
    """What was trained, according to a file of `State.save`. ValueError or OSError for any other
    file."""
    read_headers([path])
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get(ABOUT)
    if about is None:
        raise ValueError(
            f"{path} must hold the state of a training, but does not say of which; "
            "choose another folder"
        )
    return json.loads(about)


@torch.no_grad()
def average_into(
    average: Tensor,
    current: Tensor,
    decay: float,
    step: int,
) -> None:
    """Move `average` towards `current` after `step` earlier moves.

    The decay is smaller at first, (step + 1) / (step + 10), so that the start is forgotten.
    """
    average.lerp_(current, 1 - min(decay, (step + 1) / (step + 10)))
