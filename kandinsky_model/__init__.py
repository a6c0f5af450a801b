# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5.0: the leanest model that consumes `kandinsky_kernels` end to end.

    from kandinsky_model import Kandinsky5VideoLite

    model = Kandinsky5VideoLite.from_pretrained("tiny")
    video = model.generate("a red circle moving right on a blue background")
    video.save("out.mp4")

The names below are the public ones. Each is imported when it is first used, because `--help` and
ComfyUI's start should not wait for torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .config import PRESETS as PRESETS
    from .config import get_preset as get_preset
    from .pipeline import Kandinsky5 as Kandinsky5
    from .pipeline import Kandinsky5ImageLite as Kandinsky5ImageLite
    from .pipeline import Kandinsky5VideoLite as Kandinsky5VideoLite
    from .pipeline import Kandinsky5VideoPro as Kandinsky5VideoPro
    from .pipeline import load as load
    from .sampling.result import Video as Video

__version__ = "0.1.0"
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
__all__ = [  # noqa: F822 - __getattr__ finds them
    "PRESETS",
    "Kandinsky5",
    "Kandinsky5ImageLite",
    "Kandinsky5VideoLite",
    "Kandinsky5VideoPro",
    "Video",
    "accelerate",
    "get_preset",
    "load",
]


def __getattr__(name: str):
    """The public name, imported from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
