# SPDX-License-Identifier: Apache-2.0
"""Gives objects of another library a faster class and back again, in place: parameters, names,
hooks and adapters stay what they were.

A faster class is one of our mixins before the stock class, under the stock name, since offloading,
caching and saving look classes up by name. Its forward either computes itself or calls
`super().forward`, which is the stock code unchanged.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from functools import cache
from types import MethodType

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger(__package__)


@cache
def _faster(mixin: type, stock: type) -> type:
    # PyTorch's compiler takes what claims to live in torch.nn for granted; everybody else asks
    # where a class is from to save it
    module = mixin.__module__ if stock.__module__.startswith("torch.") else stock.__module__
    faster = type(stock)(
        stock.__name__,
        (mixin, stock),
        {"__module__": module, "__qualname__": stock.__qualname__, "_stock_class": stock},
    )
    if stock.__module__.startswith("diffusers."):
        _inherit_cache_metadata(faster)
    return faster


def _inherit_cache_metadata(faster: type) -> None:
    """diffusers' caches look a block's class up to learn what its arguments and results are: the
    same as its stock class's."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        metadata = copy.copy(TransformerBlockRegistry.get(faster._stock_class))
    except ValueError:  # a block that no cache knows
        return
    metadata._cached_parameter_indices = None
    TransformerBlockRegistry.register(faster, metadata)


def stock_class(thing: object) -> type | None:
    """The class that `thing` had before it was given a faster one, or None."""
    return getattr(type(thing), "_stock_class", None)


def swap(thing: object, mixin: type) -> None:
    """Give `thing` the class of `mixin` before its own."""
    _assume(thing, _faster(mixin, type(thing)))


def restore(thing: object) -> None:
    """Give `thing` its stock class back."""
    _assume(thing, stock_class(thing))


def _assume(thing: object, wanted: type) -> None:
    """Hooks of diffusers and accelerate have put themselves before `forward` and hold the old one:
    they get the new one to call."""
    old, thing.__class__ = type(thing), wanted
    registry = vars(thing).get("_diffusers_hook")
    for holder in (thing, *(registry._fn_refs if registry else ())):
        for name in ("forward", "_old_forward", "original_forward"):
            held = vars(holder).get(name)
            if getattr(held, "__self__", None) is thing and held.__func__ is old.forward:
                setattr(holder, name, MethodType(wanted.forward, thing))


def unexpected(wanted: type, modules: Iterable[nn.Module]) -> str | None:
    """Which of the modules has been put in place of a `wanted`, or None."""
    other = next((type(module).__name__ for module in modules if type(module) is not wanted), None)
    return other and f"it has a {other} in place of a {wanted.__name__}"


def recorded(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether autograd would record what `module` makes of `inputs`."""
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*inputs, *module.parameters())
    )


def refusal(module: nn.Module, *inputs: Tensor) -> str | None:
    """Why `module` must not be computed by our operators this time, or None."""
    if inputs[0].dtype not in DTYPES:
        return f"activations are {inputs[0].dtype}; use float32, bfloat16 or float16"
    return (
        "gradients are recorded; run it under torch.no_grad() for speed"
        if recorded(module, *inputs)
        else None
    )


def falls_back(module: nn.Module, reason: str | None) -> bool:
    """Whether there is a reason, which is reported."""
    if reason is not None:
        report(module, f"runs as diffusers wrote it: {reason}")
    return reason is not None


def report(module: nn.Module, message: str) -> None:
    """Log a message once per accelerated model, and keep it in the set `_reports` that its modules
    share."""
    if not torch.compiler.is_compiling() and message not in module._reports:
        module._reports.add(message)
        _log.warning("%s %s", type(module).__name__, message)
