# SPDX-License-Identifier: Apache-2.0
"""The chat templates around a prompt, per kind of picture or video, verified by their hash."""

from __future__ import annotations

import ast
import hashlib
import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_log = logging.getLogger(__name__)


KINDS = ("video", "image", "image_edit")


# A text -> the file of diffusers that holds it, and its SHA-256.
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


@cache
def official_template(kind: str = "video") -> str:
    """The instruction around every prompt of a kind; RuntimeError where the installed diffusers
    does not hold the official text."""
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
    text = _official("negative")
    if text is None:
        _log.warning(
            "the installed diffusers no longer holds the usual negative prompt, so an "
            "empty one is used; pass one to be sure"
        )
    return text or ""


def _official(name: str) -> str | None:
    """The text whose SHA-256 is known, from the source of diffusers, which need not be imported for
    it."""
    found = find_spec("diffusers")
    file, digest = TEXTS[name]
    path = (
        Path(found.origin).parent / "pipelines" / "kandinsky5" / file
        if found and found.origin
        else None
    )
    if path is None or not path.is_file():
        return None
    candidates = (spelling for text in _strings(path) for spelling in _spellings(text))
    return next(
        (text for text in candidates if hashlib.sha256(text.encode()).hexdigest() == digest), None
    )


def _strings(path: Path) -> Iterator[str]:
    """All literal strings of a source file, and the lines that lists of them hold."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.List):
            yield "\n".join(str(item.value) for item in node.elts if isinstance(item, ast.Constant))


def _spellings(text: str) -> Iterator[str]:
    """A text as it stands and as the checkpoints were trained with it."""
    # diffusers lacks two line ends in that of an edit, which holds the picture's place; the picture
    # comes after the prompt
    edit = (
        text.partition("{}")[0].replace(
            "<|im_end|><|im_start|>user", "<|im_end|>\n<|im_start|>user\n"
        )
        + "{}"
    )
    for candidate in (text, edit):
        yield candidate
        # corrected by diffusers >= 0.41
        yield candidate.replace("a prompt engineer", "a promt engineer")
