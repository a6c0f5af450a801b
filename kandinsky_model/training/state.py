# SPDX-License-Identifier: Apache-2.0
"""What a training has come to: weights, optimizer, average and losses, in one file that is whole or
absent, to go on from bit by bit."""

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

ABOUT = "kandinsky_training"  # the key of the header's metadata with what the run is of, as JSON
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for them


class State:
    """parameters: fp32, by name, changed in place. decay: of their moving average; 0: none is kept.
    losses: of every step so far."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        decay: float,
    ):
        self.parameters, self.decay, self.losses = dict(parameters), decay, []
        # which needs no memory beside
        self.fused = all(parameter.is_cuda for parameter in self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), rate, betas, weight_decay=weight_decay, fused=self.fused
        )
        self.average = (
            {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            if decay
            else {}
        )

    @property
    def step(self) -> int:
        """How many have been done."""
        return len(self.losses)

    @property
    def result(self) -> dict[str, Tensor]:
        """The weights to use: their average, or where none is kept they themselves."""
        return self.average or {
            name: parameter.detach() for name, parameter in self.parameters.items()
        }

    def update(self, rate: float, clip: float, loss: float) -> None:
        """One step down the gradients, clipped to norm `clip` together, which are then
        forgotten."""
        nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, mine in self.average.items():
            average_into(mine, self.parameters[name], self.decay, self.step)
        self.losses.append(loss)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with its result for weights, while the body runs."""
        pairs = [(self.parameters[name], mine) for name, mine in self.average.items()]
        kept = [parameter.data for parameter, _ in pairs]
        try:
            for parameter, mine in pairs:
                parameter.data = mine
            yield
        finally:
            for (parameter, _), own in zip(pairs, kept, strict=True):
                parameter.data = own

    def save(self, path: Path, about: dict) -> None:
        """Write everything. about: what the run is of, for `load` to compare."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            # once there was a step
            tensors |= {
                f"{moment}.{name}": self.optimizer.state[parameter][moment] for moment in MOMENTS
            }
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        with replacing(path) as target:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                target,
                {ABOUT: json.dumps(about)},
            )

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote of a run with the same parameters."""
        with safe_open(path, framework="pt") as file:
            self.losses = file.get_tensor("losses").tolist()
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                moments = {
                    moment: file.get_tensor(f"{moment}.{name}").to(parameter.device, copy=True)
                    for moment in MOMENTS
                }
                count = torch.tensor(
                    float(self.step), device=parameter.device if self.fused else "cpu"
                )
                self.optimizer.state[parameter] = {"step": count, **moments}
            for name, mine in self.average.items():
                mine.copy_(file.get_tensor(f"average.{name}"))


def read_about(path: Path) -> dict:
    """What the run in a file of `State.save` is of. ValueError or OSError for any other file."""
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
def average_into(mine, theirs, decay, step):
    """Move the average `mine` towards `theirs` at the `step`-th time, from 0 on."""
    mine.lerp_(theirs, 1 - min(decay, (step + 1) / (step + 10)))
