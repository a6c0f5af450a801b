# SPDX-License-Identifier: Apache-2.0
"""The linear layer of the transformer, which adapters add to and quantisation replaces."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL = slice(None)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, so that a checkpoint may mix dtypes
    freely.

    `additions` is what adapters add to the output, see `checkpoints.lora`. `product`, `add` and
    `empty` are what a layer replaces that stores its weight in another form, see `quantized`.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.additions: Additions | None = None

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        """[..., in] -> [..., out], or those outputs alone that `rows` of the weight give."""
        y = self.product(x, rows)
        if self.additions is None:
            return y
        return self.additions(x, y, rows)

    def product(self, x: Tensor, rows: slice = ALL) -> Tensor:
        """The output without what adapters add."""
        weight = self.weight[rows].to(x.dtype)
        bias = self._bias(x.dtype, rows)
        return F.linear(x, weight, bias)

    def _bias(self, dtype: torch.dtype, rows: slice) -> Tensor | None:
        if self.bias is None:
            return None
        return self.bias[rows].to(dtype)

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        """Add to the weight, rounding once, and in place: it may be a part of a larger tensor."""
        self.weight.copy_(self.weight + change)

    def empty(self, out_features: int) -> Linear:
        """A layer of this kind with `out_features` outputs, on the meta device."""
        has_bias = self.bias is not None
        return Linear(
            self.in_features,
            out_features,
            has_bias,
            device="meta",
        )


class Additions(nn.Module):
    """What adapters add to the output of one linear layer: the products of two low-rank matrices
    each, by the adapter's name. The matrices move with the layer and are in no state dict."""

    def __init__(self):
        super().__init__()
        # adapter: down [r, in], up [out, r] times alpha / r
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        # active adapter: by how much it counts
        self.scales: dict[str, float] = {}

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        rows: slice = ALL,
    ) -> Tensor:
        """y, which is the layer's product with x, and what the active adapters add to it."""
        for name, scale in self.scales.items():
            down, up = self.matrices[name]
            # No name for what is [..., r] in between: it is freed before the sum is made.
            y = y + scale * F.linear(F.linear(x, down.to(x)), up[rows].to(x))
        return y

    def _apply(self, fn, recurse: bool = True) -> Additions:
        for name, (down, up) in self.matrices.items():
            self.matrices[name] = (fn(down), fn(up))
        return self

    def change(self) -> Tensor:
        """What the active adapters, of which there must be one, together add to the weight:
        [out, in], in at least fp32."""
        pairs = ((scale, *self.matrices[name]) for name, scale in self.scales.items())
        return reduce(torch.add, (scale * _wide(up) @ _wide(down) for scale, down, up in pairs))


def _wide(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide)
