# SPDX-License-Identifier: Apache-2.0
"""What a node does while it works in ComfyUI: it moves the bar, minds the Stop button and shows
previews. Everything here also works where no ComfyUI runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .folders import comfy

INTERVAL = 0.1  # seconds between two looks at the Stop button
PERCENT = 100
MOMENTS = "kandinsky_kernels::group_moments"


def stop_if_asked() -> None:
    """Raise ComfyUI's exception where its Stop button was pressed."""
    management = comfy("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


class OperatorWatch(TorchDispatchMode):
    """Calls `look` before operators of PyTorch, at most every `INTERVAL` seconds.

    look: gets the number of values that norms of the video VAE have read so far. An exception that
    it raises ends the work, wherever that is.
    """

    def __init__(self, look: Callable[[int], None]):
        super().__init__()
        self._look = look
        self._next = 0.0
        self._normed = 0

    def __torch_dispatch__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        if func.name() == MOMENTS:
            self._normed += args[0].numel()
        if time.monotonic() >= self._next:
            self._look(self._normed)
            self._next = time.monotonic() + INTERVAL
        return func(*args, **(kwargs or {}))


@contextmanager
def working() -> Iterator[None]:
    """The surroundings of a node's work.

    ComfyUI's models leave the device, because budgets count its memory as free. Stop works at every
    operator. And tensors are ordinary ones: ComfyUI's inference mode would make weights that no
    later, ordinary code may touch.
    """
    stop_if_asked()
    management = comfy("comfy.model_management")
    if management is not None and management.get_torch_device().type != "cpu":
        management.unload_all_models()
        management.soft_empty_cache()
    with torch.inference_mode(False), torch.no_grad(), OperatorWatch(lambda _: stop_if_asked()):
        yield


class Bar:
    """ComfyUI's bar for the node that runs, moved by calls (done, of, preview)."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(
        self,
        done: int,
        of: int,
        preview: tuple | None = None,
    ) -> None:
        stop_if_asked()
        utils = comfy("comfy.utils")
        if utils is not None:
            self._bar = self._bar or utils.ProgressBar(of)
            self._bar.update_absolute(done, of, preview)


class Previews:
    """Pictures of latents while they are sampled, as ComfyUI's settings ask for them.

    ComfyUI's own previewer knows the colours of the published VAEs. The bundled model's VAE is
    another: its colours come from itself.
    """

    def __init__(self, model) -> None:
        """model: a `Kandinsky5`."""
        self._model = model
        self._module = comfy("latent_preview")
        formats = comfy("comfy.latent_formats")
        self._previewer: Any = None
        if self._module is not None and formats is not None:
            makes_pictures = model.preset.vae is None
            latent_format = formats.Flux() if makes_pictures else formats.HunyuanVideo()
            self._previewer = self._module.get_previewer(torch.device(model.device), latent_format)

    def __call__(self, latents: Tensor) -> tuple | None:
        """(format, PIL image, largest side) of scaled latents [B, T, h, w, C], or None."""
        if self._previewer is None:
            return None
        first = latents[:1].float().permute(0, 4, 1, 2, 3)  # [1, C, T, h, w]
        if self._model.preset.repo or self._model.vae is None:
            return self._previewer.decode_latent_to_preview_image("JPEG", first)
        from PIL import Image

        frame = self._model.vae.preview(first[:, :, :1] / self._model.vae.config.scaling_factor)
        levels = (frame[0, :, 0].clamp(-1, 1) + 1) * 127.5  # [3, H, W]
        pixels = levels.round().to("cpu", torch.uint8).permute(1, 2, 0)
        picture = Image.fromarray(pixels.numpy())
        return "JPEG", picture, self._module.MAX_PREVIEW_RESOLUTION
