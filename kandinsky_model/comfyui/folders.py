# SPDX-License-Identifier: Apache-2.0
"""Where the ComfyUI that runs the nodes keeps models, and on which device. Every function also
works where no ComfyUI runs. Nothing here needs torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any


def comfy(module: str) -> Any:
    """A module of ComfyUI, or None where it does not run."""
    try:
        return import_module(module)
    except ImportError:
        return None


def device() -> str | None:
    """The device that ComfyUI computes on, or None for this package's own choice."""
    management = comfy("comfy.model_management")
    return None if management is None else str(management.get_torch_device())


def listed(kind: str) -> list[str]:
    """The .safetensors files in a folder of ComfyUI's models, by the names it shows."""
    folders = comfy("folder_paths")
    if folders is None:
        return []
    return [name for name in folders.get_filename_list(kind) if name.endswith(".safetensors")]


def file_of(kind: str, name: str) -> str:
    """Where the file of this name lies in ComfyUI's models; the name itself where it is none of
    them."""
    folders = comfy("folder_paths")
    return (folders and folders.get_full_path(kind, name)) or name


def folder_of(kind: str, name: str) -> str:
    """Where the folder of this name lies, likewise."""
    folders = comfy("folder_paths")
    roots = folders.get_folder_paths(kind) if folders and name else []
    return next((str(Path(root, name)) for root in roots if Path(root, name).is_dir()), name)
