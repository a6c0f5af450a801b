# SPDX-License-Identifier: Apache-2.0
"""Products of matrices in the precision of their inputs, whatever autocast and TF32 say.

What PyTorch offers against its own switches: autocast can be turned off for some lines, in this
thread alone. The precision of fp32 products is a setting of the process, which is changed for those
lines and put back; another thread's products are exact meanwhile.
"""

import contextlib
from collections.abc import Iterator

import torch

# What torch.set_float32_matmul_precision sets for CUDA and oneDNN.
_PAIRS = {"high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}
_EXACT = ("none", "ieee")  # values of fp32_precision


@contextlib.contextmanager
def _exact_setting(settings) -> Iterator[None]:
    """One of PyTorch's ``fp32_precision`` settings at "ieee". One that is inherited is again
    afterwards."""
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "none"
        if settings.fp32_precision != before:
            settings.fp32_precision = before


@contextlib.contextmanager
def _exact_name(name: str) -> Iterator[None]:
    """The older way to say it, for those who said it that way: PyTorch dislikes a mixture."""
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(name)


def _exact_products(kind: str) -> contextlib.AbstractContextManager:
    cuda, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    settings = cuda if kind == "cuda" else onednn
    if settings.fp32_precision in _EXACT:
        return contextlib.nullcontext()
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two ways are mixed, or only the newer one was used
        name = ""
    if _PAIRS.get(name) == (cuda.fp32_precision, onednn.fp32_precision):
        return _exact_name(name)
    return _exact_setting(settings)


@contextlib.contextmanager
def _exact_cudnn() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True


def _exact_convolutions(kind: str) -> contextlib.AbstractContextManager:
    settings = torch.backends.cudnn.conv if kind == "cuda" else torch.backends.mkldnn.conv
    if settings.fp32_precision in _EXACT:
        return contextlib.nullcontext()
    if kind == "cuda":
        with contextlib.suppress(RuntimeError):  # the two ways to say it are mixed
            if torch.backends.cudnn.allow_tf32:
                return _exact_cudnn()
    return _exact_setting(settings)


@contextlib.contextmanager
def _exact(kind: str, convolutions: bool) -> Iterator[None]:
    with contextlib.ExitStack() as settings:
        settings.enter_context(_exact_products(kind))
        if convolutions:  # some of which are products of matrices
            settings.enter_context(_exact_convolutions(kind))
        if not torch.is_autocast_enabled(kind):
            yield
            return
        with torch.autocast(kind, enabled=False):
            yield


def full_precision(
    device: torch.device, convolutions: bool = False
) -> contextlib.AbstractContextManager:
    """A context in which products (and convolutions) on `device` are what their dtypes say."""
    kind = device.type
    if kind not in ("cpu", "cuda"):
        if torch.amp.is_autocast_available(kind):
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()
    if torch.compiler.is_compiling():  # which can trace this much; TF32 is then its own choice
        return torch.autocast(kind, enabled=False)
    return _exact(kind, convolutions)
