# SPDX-License-Identifier: Apache-2.0
"""`kandinsky comfyui PATH`: the folder under `custom_nodes` through which ComfyUI finds the nodes,
and the example workflows in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .workflows import FOLDER

# ComfyUI shows the workflows in a folder of this name among its templates
NAME, WORKFLOWS = "kandinsky5", "example_workflows"
STUB = '''# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5 for ComfyUI, written by `kandinsky comfyui`; do not edit: the next call replaces it."""
try:
    from kandinsky_model.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, comfy_entrypoint  # noqa: F401
except ImportError as error:
    raise ImportError(f"the nodes of Kandinsky 5 require the package kandinsky-kernels in the Python that runs ComfyUI, but it cannot be "
                      f"imported there ({error}); pip install it there") from None
'''


def install(root: str | Path) -> Path:
    """Write the nodes' folder into the ComfyUI at `root`, whole or not at all, in place of an
    earlier one, and return it.

    Raises FileNotFoundError where there is no such ComfyUI, FileExistsError where its folder of
    this name is not ours.
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
    if target.exists() and not _is_ours(target):
        raise FileExistsError(
            f"{target} must be written by this command or be absent, but holds "
            "something else; move it away"
        )
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=nodes) as draft:
        new, old = Path(draft, "new"), Path(draft, "old")
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


def _is_ours(folder: Path) -> bool:
    stub = folder / "__init__.py"
    return stub.is_file() and "written by `kandinsky comfyui`" in stub.read_text(
        encoding="utf-8", errors="replace"
    )
