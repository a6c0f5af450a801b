# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a language model whose weights are kept in 8 or 4 bits, and multiply in the
activations' precision.

"int8" has one scale for each row. "int4" is NF4 of bitsandbytes: one of 16 values of a normal
distribution, and one scale for each 64 of them. Both keep plain tensors, so that weights can move,
be streamed and be counted like any others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TEXT_QUANTIZATIONS

INT8_MAX = 127
BLOCK = 64  # weights of NF4 that share a scale
LEVELS = 16


class Int8Linear(nn.Module):
    """weight int8 [out, in], weight_scale fp32 [out, 1], bias [out] or None."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, out_features: int, in_features: int, has_bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)).float() * self.weight_scale.flatten()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4Linear(nn.Module):
    """weight uint8 [out * in / 2, 1], weight_scale fp32 [out * in / 64], weight_levels fp32 [16],
    bias [out] or None."""

    weight: Tensor
    weight_scale: Tensor
    weight_levels: Tensor

    def __init__(self, out_features: int, in_features: int, has_bias: bool):
        super().__init__()
        self.shape = (out_features, in_features)
        count = out_features * in_features
        self.register_buffer("weight", torch.empty(-(-count // 2), 1, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(-(-count // BLOCK)))
        self.register_buffer("weight_levels", torch.empty(LEVELS))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState

        state = QuantState(
            self.weight_scale,
            shape=torch.Size(self.shape),
            code=self.weight_levels,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        return matmul_4bit(x, self.weight, state, bias=self.bias)


def check_text_mode(mode: str | None) -> None:
    """ValueError for an unknown mode, RuntimeError without the package that it takes."""
    if mode is None:
        return
    if mode not in TEXT_QUANTIZATIONS:
        raise ValueError(
            f"text_quantize must be {' or '.join(TEXT_QUANTIZATIONS)}, got {mode!r}; choose one of "
            "them"
        )
    if mode == "int4":
        try:
            from bitsandbytes import matmul_4bit  # noqa: F401 - whether it is there
        except Exception as error:  # a broken installation fails in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                "a text encoder in int4 requires bitsandbytes >= 0.50, which cannot be imported "
                f"({reason}); pip install 'kandinsky-kernels[int4]', or choose int8"
            ) from error


def is_packed(name: str) -> bool:
    """Whether the tensor of the language model called `name` is quantised: the matrices of its
    layers are."""
    return name.startswith("layers.") and name.endswith("_proj.weight")


def packed_bytes(shape: tuple[int, ...], mode: str) -> int:
    """The bytes that a weight takes once it is quantised."""
    count = math.prod(shape)
    if mode == "int8":
        return count + 4 * shape[0]
    return -(-count // 2) + 4 * -(-count // BLOCK) + 4 * LEVELS


def pack(name: str, weight: Tensor, mode: str) -> dict[str, Tensor]:
    """The tensors that stand for a weight [out, in] called `name`, by their names. Raises
    ValueError for weights that are not finite."""
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise ValueError(
            f"weights must be finite to be quantised, but {name} has NaN or infinity; "
            "take another file of the text encoder"
        )
    if mode == "int8":
        smallest = torch.finfo(torch.float32).tiny  # of a row of zeros
        scale = (wide.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min_(smallest)
        values = (wide / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return {name: values, f"{name}_scale": scale}
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(wide.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return {name: packed, f"{name}_scale": state.absmax, f"{name}_levels": state.code}


def replace_layers(language: nn.Module, mode: str) -> None:
    """Put empty quantised layers into the places of those that `is_packed` names."""
    kind = Int8Linear if mode == "int8" else Int4Linear
    for name, layer in list(language.named_modules()):
        if is_packed(f"{name}.weight") and isinstance(layer, nn.Linear):
            has_bias = layer.bias is not None
            with torch.device("meta"):
                empty = kind(layer.out_features, layer.in_features, has_bias)
            language.set_submodule(name, empty)
