# SPDX-License-Identifier: Apache-2.0
"""The linear layer of the transformer, which adapters add to and quantisation replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL = slice(None)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, so that a checkpoint may mix dtypes
    freely.

    `additions` is what adapters add to its output (see lora.py); the rest is what another way to
    store the weight replaces (quant.py).
    rows: of the output, or all.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.additions: nn.Module | None = None

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        y = self.product(x, rows)
        return y if self.additions is None else self.additions(x, y, rows)

    def product(self, x: Tensor, rows: slice = ALL) -> Tensor:
        return F.linear(
            x,
            self.weight[rows].to(x.dtype),
            None if self.bias is None else self.bias[rows].to(x.dtype),
        )

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        """Add to the weight, rounding once, and in place: it may be a part of a larger tensor."""
        self.weight.copy_(self.weight + change)

    def empty(self, out_features: int) -> Linear:
        """A layer of this kind with so many outputs, on the meta device."""
        return Linear(self.in_features, out_features, self.bias is not None, device="meta")


class Additions(nn.Module):
    """What adapters add to one linear layer: low-rank matrices by name. They move with the layer
    and are in no state dict."""

    def __init__(self):
        super().__init__()
        # down [r, in], up [out, r] times alpha / r
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self.scales: dict[str, float] = {}  # of those that are active

    def forward(self, x: Tensor, y: Tensor, rows: slice = ALL) -> Tensor:
        for name, scale in self.scales.items():
            down, up = self.matrices[name]
            y = y + scale * F.linear(F.linear(x, down.to(x)), up[rows].to(x))
        return y

    def _apply(self, fn, recurse: bool = True) -> Additions:
        self.matrices = {name: (fn(down), fn(up)) for name, (down, up) in self.matrices.items()}
        return self

    def change(self) -> Tensor:
        """What the active ones together add to the weight, in at least fp32."""
        pairs = ((scale, *self.matrices[name]) for name, scale in self.scales.items())
        return sum(scale * _wide(up) @ _wide(down) for scale, down, up in pairs)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
