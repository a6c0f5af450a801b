# SPDX-License-Identifier: Apache-2.0
"""Values that a caller gave, in the type that is wanted, or an error that names the argument.

Numbers of numpy and tensors of one number are taken as the numbers that they are. Text is not read
as a number, and a float is no integer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

LONGEST_SHOWN = 40  # characters of a value in an error


def integer(name: str, value: Any) -> int:
    """Raises TypeError for anything but an integer."""
    if not isinstance(value, bool) and getattr(value, "dtype", None) != torch.bool:
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an int, got {shown(value)}; convert it")


def number(name: str, value: Any) -> float:
    """Raises TypeError for anything but a number, ValueError for NaN and infinity."""
    is_text = isinstance(value, (bool, str, bytes))
    if is_text or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{name} must be a number, got {shown(value)}; convert it")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, got {result}; choose another")
    return result


def text(name: str, value: Any) -> str:
    """Raises TypeError for anything but a str, ValueError for what no file could hold."""
    if not isinstance(value, str):
        what, remedy = name, "pass a str"
        if name == "prompt":
            what, remedy = "a prompt", "pass a str or a list of them"
        raise TypeError(f"{what} must be a str, got {shown(value)}; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold, got {ascii(value):.80}; write it anew"
        ) from None
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Raises TypeError for anything but a list or tuple of str."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of str, got {shown(value)}; pass one")
    return tuple(text(name, one) for one in value)


def shown(value: object) -> str:
    """A value for an error: its type and, where that is short, itself."""
    written = repr(value)
    is_short = len(written) <= LONGEST_SHOWN and written.isprintable()
    return f"{type(value).__name__} {written}" if is_short else type(value).__name__


def one_line(error: Exception) -> str:
    """The message of an error of another library, as a part of a sentence."""
    return " ".join(str(error).split())[:200].rstrip(".")


# By the annotation of a dataclass's field.
CONVERTERS: dict[str, Callable[[str, Any], object]] = {
    "int": integer,
    "float": number,
    "str": text,
    "tuple[str, ...]": texts,
}
