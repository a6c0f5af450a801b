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

from . import _guard, tuning

NAMESPACE = "kandinsky_kernels"
REFERENCE_ONLY = os.environ.get("KANDINSKY_KERNELS", "") == "reference"

_log = logging.getLogger(__name__)
_library = torch.library.Library(NAMESPACE, "DEF")
_references: dict[str, Callable] = {}
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
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _references[name] = reference
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiate(name: str, keep: Callable, backward: Callable) -> None:
    """Register the gradient of the declared op ``name``, whose own operator ``backward`` calls:
    kernels run in both directions.

    keep(ctx, inputs, output) saves what backward(ctx, *gradients of the outputs) reads; one is None
    where its output was not used.
    """

    def setup(ctx, inputs: tuple, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)
        keep(ctx, inputs, output)

    def gradients(ctx, *grads: torch.Tensor | None) -> tuple:
        return (
            backward(ctx, *grads)
            if any(grad is not None for grad in grads)
            else (None,) * ctx.inputs
        )

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", gradients, setup_context=setup, lib=_library
    )


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
    reference = _references[name]

    def run(*args):
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
    return (
        in_double(*tensors)
        or torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


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
