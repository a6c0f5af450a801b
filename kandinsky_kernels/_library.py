# SPDX-License-Identifier: Apache-2.0
"""Declares operators, attaches kernels and loads the compiled extension. The only user of
``torch.library``.

An operator is declared once, with its reference as ``CompositeExplicitAutograd``: that makes the
reference the fallback on every device and the fake kernel of ``torch.compile`` at once. Kernels
register themselves under ``CPU`` (the compiled ``_C`` module) or ``CUDA`` (Triton launchers, by
`attach`, which also knows the CUDA C++ kernels) and PyTorch's dispatcher does the choosing.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

from . import _guard, checks, tuning
from ._derivatives import derives, has_tangents
from ._precision import full_precision

NAMESPACE = "kandinsky_kernels"
REFERENCE_ONLY = os.environ.get("KANDINSKY_KERNELS", "") == "reference"

_log = logging.getLogger(__name__)
_library = torch.library.Library(NAMESPACE, "DEF")
_references: dict[str, Callable] = {}
_gradients: dict[str, type[torch.autograd.Function]] = {}
extension = None  # the compiled module, or None
extension_absence = ""  # why it is None


def declare(schema: str, reference: Callable, fake: Callable | None = None) -> Callable:
    """Define ``schema`` in our namespace with ``reference`` as its meaning and return the callable
    overload.

    ``fake`` gives the shapes of the results where the reference cannot, because it reads values of
    its inputs.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        check = getattr(checks, name)

        def checked_fake(*args):
            check(*args)
            return fake(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_library)
    _references[name] = reference
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, _derivable(name, operator, reference), "Autograd", with_keyset=True)
    return operator


def _derivable(name: str, operator: torch._ops.OpOverload, reference: Callable) -> Callable:
    """What the operator is to PyTorch's derivatives of any kind and order.

    Gradients are those of `differentiate`, where it was called. Everything else is derived from the
    reference, which PyTorch then runs and differentiates by itself: gradients of operators without
    one of their own (so that the gradient of a gradient is right) and forward-mode derivatives.
    """

    def run(keyset, *args):
        if has_tangents(args):
            return reference(*args)
        below = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            gradient = _gradients.get(name)
            if gradient is None or torch._C._are_functorch_transforms_active():
                return reference(
                    *args
                )  # torch.func derives what is made of PyTorch's own operators
            return gradient.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(below, *args)

    return run


def differentiate(name: str, keep: Callable, backward: Callable) -> None:
    """Register the gradient of the declared op ``name``, whose own operator ``backward`` calls:
    kernels run in both directions.

    keep(ctx, inputs, output) saves what backward(ctx, *gradients of the outputs) reads; one is None
    where its output was not used.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

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
        def backward(ctx, *grads: torch.Tensor | None) -> tuple:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *grads)

    _gradients[name] = Gradient


def triton_absence() -> str | None:
    """Why no Triton kernel can run, or None."""
    if REFERENCE_ONLY:
        return "KANDINSKY_KERNELS=reference asks for references only"
    return (
        None
        if importlib.util.find_spec("triton")
        else ("Triton is not installed; install it with: pip install triton")
    )


def compiled(name: str) -> Callable | None:
    """The CUDA C++ kernel of op ``name``, which the extension registers as an operator of its own,
    or None where it was not built."""
    operator = getattr(getattr(torch.ops, NAMESPACE), f"{name}_cuda", None) if extension else None
    return operator and operator.default


def attach(
    name: str,
    launch: Callable,
    refuse: Callable[..., str | None],
    trial: Callable[..., tuple],
    kind: Callable[..., tuple] = lambda *_: (),
    refuse_compiled: Callable[..., str | None] | None = None,
) -> None:
    """Register a Triton launcher of the declared op ``name`` for CUDA, under guard.

    refuse(*args) says why the kernel cannot take these arguments, or None; trial(*args) makes a
    small case of their kind, on which the launcher must agree with the reference before it is first
    used. Otherwise the reference runs. kind(*args) tells apart the kernels that one launcher
    chooses between: each has its own trial. refuse_compiled is `refuse` for the CUDA C++ kernel,
    which is asked first once `tuning.CUDA_CPP` names the op.
    """
    reference, check = _references[name], getattr(checks, name)

    def run(*args):
        check(*args)
        with full_precision(args[0].device, convolutions=name in tuning.PYTORCH):
            return choose(*args)

    def choose(*args):
        kernel = compiled(name) if refuse_compiled and name in tuning.CUDA_CPP else None
        if (
            kernel
            and refuse_compiled(*args) is None
            and _guard.trusted(f"{name}_cuda", kernel, reference, trial, args)
        ):
            return kernel(*args)
        if refuse(*args) is None and _guard.trusted(
            name, launch, reference, trial, args, kind(*args)
        ):
            return launch(*args)
        return reference(*args)

    if triton_absence() is None:
        _library.impl(name, run, "CUDA")


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's card the current one; nothing for the CPU, where Triton's interpreter
    runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def load_launchers() -> None:
    """Import `launch`, whose modules attach the GPU kernels to the operators declared by then."""
    importlib.import_module(".launch", __package__)


def load_extension() -> None:
    """Import ``_C``, whose static initialisers register the CPU kernels; without it every op runs
    its reference."""
    global extension, extension_absence
    if REFERENCE_ONLY:
        extension_absence = "KANDINSKY_KERNELS=reference asks for references only"
        return
    try:
        extension = importlib.import_module("._C", __package__)
    except ImportError as error:
        extension_absence = (
            f"the compiled extension is not available ({error}); build it with: pip install ."
        )
        _log.info("%s", extension_absence)


def in_double(*tensors: torch.Tensor | None) -> bool:
    """Whether a call is in the oracle's precision, which kernels do not have: PyTorch runs, and
    differentiates, the reference."""
    return any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)


def needs_reference(*tensors: torch.Tensor | None) -> bool:
    """`in_double`, and for operators without a gradient of their own also whether one is
    recorded."""
    return in_double(*tensors) or derives(*tensors)


def kernels() -> dict[str, dict[str, str]]:
    """What would run for each operator and device type, and why: ``{op: {"cpu": ..., "cuda":
    ...}}``."""
    table = {}
    for name in _references:
        qualified = f"{NAMESPACE}::{name}"
        row = {}
        for device in ("CPU", "CUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device):
                row[device.lower()] = (
                    f"cpp ({extension.simd()})" if device == "CPU" else _gpu_state(name)
                )
            elif device == "CPU":
                absence = (
                    extension_absence or "the compiled extension has no kernel for this operator"
                )
                row["cpu"] = f"reference: {absence}"
            else:
                row["cuda"] = (
                    f"reference: {triton_absence() or 'no GPU kernel for this operator yet'}"
                )
        table[name] = row
    return table


def _gpu_state(name: str) -> str:
    if name in tuning.CUDA_CPP and compiled(name) and not _guard.failure(f"{name}_cuda"):
        return "cuda c++"
    if name in tuning.PYTORCH - tuning.TRITON:
        return "reference: PyTorch's own kernel, until a GPU has found the Triton kernel faster"
    failed = _guard.failure(name)
    if failed:
        return f"reference: {failed}"
    return (
        "triton"
        if name in tuning.VERIFIED
        else ("triton (not yet verified on hardware; checks itself on first use)")
    )
