# SPDX-License-Identifier: Apache-2.0
"""The state of a training in one file that is whole or absent: weights, moments of the optimiser,
moving average and losses. A training that goes on from it reaches the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.headers import opened, read_headers
from .config import TrainConfig
from .optimizers import MOMENTS, SCALES, learning_rate, make_optimizer
from .tensors import write_tensors

ABOUT = "kandinsky_training"  # the key in the header under which `about` of `State.save` is kept


class State:
    """Parameters in training, fp32 and by name, with everything that their next step depends on.

    The parameters are changed in place. losses: of every step so far. average: the moving average
    of the parameters, empty where `config.ema` is 0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig):
        self.parameters = dict(parameters)
        self.config = config
        self.losses: list[float] = []
        self.optimizer = make_optimizer(self.parameters.values(), config)
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
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, average in self.average.items():
            average_into(average, self.parameters[name], self.config.ema, self.step)
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
        kept = (*MOMENTS[self.config.optimizer], *SCALES)
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            moments = self.optimizer.state[parameter]
            # copied, because a file cannot hold the tables of values that parameters share
            tensors |= {f"{key}.{name}": moments[key].clone() for key in kept if key in moments}
        for name, average in self.average.items():
            tensors[f"average.{name}"] = average
        write_tensors(path, tensors, {ABOUT: json.dumps(about)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote of a training of the same parameters. ValueError for the
        state of anything else."""
        self._check(path)
        with opened(path) as file:
            names = set(file.keys())
            self.losses = file.get_tensor("losses").tolist()
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                moments = {
                    key: file.get_tensor(f"{key}.{name}").to(parameter.device, copy=True)
                    for key in (*MOMENTS[self.config.optimizer], *SCALES)
                    if f"{key}.{name}" in names
                }
                self.optimizer.state[parameter] = {"step": self._count(parameter), **moments}
            for name, average in self.average.items():
                average.copy_(file.get_tensor(f"average.{name}"))

    def _count(self, parameter: nn.Parameter) -> int | Tensor:
        """The number of steps, in the form in which the optimiser keeps it for a parameter."""
        if self.config.optimizer == "adamw8bit":
            return self.step
        fused = self.optimizer.defaults["fused"]
        return torch.tensor(float(self.step), device=parameter.device if fused else "cpu")

    def _check(self, path: Path) -> None:
        """ValueError unless the file has the losses of some steps, and every tensor that `load`
        reads in its shape."""
        shapes = {name: tuple(entry.shape) for name, entry in read_headers([path]).items()}
        wanted = {}
        for name, parameter in self.parameters.items():
            for key in ("parameter", *MOMENTS[self.config.optimizer]):
                wanted[f"{key}.{name}"] = tuple(parameter.shape)
        for name, average in self.average.items():
            wanted[f"average.{name}"] = tuple(average.shape)
        wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
        losses = shapes.get("losses", ())
        if len(losses) != 1 or losses[0] < 1:
            wrong.insert(0, "losses")
        if wrong:
            raise ValueError(
                f"{path} must hold the state of this training, but {len(wrong)} tensors are "
                f"missing or of another shape, {wrong[0]} first; begin anew in another folder"
            )


def read_about(path: Path) -> dict:
    """What was trained, according to a file of `State.save`. ValueError or OSError for any other
    file."""
    read_headers([path])
    with opened(path) as file:
        text = (file.metadata() or {}).get(ABOUT, "")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise ValueError(
            f"{path} must hold the state of a training, but does not say of which; "
            "choose another folder"
        )
    return about


@torch.no_grad()
def average_into(average: Tensor, current: Tensor, decay: float, step: int) -> None:
    """Move `average` towards `current` after `step` earlier moves.

    The decay is smaller at first, (step + 1) / (step + 10), so that the start is forgotten.
    """
    average.lerp_(current, 1 - min(decay, (step + 1) / (step + 10)))
