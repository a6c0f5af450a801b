# SPDX-License-Identifier: Apache-2.0
"""Options of `generate` from a file: one that somebody wrote, or one that `generate` has made."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..files import check_regular, read_limited

FLAGS = {"expand": "--expand", "offload": "--offload"}
OPTIONS = (
    "model",
    "revision",
    "preset",
    "seconds",
    "frames",
    "size",
    "steps",
    "guidance",
    "scheduler_scale",
    "seed",
    "seeds",
    "prompts",
    "negative",
    "precision",
    "image",
    "last_image",
    "quantize",
    "text_encoder",
    "clip",
    "text_quantize",
    "attention",
    "cache",
    "strip",
    "output",
    "device",
    "memory",
    "vae",
    "vae_policy",
)
KEYS = sorted({"prompt", "lora", "text_cache", *FLAGS, *OPTIONS})
# The names of options that the settings of a video have under another one.
RENAMED = {
    "negative_prompt": "negative",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "quantization": "quantize",
}
WRITTEN = (".yaml", ".yml", ".json")


def command_line(path: str, without: Collection[str] = ()) -> tuple[list[str], str | None]:
    """The options that a file stands for, as words of a command line, and the prompt in it.

    without: options to leave out. Raises ValueError for a key that is no option, OSError for a file
    that cannot be read.
    """
    file = Path(path)
    values = _written(file) if file.suffix.lower() in WRITTEN else _made(file)
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in KEYS:
            raise ValueError(
                f"a configuration has the keys {', '.join(KEYS)}, got {key!r} in {path}; "
                "rename or remove it"
            )
    for key in without:
        values.pop(key, None)
    prompt = values.pop("prompt", None)
    words = []
    for key, value in values.items():
        words += _words(key, value)
    return words, None if prompt is None else str(prompt)


def _words(key: str, value: Any) -> list[str]:
    """One option, with its value in the same word because that may begin with a dash."""
    if value is None:
        return []
    if key in FLAGS:
        return [FLAGS[key]] if value else []
    if key == "text_cache":
        return [] if value else ["--no-text-cache"]
    if key == "lora":
        return [f"--lora={one}" for one in ([value] if isinstance(value, str) else value)]
    if key == "seeds" and isinstance(value, list):
        value = ",".join(map(str, value)) + ","
    elif key == "size" and isinstance(value, list):
        value = "x".join(map(str, value))
    return [f"--{key.replace('_', '-')}={value}"]


def _written(path: Path) -> dict[str, Any]:
    """The object in a YAML or JSON file."""
    import yaml

    data = read_limited(path)
    try:
        text = data.decode("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        values = json.loads(text) if is_json else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be valid YAML or JSON, got {reason}; correct it") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold options by name, got {type(values).__name__}; write for example "
            "steps: 25"
        )
    return values


def _made(path: Path) -> dict[str, Any]:
    """The settings that `generate` has put into a video, a picture or a file of latents, as
    options."""
    from ..media.comment import read_comment
    from ..sampling.result import load_latents

    check_regular(path)
    if path.suffix.lower() == ".safetensors":
        text = load_latents(path)[1].to_json()
    else:
        text = read_comment(path)
    try:
        settings = json.loads(text)
        width, height = settings.pop("width"), settings.pop("height")
        is_expanded = bool(settings.pop("expanded_prompt", ""))
        settings.pop("fps", None)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{path} must hold the settings that generate puts into its files, but has none; "
            "choose another file, or write a .yaml file"
        ) from None
    kept = {RENAMED.get(key, key): value for key, value in settings.items() if value != ""}
    return {**kept, "size": f"{width}x{height}", "expand": is_expanded}
