# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits for the large linear layers of the visual blocks, and products of them with
activations in 8 bits. Opt-in.

A matrix is kept as int8 or float8_e4m3fn values with one fp32 scale per row, weight = values *
scale, where the largest magnitude of the row becomes the largest of the dtype. "int8" and "fp8"
only store so: the weight is made again, in the dtype of the activations, for each product.
"int8-dynamic" and "fp8-dynamic" bring each token's activations into the same form on the fly and
multiply in 8 bits; where the device cannot, and where gradients are wanted, they compute as the
other two. Rounding to 8 bits makes a whole step of what was a last bit, so in these modes a seed
means the same pixels only for the same batch on the same device.

Modulations, embeddings, text blocks, the keys and values of cross-attention and the out layer stay
as they are: small, and sensitive.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import QUANTIZATIONS
from .linear import ALL, Linear

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# of a product in 8 bits: its sums in 32 bits would otherwise be the largest tensor of all
ROWS_AT_ONCE = 16384
# what cuBLAS requires of int8 and fp8 products; every released width is a multiple of 256
FEWEST_ROWS, MULTIPLE = 17, 16
# int8; without its instructions torch's loop took 29 times as long as an fp32 product
CPU_MULTIPLIES = torch.cpu._is_vnni_supported()
AGREEMENT = 0.01  # of the largest value: far above any rounding, far below a wrong layout
_LAYER = re.compile(
    r"visual_transformer_blocks\.\d+\.(self_attention\.(?:to_query|to_key|to_value|out_layer)"
    r"|cross_attention\.(?:to_query|out_layer)|feed_forward\.(?:in_layer|out_layer))"
)
_reasons: dict[tuple, str | None] = {}
_log = logging.getLogger(__name__)


def kind_of(name: str) -> str | None:
    """ "self_attention.to_query" and the like for the layers that are quantised, None for all
    others."""
    match = _LAYER.fullmatch(name)
    return match and match[1]


def check_mode(mode: str) -> str:
    """The storage of a mode, "int8" or "fp8"; ValueError where there is no such mode."""
    if mode not in QUANTIZATIONS:
        raise ValueError(f"quantisation must be one of {', '.join(QUANTIZATIONS)}, got {mode!r}")
    return mode.removesuffix("-dynamic")


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values of x's shape and scale [..., 1], fp32: x is about values * scale, to half a step of
    the dtype. Rows of zeros stay zeros.

    In plain PyTorch this is several passes over x; one fused kernel, or the norm before it, could
    do it in one.
    """
    largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).float()
    scale = (largest / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = x / scale  # fp32 at least
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def pack(name: str, weight: Tensor, mode: str) -> dict[str, Tensor]:
    """The tensors that a quantised layer stores in place of its weight, by their names. ValueError
    where it is not finite."""
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        mode: str,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        self.register_buffer(
            "weight",
            torch.empty(out_features, in_features, dtype=DTYPES[check_mode(mode)], device=device),
        )
        self.register_buffer(
            "weight_scale", torch.empty(out_features, 1, dtype=torch.float32, device=device)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)
            if bias
            else None
        )
        self.additions: nn.Module | None = None

    def product(self, x: Tensor, rows: slice = ALL) -> Tensor:
        bias = None if self.bias is None else self.bias[rows].to(x.dtype)
        if self._in_8_bits(x):
            weight, scale = self.weight[rows], self.weight_scale[rows]
            parts = [
                multiply(*quantize_rows(part, weight.dtype), weight, scale, bias, x.dtype)
                for part in x.flatten(0, -2).split(ROWS_AT_ONCE)
            ]  # of [S, in]
            # [..., out]
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, x.shape[:-1])
        return F.linear(x, self.dequantized(x.dtype, rows), bias)

    def dequantized(self, dtype: torch.dtype, rows: slice = ALL) -> Tensor:
        """The weight in `dtype`, rounded once: 8 bits fit into every dtype without loss, and the
        product is formed in fp32 at least."""
        return self.weight[rows].to(dtype).mul_(self.weight_scale[rows])

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        values, scale = quantize_rows(self.dequantized(change.dtype) + change, self.weight.dtype)
        self.weight.copy_(values)
        self.weight_scale.copy_(scale)

    def empty(self, out_features: int) -> QuantizedLinear:
        return QuantizedLinear(
            self.in_features, out_features, self.bias is not None, self.mode, device="meta"
        )

    def _in_8_bits(self, x: Tensor) -> bool:
        if (
            not self.mode.endswith("-dynamic")
            or self.in_features % MULTIPLE
            or self.out_features % MULTIPLE
        ):
            return False
        if torch.is_grad_enabled() and x.requires_grad:  # these products have no derivative
            return False
        return reason_against(self.mode, x.device, x.dtype) is None

    def _apply(self, fn, recurse: bool = True) -> QuantizedLinear:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return (
                moved
                if moved.dtype == tensor.dtype or tensor is self.bias
                else tensor.to(moved.device)
            )

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
    """(x * x_scale) (weight * weight_scale)^T + bias in `dtype`, [S, out]; x [S, in] and weight
    [out, in] are both int8 or both fp8."""
    if x.dtype != torch.int8:
        return torch._scaled_mm(
            x, weight.T, scale_a=x_scale, scale_b=weight_scale.T, bias=bias, out_dtype=dtype
        )
    if x.is_cpu and not CPU_MULTIPLIES:
        sums = F.linear(x.float(), weight.float())  # the same integers
    else:
        sums = torch._int_mm(F.pad(x, (0, 0, 0, max(0, FEWEST_ROWS - x.shape[0]))), weight.T)[
            : x.shape[0]
        ].float()
    y = sums.mul_(x_scale).mul_(weight_scale.T)
    return (y if bias is None else y.add_(bias)).to(dtype)


@torch.compiler.assume_constant_result
def reason_against(mode: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device does not multiply in 8 bits with results in `dtype`, or None: found out once, on
    a small case, and said once."""
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
def _try(stored: torch.dtype, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((33, 64), (48, 64), (48,))
    )
    operands = [*quantize_rows(x, stored), *quantize_rows(weight, stored)]
    x, x_scale, weight, weight_scale = (tensor.double() for tensor in operands)
    exact = F.linear(x * x_scale, weight * weight_scale, bias.double())
    try:
        result = multiply(
            *(tensor.to(device) for tensor in operands), bias.to(device, dtype), dtype
        )
        error = ((result.cpu().double() - exact).abs().amax() / exact.abs().amax()).item()
    except Exception as error:  # whatever torch has against it is the reason
        return f"the product is refused ({str(error).strip().splitlines()[0]})"
    return (
        None
        if error <= AGREEMENT
        else (f"the product is wrong by {error:.1%} of its largest value")
    )


