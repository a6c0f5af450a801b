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


SUFFIXES = (".safetensors", ".gguf")


def listed(kind: str, part: str) -> list[str]:
    """The files in a folder of ComfyUI's models that hold a part of a Kandinsky model, by the names
    it shows. part: one of `checkpoints.contents.PARTS`. Only headers of files are read, and each
    once."""
    folders = comfy("folder_paths")
    if folders is None:
        return []
    from ..checkpoints.contents import holds

    names = [name for name in folders.get_filename_list(kind) if name.lower().endswith(SUFFIXES)]
    return [name for name in names if holds(Path(file_of(kind, name)), part)]


def file_of(kind: str, name: str) -> str:
    """Where the file of this name lies in ComfyUI's models; the name itself where it is none of
    them."""
    folders = comfy("folder_paths")
    return (folders and folders.get_full_path(kind, name)) or name


def tokenizers() -> dict[str, str]:
    """The folders of the tokenizers that come with ComfyUI, by their names in
    `checkpoints.locate`; {} where it does not run or keeps them elsewhere."""
    module = comfy("comfy.sd1_clip")
    if module is None or not getattr(module, "__file__", None):
        return {}
    root = Path(module.__file__).parent
    found = {
        "tokenizer": root / "text_encoders" / "qwen25_tokenizer",
        "tokenizer_2": root / "sd1_tokenizer",
    }
    return {name: str(folder) for name, folder in found.items() if folder.is_dir()}
