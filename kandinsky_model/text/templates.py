# SPDX-License-Identifier: Apache-2.0
"""The official templates around a prompt, and the usual negative prompt.

A template is a chat instruction with `{}` for the prompt. The texts are read from the source of the
installed diffusers and recognised by their SHA-256.
"""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

KINDS = ("video", "image", "image_edit")

# Each text, the file of diffusers that holds it, and its SHA-256.
TEXTS = {
    "video": (
        "pipeline_kandinsky.py",
        "09efacd0c7584e236b605dfa1d8b76e87051f5d4ca99f79243e46cbec993c3bc",
    ),
    "image": (
        "pipeline_kandinsky_t2i.py",
        "04de998d6e835997641241c6d0ec3dc0fab9e8c70f87dccf98333822ccdff04f",
    ),
    "image_edit": (
        "pipeline_kandinsky_i2i.py",
        "8cd783f4ed62c3dd395209b429809f5fe5ef9fb9ef684bc4d17d611503757db9",
    ),
    "negative": (
        "pipeline_kandinsky.py",
        "0c7acab80fec7c0fc9195770616e90570e9a33cb4a1826f11a65215582119e82",
    ),
}

_log = logging.getLogger(__name__)


@cache
def official_template(kind: str = "video") -> str:
    """The template of a kind of prompt. Raises RuntimeError where the installed diffusers does not
    hold the official text."""
    if kind not in KINDS:
        raise ValueError(
            f"an instruction is for {' or '.join(KINDS)}, got {kind!r}; choose one of them"
        )
    text = _official(kind)
    if text is None:
        raise RuntimeError(
            "the instruction around every prompt is read from diffusers >= 0.37, "
            "but no diffusers here holds the official "
            "text; pip install diffusers==0.42.1, or pass template"
        )
    return text


@cache
def official_negative() -> str:
    """The usual negative prompt of videos; empty, with a warning, where diffusers does not hold
    it."""
    text = _official("negative")
    if text is None:
        _log.warning(
            "the installed diffusers no longer holds the usual negative prompt, so an "
            "empty one is used; pass one to be sure"
        )
    return text or ""


def _official(name: str) -> str | None:
    """The text called `name` in `TEXTS`, or None. diffusers is read, not imported."""
    found = find_spec("diffusers")
    if found is None or not found.origin:
        return None
    file, digest = TEXTS[name]
    path = Path(found.origin).parent / "pipelines" / "kandinsky5" / file
    if not path.is_file():
        return None
    for text in _strings(path):
        for candidate in _spellings(text):
            if hashlib.sha256(candidate.encode()).hexdigest() == digest:
                return candidate
    return None


def _strings(path: Path) -> Iterator[str]:
    """All literal strings of a source file, and the lists of strings joined to lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.List):
            yield "\n".join(str(item.value) for item in node.elts if isinstance(item, ast.Constant))


def _spellings(text: str) -> Iterator[str]:
    """A text as diffusers has it, and as the checkpoints may have been trained with it."""
    # diffusers lacks two line ends in the template of an edit, and holds the picture's place behind
    # the prompt.
    edit = text.partition("{}")[0]
    edit = edit.replace("<|im_end|><|im_start|>user", "<|im_end|>\n<|im_start|>user\n") + "{}"
    for candidate in (text, edit):
        yield candidate
        # A misspelling of the official text that diffusers >= 0.41 has corrected.
        yield candidate.replace("a prompt engineer", "a promt engineer")