def mode_of(network: nn.Module | None) -> str | None:
    """The mode a network is quantised in."""
    modules = () if network is None else network.modules()
    return next((layer.mode for layer in modules if isinstance(layer, QuantizedLinear)), None)


def replace_layers(dit: nn.Module, mode: str) -> None:
    """Put empty quantised layers, on the meta device, in the places of those that are quantised."""
    for name, layer in list(dit.named_modules()):
        if kind_of(name):
            dit.set_submodule(
                name,
                QuantizedLinear(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    mode,
                    device="meta",
                ),
            )


@torch.no_grad()
def quantize(dit: nn.Module, mode: str) -> nn.Module:
    """Quantise a DiffusionTransformer3D in place, one layer after the other, and prepare it for
    inference. Adapters stay as they are.

    mode: one of `QUANTIZATIONS`; see above. Raises ValueError for another mode, a network that is
    quantised, weights that are not finite.
    """
    check_mode(mode)
    if mode_of(dit) is not None:
        raise ValueError(
            "quantising requires weights of full width, but these are in "
            f"{mode_of(dit)} already; load the original"
        )
    for block in dit.visual_transformer_blocks:
        block.self_attention.forget()  # or the joint weight would outlive its parts
    for name, layer in list(dit.named_modules()):
        if kind_of(name):
            packed = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in pack(name, layer.weight, mode).items()
            }
            quantized = QuantizedLinear(
                layer.in_features, layer.out_features, layer.bias is not None, mode, device="meta"
            )
            quantized.load_state_dict(
                {**packed, **({} if layer.bias is None else {"bias": layer.bias})}, assign=True
            )
            quantized.additions = layer.additions
            dit.set_submodule(name, quantized)
    return dit.prepare()


def weight_error(weight: Tensor, values: Tensor, scale: Tensor) -> tuple[float, float]:
    """The Euclidean norms of what quantising did to a weight, and of the weight."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    change = values.to(wide.dtype).mul_(scale).sub_(wide)
    return tuple(torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (change, wide))


def quantization_report(original: nn.Module, quantized: nn.Module) -> list[str]:
    """Lines on how far the weights of `quantized` are from those of `original`, the same network
    before: see `report_lines`."""
    layers = {
        name: layer
        for name, layer in quantized.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    return report_lines(
        {
            name: weight_error(
                original.get_submodule(name).weight.detach(), layer.weight, layer.weight_scale
            )
            for name, layer in layers.items()
        }
    )


def report_lines(errors: Mapping[str, tuple[float, float]]) -> list[str]:
    """The relative rms error of the weights for each kind of layer and for all, and the worst
    layer, from their `weight_error`s."""
    kinds = {
        kind: [pair for name, pair in errors.items() if kind_of(name) == kind]
        for kind in map(kind_of, errors)
    }
    rows = [(kind, len(pairs), pairs) for kind, pairs in sorted(kinds.items())] + [
        ("all", len(errors), errors.values())
    ]
    worst = max(errors, key=lambda name: _relative([errors[name]]))
    return [
        "relative rms error of the weights",
        *(f"{kind:26} {_relative(pairs):7.3%} in {count} layers" for kind, count, pairs in rows),
        f"worst: {worst}, {_relative([errors[worst]]):.3%}",
    ]


def _relative(pairs) -> float:
    change, size = (math.hypot(*norms) for norms in zip(*pairs, strict=True))
    return change / size if size else 0.0
