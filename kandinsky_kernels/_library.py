# SPDX-License-Identifier: Apache-2.0
"""Declares operators, attaches kernels and loads the compiled library.

This module is the only user of ``torch.library``. An operator is declared once, with its reference
as ``CompositeExplicitAutograd``: that makes the reference the fallback on every device and the fake
kernel of ``torch.compile`` at once. Kernels register themselves under ``CPU`` (those of the
compiled library) or ``CUDA`` (the launchers that `attach` is given), and PyTorch's dispatcher
chooses among them.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from . import _guard, cards, checks, tuning
from ._derivatives import has_tangents
from ._memory import explained
from ._ops import add_op_namespace_prefix, ops
from ._precision import full_precision

REFERENCE_ONLY = os.environ.get("KANDINSKY_KERNELS", "") == "reference"
_SWITCHED_OFF = "KANDINSKY_KERNELS=reference asks for references only"

_log = logging.getLogger(__name__)
# signatures of calls; training has a new bound of its logits in every step
_MOST_DECISIONS = 4096

_library = torch.library.Library(ops.name, "DEF")
_references: dict[str, Callable] = {}
_gradients: dict[str, type[torch.autograd.Function]] = {}
_constants: dict[str, slice] = {}  # the arguments without a gradient in `_gradients`
_ERRORS = {error.__name__: error for error in (ValueError, TypeError, torch.OutOfMemoryError)}
extension: SimpleNamespace | None = None  # simd(), set_simd(name) of the compiled library
extension_absence = ""  # why there is none


def declare(schema: str, reference: Callable, fake: Callable | None = None) -> Callable:
    """Define the operator of ``schema``, whose meaning is ``reference``; return a way to call it.

    Calls with fp64 tensors run the reference, because fp64 is the oracle's precision and kernels do
    not have it. ``fake`` makes results of the right shapes where the reference cannot run on fake
    tensors, because it reads the values of its inputs.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        check = getattr(checks, name)

        def checked_fake(*args):
            check(*args)
            return fake(*args)

        torch.library.register_fake(add_op_namespace_prefix(name), checked_fake, lib=_library)
    _references[name] = reference
    operator = getattr(ops, name).default
    _library.impl(name, _derivable(name, operator, reference), "Autograd", with_keyset=True)

    def call(*args):
        return reference(*args) if in_double(*args) else _run(operator, *args)

    return call


def in_double(*args) -> bool:
    """Whether any tensor among the arguments is fp64."""
    return any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in args)


def _run(operator: Callable, *args):
    """The operator's result.

    The compiled library knows no Python: a sentence of its refusals begins with the name of the
    error that Python has for it.
    """
    try:
        return operator(*args)
    except (RuntimeError, ValueError) as error:
        kind, _, sentence = str(error).partition(": ")
        if kind not in _ERRORS:
            raise
    raise _ERRORS[kind](sentence)  # outside the handler, whose error would keep tensors alive


