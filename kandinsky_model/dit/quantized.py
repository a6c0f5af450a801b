# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits for the large linear layers of the visual blocks, and their products with
activations in 8 bits. It is off unless asked for.

A weight is kept as int8 or float8_e4m3fn values with one fp32 scale per row: weight = values *
scale. The scale maps the largest magnitude of a row to the largest number of the dtype. There are
four modes:

- "int8" and "fp8" save memory only. The weight is made again in the dtype of the activations, for
  each product.
- "int8-dynamic" and "fp8-dynamic" also quantise the activations, one scale per token, and multiply
  in 8 bits. Where the device cannot, and where gradients are wanted, they compute as the other two.
  A difference in the last bit of an activation can become a whole step of 8 bits, so the same seed
  gives the same pixels only for the same batch on the same device.

Modulations, embeddings, text blocks, the keys and values of cross-attention and the out layer keep
their full width: they are small, and errors in them matter more.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import QUANTIZATIONS
from .linear import ALL, Linear

if TYPE_CHECKING:
    from .transformer import DiffusionTransformer3D

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Tokens of one product in 8 bits: for all tokens, its sums in 32 bits would be the largest tensor.
ROWS_AT_ONCE = 16384
# cuBLAS requires so many rows and such widths of int8 and fp8 products. Every released width is a
# multiple of 256.
FEWEST_ROWS = 17
MULTIPLE = 16
# Whether the CPU has instructions for int8 products. Without them torch's loop took 29 times as
# long as an fp32 product.
CPU_MULTIPLIES = torch.cpu._is_vnni_supported()
# How far a product on trial may be off, relative to its largest value: far above any rounding, far
# below what a wrong layout gives.
AGREEMENT = 0.01
_LAYER = re.compile(
    r"visual_transformer_blocks\.\d+\.(self_attention\.(?:to_query|to_key|to_value|out_layer)"
    r"|cross_attention\.(?:to_query|out_layer)|feed_forward\.(?:in_layer|out_layer))"
)
# (mode, device, dtype of activations): why the device does not multiply in 8 bits, or None
_reasons: dict[tuple[str, torch.device, torch.dtype], str | None] = {}
_log = logging.getLogger(__name__)


def kind_of(name: str) -> str | None:
    """Which kind of layer a name means, such as "self_attention.to_query"; None for a layer that is
    not quantised."""
    match = _LAYER.fullmatch(name)
    return match[1] if match else None


