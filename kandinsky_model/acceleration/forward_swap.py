# SPDX-License-Identifier: Apache-2.0
"""Replaces the `forward` of another library's modules in place, and brings it back.

A module keeps its class, parameters, hooks and adapters. Only its `forward` becomes a function of
this package, bound to the module as an attribute of it. So whatever looks at classes (loading,
saving, caches, `from_pipe`) finds diffusers' own. A replacement computes by itself or calls
`stock(module, ...)`, which is the class's unchanged forward.

A replaced module carries the mark `_acceleration`, which holds what has been logged about its
model. A replacement whose module has no mark runs the stock forward: that is what a wrapper calls
which still holds a replacement after `restore`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Foreign = Any  # a module of another library, whose attributes are not known here
Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARK = "_acceleration"
# hooks of torch that see a module's inputs or outputs
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# attributes of accelerate and diffusers that say: this forward is wrapped to move or cast weights
WEIGHT_HOOKS = (
    "_hf_hook",
    "_diffusers_hook",
)
# attributes under which modules, diffusers' hooks and cache-dit keep the forward they wrapped
HELD = (
    "forward",
    "_old_forward",
    "original_forward",
    "_original_forward",
)
_log = logging.getLogger(__package__)


class Reports(set):
    """The lines logged about one model, shared by its modules as their mark.

    A pickled model is a stock one: its replaced forwards are pickled by the name "forward", which
    is found on the class, and this mark becomes None.
    """

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> Reports:
        memo[id(self)] = twin = Reports(self)
        return twin


def replacement(function: Function) -> Function:
    """Mark a function as one that stands in for a forward: bound methods are pickled by their
    function's name, and this name leads to the stock forward."""
    function.__name__ = "forward"
    return function


def accelerated(module: object) -> bool:
    """Whether the forward of `module` is replaced now."""
    return getattr(module, MARK, None) is not None


def stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class computes, unchanged."""
    return type(module).forward(module, *args, **kwargs)


def swap(module: nn.Module, function: Callable[..., Any], reports: Reports) -> bool:
    """Replace the forward of `module`, also where a wrapper of it holds the stock one.

    Returns False, and changes nothing, where the forward is wrapped by something that does not show
    what it wraps.
    """
    places = list(_places_of(module, lambda held: held is type(module).forward))
    if not places and "forward" in vars(module):
        return False
    for holder, name in places or [(module, "forward")]:
        setattr(holder, name, MethodType(function, module))
    setattr(module, MARK, reports)
    return True


def restore(module: nn.Module) -> None:
    """Give `module` the forward of its class back, also where a wrapper holds the replacement."""
    for holder, name in list(_places_of(module, _is_replacement)):
        if holder is module and name == "forward":
            del module.forward
        else:
            setattr(holder, name, MethodType(type(module).forward, module))
    vars(module).pop(MARK, None)


def wrapper_of(module: nn.Module) -> str | None:
    """The package whose function wraps the forward of `module` and keeps it in a closure."""
    held = _function_of(vars(module).get("forward"))
    if held is None or any(name in vars(module) for name in WEIGHT_HOOKS):
        return None
    return None if _is_replacement(held) else held.__module__.partition(".")[0]


def _is_replacement(function: FunctionType) -> bool:
    return function.__module__.startswith(__package__)


def _places_of(
    module: nn.Module, wanted: Callable[[FunctionType], bool]
) -> Iterator[tuple[Any, str]]:
    """(holder, attribute) of every place that holds a wanted function bound to `module`: the
    module, the hooks of diffusers, and the closures of functions that wrap its forward."""
    registry = vars(module).get("_diffusers_hook")
    holders: list[Any] = [module]
    if registry:
        holders += registry._fn_refs
    places: list[tuple[Any, str]] = []
    for holder in holders:
        places += [(holder, name) for name in HELD if name in vars(holder)]
    seen: set[int] = set()
    for holder, name in places:
        held = getattr(holder, name)
        if getattr(held, "__self__", None) is module:
            if wanted(held.__func__):
                yield holder, name
            continue
        for cell in _cells(_function_of(held)):
            if id(cell) not in seen:
                seen.add(id(cell))
                places.append((cell, "cell_contents"))  # the loop goes on with it


def _function_of(held: object) -> FunctionType | None:
    """The plain function behind a partial or a bound method."""
    while isinstance(held, functools.partial):
        held = held.func
    held = getattr(held, "__func__", held)
    return held if isinstance(held, FunctionType) else None


def _cells(function: FunctionType | None) -> Iterator[CellType]:
    """The variables of a closure that hold something callable."""
    if function is None or function.__closure__ is None:
        return
    for cell in function.__closure__:
        try:
            if callable(cell.cell_contents):
                yield cell
        except ValueError:  # not assigned yet
            continue


def untouched(module: nn.Module) -> bool:
    """Whether nobody but offloading and casting looks into the calls of `module`, or replaced its
    forward. Only such a module may be called with other arguments, or be computed without it."""
    if any(getattr(module, hooks) for hooks in HOOKS):
        return False
    state = vars(module)
    if "forward" not in state or any(name in state for name in WEIGHT_HOOKS):
        return True
    function = _function_of(state["forward"])
    return function is not None and _is_replacement(function)


def changed(modules: Iterable[tuple[nn.Module, type | None]]) -> str | None:
    """Why a pass cannot use these modules as this package does, or None.

    modules: each with the class that it must have exactly, or with None where it must be one whose
    forward is replaced.
    """
    for module, wanted in modules:
        name = type(module).__name__
        fits = accelerated(module) if wanted is None else type(module) is wanted
        if not fits:
            expected = "the module that diffusers builds" if wanted is None else wanted.__name__
            return f"a {name} stands in place of {expected}"
        if not (torch.compiler.is_compiling() or untouched(module)):
            return f"a hook or another forward is on a {name}"
    return None


def recorded(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether autograd would record what `module` makes of `inputs`."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*inputs, *module.parameters()))


def has_tangents(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether forward-mode differentiation goes through `module`: the operators have no such
    derivative."""
    if torch.compiler.is_compiling():
        return False
    tensors = (*inputs, *module.parameters())
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refusal(module: nn.Module, *inputs: Tensor) -> str | None:
    """Why the operators must not compute `module` this time, or None."""
    if inputs[0].dtype not in DTYPES:
        return f"activations are {inputs[0].dtype}; use float32, bfloat16 or float16"
    if has_tangents(module, *inputs):
        return "forward-mode derivatives are computed"
    if recorded(module, *inputs):
        return "gradients are recorded; run it under torch.no_grad() for speed"
    return None


def falls_back(module: nn.Module, reason: str | None) -> bool:
    """Whether there is a reason to run the stock forward, which is reported."""
    if reason is not None:
        report(module, f"runs as diffusers wrote it: {reason}")
    return reason is not None


def report(module: nn.Module, message: str) -> None:
    """Log a message once per accelerated model, and keep it in the reports of the model."""
    reports: Reports = getattr(module, MARK)
    if not torch.compiler.is_compiling() and message not in reports:
        reports.add(message)
        _log.warning("%s %s", type(module).__name__, message)
