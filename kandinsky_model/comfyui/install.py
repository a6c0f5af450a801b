# SPDX-License-Identifier: Apache-2.0
"""`kandinsky comfyui PATH`: the folder under `custom_nodes` through which ComfyUI finds the nodes,
and the example workflows in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .workflows import FOLDER

NAME = "kandinsky5"
WORKFLOWS = "example_workflows"  # ComfyUI shows what is in a folder of this name as templates
STUB = '''# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5 for ComfyUI, written by `kandinsky comfyui`; the next call replaces this file."""
try:
    from kandinsky_model.comfyui import (  # noqa: F401
        NODE_CLASS_MAPPINGS,
        NODE_DISPLAY_NAME_MAPPINGS,
        comfy_entrypoint,
    )
except ImportError as error:
    raise ImportError(
        "the nodes of Kandinsky 5 require the package kandinsky-kernels in the Python that runs "
        f"ComfyUI, but it cannot be imported there ({error}); pip install it there"
    ) from None
'''


def install(root: str | Path) -> Path:
    """Write the nodes' folder into the ComfyUI at `root`, whole or not at all, and return it.

    An earlier folder of this command is replaced. Raises FileNotFoundError where there is no such
    ComfyUI, FileExistsError where a folder of this name was not written by this command.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"ComfyUI's folder must exist, but there is no {root}; give the "
            "folder that holds its main.py"
        )
    nodes = root / "custom_nodes"
    if not nodes.is_dir():
        raise FileNotFoundError(
            f"ComfyUI's folder must hold custom_nodes, but {root} does not; "
            "give the folder that holds its main.py"
        )
    target = nodes / NAME
    if target.exists() and not _was_written_here(target):
        raise FileExistsError(
            f"{target} must be written by this command or be absent, but holds "
            "something else; move it away"
        )
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=nodes) as draft:
        new = Path(draft, "new")
        old = Path(draft, "old")
        shutil.copytree(FOLDER, new / WORKFLOWS)
        (new / "__init__.py").write_text(STUB, encoding="utf-8")
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    return target


def _was_written_here(folder: Path) -> bool:
    stub = folder / "__init__.py"
    return stub.is_file() and "written by `kandinsky comfyui`" in stub.read_text(
        encoding="utf-8", errors="replace"
    )
