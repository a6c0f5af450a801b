# SPDX-License-Identifier: Apache-2.0
"""Matrix products in the precision of their inputs, even under autocast and where TF32 is allowed.

Autocast can be switched off for a few lines and for one thread alone. The precision of fp32
products is a setting of the whole process: it is changed for those lines and put back, and the
products of other threads are exact meanwhile.

PyTorch has two ways to set that precision: ``torch.set_float32_matmul_precision``, which is older,
and the ``fp32_precision`` attributes of its backends. Since it warns of a mixture, the setting is
changed in the way that the process used.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# The fp32_precision of CUDA and of oneDNN that torch.set_float32_matmul_precision sets.
_PRECISIONS_OF_NAME = {"high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}
_EXACT = ("none", "ieee")  # values of fp32_precision that allow no shortcut


@contextlib.contextmanager
def _exact_attribute(settings: Any) -> Iterator[None]:
    """Set the ``fp32_precision`` of one backend to "ieee", and put it back.

    A value that came from a more general setting is inherited again afterwards.
    """
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "none"
        if settings.fp32_precision != before:
            settings.fp32_precision = before


@contextlib.contextmanager
def _exact_name(before: str) -> Iterator[None]:
    """Set the precision by its older name to "highest", and put it back."""
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _exact_products(kind: str) -> contextlib.AbstractContextManager:
    backends: Any = torch.backends
    cuda = backends.cuda.matmul
    onednn = backends.mkldnn.matmul
    settings = cuda if kind == "cuda" else onednn
    if settings.fp32_precision in _EXACT:
        return contextlib.nullcontext()
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # both ways were used, or the newer one alone
        name = ""
    if _PRECISIONS_OF_NAME.get(name) == (cuda.fp32_precision, onednn.fp32_precision):
        return _exact_name(name)
    return _exact_attribute(settings)


@contextlib.contextmanager
def _exact_cudnn() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True


def _exact_convolutions(kind: str) -> contextlib.AbstractContextManager:
    backends: Any = torch.backends
    settings = backends.cudnn.conv if kind == "cuda" else backends.mkldnn.conv
    if settings.fp32_precision in _EXACT:
        return contextlib.nullcontext()
    if kind == "cuda":
        with contextlib.suppress(RuntimeError):  # both ways were used
            if torch.backends.cudnn.allow_tf32:
                return _exact_cudnn()
    return _exact_attribute(settings)


@contextlib.contextmanager
def _exact(kind: str, convolutions: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exact_products(kind))
        if convolutions:  # besides the products, because some convolutions are matrix products
            stack.enter_context(_exact_convolutions(kind))
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def full_precision(
    device: torch.device, convolutions: bool = False
) -> contextlib.AbstractContextManager:
    """A context in which matrix products on ``device`` keep the precision of their inputs.

    ``convolutions`` asks the same of convolutions.
    """
    kind = device.type
    if kind not in ("cpu", "cuda"):
        if torch.amp.is_autocast_available(kind):
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()
    if torch.compiler.is_compiling():  # a graph can hold this switch; TF32 is the compiler's choice
        return torch.autocast(kind, enabled=False)
    return _exact(kind, convolutions)


def double(x: Tensor) -> Tensor:
    """x in fp64: on the CPU if it lies on an Apple GPU, which has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()
