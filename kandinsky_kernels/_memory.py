# SPDX-License-Identifier: Apache-2.0
"""One sentence where memory is short, in place of what PyTorch's allocators say."""

import functools
import re
from collections.abc import Callable

import torch

_SIZE = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)
# of sizes that 64 bits cannot hold, and of working memory in C++, whose size nobody tells
_NO_SIZE = re.compile(r"calculation overflowed|integer multiplication overflow|std::bad_alloc")


def _missing(error: Exception) -> str | None:
    """How much memory was asked for in vain; None where the error says something else."""
    size = _SIZE.search(str(error))
    if size:
        return f"{size[1]} of memory"
    has_no_size = isinstance(error, MemoryError) or _NO_SIZE.search(str(error))
    return "more memory" if has_no_size else None


def explained(name: str) -> Callable[[Callable], Callable]:
    """A decorator: where PyTorch finds no memory for what ``name`` says, the function raises
    torch.OutOfMemoryError with the sentence that the C++ kernels have.

    Nothing is caught while a graph is traced.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **options):
            if torch.compiler.is_compiling():
                return function(*args, **options)
            try:
                return function(*args, **options)
            except (RuntimeError, MemoryError) as error:
                missing = _missing(error)
                if missing is None:
                    raise
            # outside the handler, whose exception would keep the tensors of the attempt alive
            raise torch.OutOfMemoryError(
                f"{name} needs {missing}, which this machine does not give; compute fewer samples, "
                "tokens or heads at once."
            )

        return run

    return decorate