def check_mode(mode: str) -> str:
    """How a mode stores weights, "int8" or "fp8". Raises ValueError for an unknown mode."""
    if mode not in QUANTIZATIONS:
        raise ValueError(f"quantisation must be one of {', '.join(QUANTIZATIONS)}, got {mode!r}")
    return mode.removesuffix("-dynamic")


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., C] as values [..., C] of `dtype` times scale [..., 1] in fp32, each value to half a
    step of the dtype. Rows of zeros stay zeros.

    In plain PyTorch this is several passes over x; one fused kernel, or the norm before it, could
    do it in one.
    """
    largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = x / scale  # in at least fp32
    if dtype == torch.int8:  # a cast to it would cut off, where one to fp8 rounds
        scaled.round_()
    return scaled.to(dtype), scale


def pack(
    name: str,
    weight: Tensor,
    mode: str,
) -> dict[str, Tensor]:
    """The tensors that the quantised layer `name` stores in place of its weight, by their names.
    Raises ValueError where the weight is not finite."""
    values, scale = quantize_rows(weight, DTYPES[check_mode(mode)])
    if not scale.isfinite().all():
        raise ValueError(
            f"quantising requires finite weights, got NaN or infinity in {name}; "
            "check the file they came from"
        )
    return {f"{name}.weight": values, f"{name}.weight_scale": scale}


class QuantizedLinear(Linear):
    """A linear layer whose weight is `weight` (8 bits) times `weight_scale` (fp32, [out, 1]). Both
    keep their dtypes in every cast."""

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        mode: str,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        stored = DTYPES[check_mode(mode)]
        weight = torch.empty(
            out_features,
            in_features,
            dtype=stored,
            device=device,
        )
        scale = torch.empty(
            out_features,
            1,
            dtype=torch.float32,
            device=device,
        )
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        parameter = None
        if bias:
            parameter = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)
        self.register_parameter("bias", parameter)
        self.additions = None

    def product(self, x: Tensor, rows: slice = ALL) -> Tensor:
        bias = self._bias(x.dtype, rows)
        if not self._in_8_bits(x):
            return F.linear(x, self.dequantized(x.dtype, rows), bias)
        weight = self.weight[rows]
        scale = self.weight_scale[rows]
        parts = [
            multiply(
                *quantize_rows(part, weight.dtype),
                weight,
                scale,
                bias,
                x.dtype,
            )
            for part in x.flatten(0, -2).split(ROWS_AT_ONCE)  # [at most ROWS_AT_ONCE, in]
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.unflatten(0, x.shape[:-1])  # [..., out]

    def dequantized(self, dtype: torch.dtype, rows: slice = ALL) -> Tensor:
        """The weight in `dtype`, rounded once: 8 bits fit into every dtype without loss, and the
        product with the scale is formed in at least fp32."""
        return self.weight[rows].to(dtype).mul_(self.weight_scale[rows])

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        values, scale = quantize_rows(self.dequantized(change.dtype) + change, self.weight.dtype)
        self.weight.copy_(values)
        self.weight_scale.copy_(scale)

    def empty(self, out_features: int) -> QuantizedLinear:
        has_bias = self.bias is not None
        return QuantizedLinear(
            self.in_features,
            out_features,
            has_bias,
            self.mode,
            device="meta",
        )

    def _in_8_bits(self, x: Tensor) -> bool:
        """Whether activations like x are multiplied in 8 bits."""
        if not self.mode.endswith("-dynamic"):
            return False
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            return False
        if torch.is_grad_enabled() and x.requires_grad:  # these products have no derivative
            return False
        return reason_against(self.mode, x.device, x.dtype) is None

    def _apply(self, fn, recurse: bool = True) -> QuantizedLinear:
        def move(tensor: Tensor) -> Tensor:
            """What `fn` does to devices and to the bias, but no cast of values and scales."""
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or tensor is self.bias:
                return moved
            return tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


def multiply(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(x * x_scale) (weight * weight_scale)^T + bias in `dtype`: [S, out].

    x [S, in] and weight [out, in] are both int8 or both fp8; x_scale is [S, 1], weight_scale
    [out, 1], both fp32.
    """
    if x.dtype != torch.int8:
        return torch._scaled_mm(
            x,
            weight.T,
            scale_a=x_scale,
            scale_b=weight_scale.T,
            bias=bias,
            out_dtype=dtype,
        )
    if x.is_cpu and not CPU_MULTIPLIES:
        sums = F.linear(x.float(), weight.float())  # the same integers
    else:
        missing = max(0, FEWEST_ROWS - x.shape[0])
        padded = F.pad(x, (0, 0, 0, missing))
        sums = torch._int_mm(padded, weight.T)[: x.shape[0]].float()
    y = sums.mul_(x_scale).mul_(weight_scale.T)
    if bias is not None:
        y.add_(bias)
    return y.to(dtype)