def _derivable(name: str, operator: torch._ops.OpOverload, reference: Callable) -> Callable:
    """The kernel of an operator for the dispatch key ``Autograd``.

    First gradients are those that `differentiate` registered. PyTorch runs and differentiates the
    reference for everything else: the gradients of operators that have none of their own (backward
    operators among them, so that the gradient of a gradient is right), gradients of constants,
    forward-mode derivatives, and the transforms of torch.func, which need PyTorch's own operators.
    """

    def run(keyset, *args):
        if has_tangents(args):
            return reference(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            gradient = _gradients.get(name)
            if gradient is None or torch._C._are_functorch_transforms_active():
                return reference(*args)
            if torch._C._any_requires_grad(*args[_constants[name]]):
                return reference(*args)
            return gradient.apply(*args)
        below = keyset & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            return _run(functools.partial(operator.redispatch, below), *args)

    return run


def differentiate(
    name: str, keep: Callable, backward: Callable, constants: slice = slice(0)
) -> None:
    """Register the gradient of the declared operator ``name``.

    constants: the arguments that ``backward`` has no gradients for, though they have some.

    keep(ctx, inputs, output) saves what backward(ctx, *gradients) reads. The gradients are those of
    the outputs, None where an output was not used. ``backward`` calls an operator in its turn, so
    that kernels run in both directions.
    """
    operator = getattr(ops, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        @staticmethod
        def setup_context(ctx, inputs: tuple, output) -> None:
            ctx.set_materialize_grads(False)
            keep(ctx, inputs, output)

        @staticmethod
        @explained(f"the gradient of {name}")
        def backward(ctx, *grads: torch.Tensor | None) -> tuple:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *grads)

    _gradients[name] = Gradient
    _constants[name] = constants


def triton_absence() -> str | None:
    """Why no Triton kernel can run, or None."""
    if REFERENCE_ONLY:
        return _SWITCHED_OFF
    if importlib.util.find_spec("triton"):
        return None
    return "Triton is not installed; install it with: pip install triton"


def compiled(name: str) -> Callable | None:
    """The CUDA C++ kernel of operator ``name``, or None where it was not built.

    The extension registers it as an operator of its own.
    """
    if extension is None:
        return None
    packet = getattr(ops, f"{name}_cuda", None)
    return packet and packet.default


@dataclass(frozen=True)
class Launcher:
    """How an op is launched on a GPU: see `attach`."""

    launch: Callable
    trial: Callable[..., tuple]
    constants: Callable[..., dict]


launchers: dict[str, Launcher] = {}


def attach(
    name: str,
    launch: Callable,
    refuse: Callable[..., str | None],
    trial: Callable[..., tuple],
    constants: Callable[..., dict] = lambda *_: {},
    refuse_compiled: Callable[..., str | None] | None = None,
    fallback: Callable | None = None,
) -> None:
    """Register a Triton launcher of the declared operator ``name`` for CUDA, under guard.

    refuse(*args) says why the kernel cannot take these arguments, or None. constants(*args) are the
    keyword arguments by which the launcher makes the caller's binary whatever the size of the
    inputs; trial(*args) makes small inputs of the caller's kind, on which that binary must agree
    with the reference before it is first used. Otherwise ``fallback`` runs, by default the
    reference. refuse_compiled is `refuse` for the CUDA C++ kernel, which comes first once
    `tuning.CUDA_CPP` names the op. On an Apple GPU, which has neither kernel, ``fallback`` runs.

    What runs is decided once for each signature of a call; later calls look it up.
    """
    reference, check = _references[name], getattr(checks, name)
    launchers[name] = Launcher(launch, trial, constants)
    decisions: dict[tuple, Callable] = {}

    @explained(name)
    def run(*args):
        check(*args)
        with full_precision(args[0].device, convolutions=name in tuning.PYTORCH):
            return choose(*args)

    def choose(*args):
        key = _guard.signature(args)
        chosen = decisions.get(key)
        if chosen is None:
            chosen = decide(*args)
            if len(decisions) >= _MOST_DECISIONS:
                decisions.clear()
            if not torch.cuda.is_current_stream_capturing():  # nothing can be tried meanwhile
                decisions[key] = chosen
        return chosen(*args)

    def decide(*args) -> Callable:
        if cards.refuse_card(args[0].device):
            return fallback or reference
        kernel = compiled(name) if name in tuning.CUDA_CPP else None
        if (
            kernel
            and refuse_compiled
            and refuse_compiled(*args) is None
            and _guard.trusted(f"{name}_cuda", kernel, reference, trial, args)
        ):
            return kernel
        if refuse(*args) is None:
            chosen = constants(*args)
            if _guard.trusted(name, launch, reference, trial, args, chosen):
                return functools.partial(launch, **chosen)
        return fallback or reference

    if triton_absence() is None:
        _library.impl(name, run, "CUDA")
    _attach_to_apple(name, check, fallback)


def _attach_to_apple(name: str, check: Callable, fallback: Callable | None) -> None:
    def run(*args):
        check(*args)
        with full_precision(args[0].device):
            return fallback(*args)

    if fallback and not REFERENCE_ONLY:
        _library.impl(name, run, "MPS")


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's GPU is the current one; nothing changes for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def load_launchers() -> None:
    """Import `launch`, whose modules attach the GPU kernels to the operators declared by then."""
    importlib.import_module(".launch", __package__)


def load_extension() -> None:
    """Load the compiled library, whose static initialisers register the CPU kernels.

    Without it every operator runs its reference.
    """
    global extension, extension_absence
    if REFERENCE_ONLY:
        extension_absence = _SWITCHED_OFF
        return
    path = Path(__file__).with_name("libkandinsky_kernels.so")
    try:
        if not hasattr(ops, "build_info"):  # in a package of the hub it is loaded already
            torch.ops.load_library(str(path))
        extension = SimpleNamespace(simd=ops.simd, set_simd=functools.partial(_run, ops.set_simd))
    except OSError as error:
        reason = (error.__cause__ or error) if path.exists() else f"there is no {path.name}"
        extension_absence = (
            f"the compiled library is not available ({reason}); build it with: pip install "
            "--no-build-isolation ."
        )
        _log.info("%s", extension_absence)


def build_info() -> dict[str, str]:
    """What the compiled library was built with: compiler, torch, stable_abi (the oldest torch it
    runs on), simd (instruction sets, separated by spaces) and cuda ("with" or "without").

    Raises RuntimeError where the library is not available.
    """
    if extension is None:
        raise RuntimeError(extension_absence)
    return dict(line.split(": ", 1) for line in ops.build_info().splitlines())


def kernels() -> dict[str, dict[str, str]]:
    """What would run on this machine: ``{operator: {"cpu": ..., "cuda": ...}}``.

    Each value names a kernel, or says "reference" and why there is no kernel.
    """
    return {name: {"cpu": _cpu_state(name), "cuda": _gpu_state(name)} for name in _references}


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(name), key)


def _cpu_state(name: str) -> str:
    if extension is not None and _has_kernel(name, "CPU"):
        return f"cpp ({extension.simd()})"
    absence = extension_absence or "the compiled library has no kernel for this operator"
    return f"reference: {absence}"


def _gpu_state(name: str) -> str:
    if not _has_kernel(name, "CUDA"):
        return f"reference: {triton_absence() or 'no GPU kernel for this operator yet'}"
    if name in tuning.CUDA_CPP and compiled(name) and not _guard.failure(f"{name}_cuda"):
        return "cuda c++"
    if name in tuning.PYTORCH - tuning.TRITON:
        return "reference: PyTorch's own kernel, until a GPU has found the Triton kernel faster"
    card = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    failed = cards.refuse_card(card) or _guard.failure(name)
    if failed:
        return f"reference: {failed}"
    if name in tuning.VERIFIED:
        return "triton"
    return "triton (not yet verified on hardware; checks itself on first use)"
