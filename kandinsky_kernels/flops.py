# SPDX-License-Identifier: Apache-2.0
"""The floating-point operations of every operator, for torch.utils.flop_counter.FlopCounterMode.

As PyTorch's counter does, the formulas count matrix products and convolutions alone, two operations
for each product of two numbers. So the norms, which have none, count nothing, like
torch.nn.functional.layer_norm.

What block-sparse attention costs depends on the selection. Where its values cannot be read, of fake
tensors, every block counts as kept.

PyTorch's counter takes longer to import than this package. So the formulas are registered when the
program itself imports the counter, before or after this package.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._ops import ops
from .selections import unpacked

COUNTER = "torch.utils.flop_counter"


def _nothing(*args, **kwargs) -> int:
    return 0


def _select_blocks(query_means: Tensor, *args, **kwargs) -> int:
    """One product of the means of every block of queries with those of every block of keys."""
    B, H, N, D = query_means.shape
    return 2 * B * H * N * N * D


def _pairs(query: Tensor, selection: Tensor, block_offsets: Tensor) -> int:
    """The pairs of a query and a key whose blocks are kept, over all samples and heads."""
    B, S, H = query.shape[:3]
    if selection.is_meta or is_fake(selection) or is_fake(block_offsets):
        return B * H * S * S
    lengths = block_offsets.diff().double()  # [N]
    keep = unpacked(selection, lengths.shape[0]).double()  # [B, H, N, N]
    pairs = keep @ lengths @ lengths  # [B, H]
    return int(pairs.sum())


def _attention(query, key, value, selection, block_offsets, *args, **kwargs) -> int:
    """Two products over the kept pairs: the logits, and the sum of values."""
    return 2 * 2 * query.shape[-1] * _pairs(query, selection, block_offsets)


def _attention_backward(
    query, key, value, out, lse, selection, block_offsets, *args, **kwargs
) -> int:
    """Five products over the kept pairs: the logits again, their gradient, and three gradients."""
    return 5 * 2 * query.shape[-1] * _pairs(query, selection, block_offsets)


def _frame_attention(query: Tensor, key: Tensor, value: Tensor, first_frame: int, *_, **__) -> int:
    """Two products, where frame t of the queries sees first_frame + t + 1 frames of keys."""
    B, T, P, D = query.shape
    frames_seen = sum(first_frame + t + 1 for t in range(T))
    return 2 * 2 * B * P * frames_seen * key.shape[2] * D


def _convolution(x_padded: Tensor, weight: Tensor, *args, out_val: Tensor, **kwargs) -> int:
    """One product for each number of the result, input channel and tap."""
    return 2 * out_val.numel() * math.prod(weight.shape[1:])


FORMULAS: dict[str, Callable[..., int]] = {
    "modulated_norm": _nothing,
    "modulated_norm_backward": _nothing,
    "gated_add_norm": _nothing,
    "gated_add_norm_backward": _nothing,
    "norm_rope": _nothing,
    "norm_rope_backward": _nothing,
    "select_blocks": _select_blocks,
    "block_sparse_attention": _attention,
    "block_sparse_attention_backward": _attention_backward,
    "group_moments": _nothing,
    "group_norm_silu": _nothing,
    "frame_causal_attention": _frame_attention,
    "causal_conv3d": _convolution,
}


def _register() -> None:
    """Give every formula to PyTorch's counter."""
    register_flop_formula = importlib.import_module(COUNTER).register_flop_formula
    for name, formula in FORMULAS.items():
        register_flop_formula(getattr(ops, name), get_raw=True)(formula)


class _Registering(Loader):
    """Loads the counter as ``loader`` does, and registers the formulas."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    """Finds the counter once, as other finders do."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register_with_the_counter() -> None:
    """Register the formulas now, or as soon as PyTorch's counter is imported."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