@torch.compiler.assume_constant_result
def reason_against(
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Why a device does not multiply in 8 bits with results in `dtype`, or None. It is found out
    once, on a small case, and logged once."""
    key = (mode, device, dtype)
    if key not in _reasons:
        _reasons[key] = reason = _try(DTYPES[check_mode(mode)], device, dtype)
        if reason is not None:
            _log.warning(
                "%s computes as %s for %s activations on %s: %s",
                mode,
                check_mode(mode),
                dtype,
                device,
                reason,
            )
    return _reasons[key]


@torch.no_grad()
def _try(
    stored: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Why a product on `device` fails or is wrong, judged by one in fp64; or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    bias = torch.randn(48, generator=generator)
    operands = [*quantize_rows(x, stored), *quantize_rows(weight, stored)]
    x, x_scale, weight, weight_scale = (tensor.double() for tensor in operands)
    exact = F.linear(x * x_scale, weight * weight_scale, bias.double())
    try:
        x, x_scale, weight, weight_scale = (tensor.to(device) for tensor in operands)
        result = multiply(x, x_scale, weight, weight_scale, bias.to(device, dtype), dtype)
        off = ((result.cpu().double() - exact).abs().amax() / exact.abs().amax()).item()
    except Exception as error:  # whatever torch has against it is the reason
        return f"the product is refused ({str(error).strip().splitlines()[0]})"
    if off <= AGREEMENT:
        return None
    return f"the product is wrong by {off:.1%} of its largest value"


def mode_of(network: nn.Module | None) -> str | None:
    """The mode that a network is quantised in; None where it is not, or is none."""
    if network is None:
        return None
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            return layer.mode
    return None


def _large_layers(dit: nn.Module) -> list[tuple[str, Linear]]:
    """The layers that quantising replaces, by name."""
    large = [(name, layer) for name, layer in dit.named_modules() if kind_of(name)]
    return cast("list[tuple[str, Linear]]", large)


def _empty_like(layer: Linear, mode: str) -> QuantizedLinear:
    """A quantised layer of the sizes of `layer`, on the meta device."""
    has_bias = layer.bias is not None
    return QuantizedLinear(
        layer.in_features,
        layer.out_features,
        has_bias,
        mode,
        device="meta",
    )


def replace_layers(dit: nn.Module, mode: str) -> None:
    """Put empty quantised layers, on the meta device, in the places of the large ones."""
    for name, layer in _large_layers(dit):
        dit.set_submodule(name, _empty_like(layer, mode))


@torch.no_grad()
def quantize(dit: DiffusionTransformer3D, mode: str) -> DiffusionTransformer3D:
    """Quantise a DiffusionTransformer3D in place, one layer after the other, and prepare it for
    inference. Adapters stay as they are.

    mode: one of `config.QUANTIZATIONS`, see above. Raises ValueError for another mode, for a
    network that is quantised already, and for weights that are not finite.
    """
    check_mode(mode)
    if mode_of(dit) is not None:
        raise ValueError(
            "quantising requires weights of full width, "
            f"but these are in {mode_of(dit)} already; load the original"
        )
    for attention in dit.attentions:
        attention.forget()  # or the joint weight would outlive its parts
    for name, layer in _large_layers(dit):
        packed = pack(name, layer.weight, mode)
        state = {key.removeprefix(f"{name}."): tensor for key, tensor in packed.items()}
        if layer.bias is not None:
            state["bias"] = layer.bias
        quantized = _empty_like(layer, mode)
        quantized.load_state_dict(state, assign=True)
        quantized.additions = layer.additions
        dit.set_submodule(name, quantized)
    return dit.prepare()


def weight_error(
    weight: Tensor,
    values: Tensor,
    scale: Tensor,
) -> tuple[float, float]:
    """The Euclidean norms of the error that quantising a weight to values * scale makes, and of the
    weight."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    error = values.to(wide.dtype).mul_(scale).sub_(wide)
    size = torch.linalg.vector_norm(wide, dtype=torch.float64)
    return torch.linalg.vector_norm(error, dtype=torch.float64).item(), size.item()


def quantization_report(original: nn.Module, quantized: nn.Module) -> list[str]:
    """Lines on how far the weights of `quantized` are from those of `original`, the same network
    before it was quantised: see `report_lines`."""
    errors = {}
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = original.get_parameter(f"{name}.weight").detach()
            errors[name] = weight_error(weight, layer.weight, layer.weight_scale)
    return report_lines(errors)


def report_lines(errors: Mapping[str, tuple[float, float]]) -> list[str]:
    """The relative rms error of the weights of each kind of layer and of all, and the worst layer.

    errors: what `weight_error` gave for each layer, by the layer's name.
    """
    kinds: dict[str | None, list[tuple[float, float]]] = {}
    for name, pair in errors.items():
        kinds.setdefault(kind_of(name), []).append(pair)
    rows = [*sorted(kinds.items()), ("all", list(errors.values()))]
    lines = ["relative rms error of the weights"]
    for kind, pairs in rows:
        lines.append(f"{kind:26} {_relative(pairs):7.3%} in {len(pairs)} layers")
    worst = max(errors, key=lambda name: _relative([errors[name]]))
    lines.append(f"worst: {worst}, {_relative([errors[worst]]):.3%}")
    return lines


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    """The relative error of several weights together, from their norms of error and weight."""
    error = math.hypot(*(pair[0] for pair in pairs))
    size = math.hypot(*(pair[1] for pair in pairs))
    return error / size if size else 0.0
