# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5.0: the leanest model that consumes `kandinsky_kernels` end to end.

from kandinsky_model import Kandinsky5VideoLite video =
Kandinsky5VideoLite.from_pretrained("tiny").generate("a red circle moving right on a blue
background") video.save("out.mp4")
"""

_HOMES = {
    "Kandinsky5": "pipeline",
    "Kandinsky5VideoLite": "pipeline",
    "Kandinsky5VideoPro": "pipeline",
    "Kandinsky5ImageLite": "pipeline",
    "Video": "sampling.result",
    "accelerate": "acceleration",
    "load": "pipeline",
    "PRESETS": "config",
    "get_preset": "config",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import what is asked for when it is asked for: the command line's help should not wait for
    torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
