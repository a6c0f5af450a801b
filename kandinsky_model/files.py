# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place and moved there as the last step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the body succeeds and disappears when
    it does not."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON, got {error}; download it again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(values).__name__}; download it again"
        )
    return values
