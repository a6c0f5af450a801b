# SPDX-License-Identifier: Apache-2.0
"""Corrections of diffusers' Kandinsky 5 pipelines where they differ from the official code.

Each function takes a pipeline and its transformer, corrects the pipeline, and returns the calls
that take the correction back. The measured effects are in the docstring of
`acceleration.accelerate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor

from .forward_swap import Foreign

Undo = Callable[[], object]


def exact_time(pipe, transformer: Foreign) -> list[Undo]:
    """Give the transformer the timestep in fp32.

    Pipelines round it to the dtype of the weights: in bf16 it can be off by 2 of 1000.
    """

    def correct(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        time = kwargs.get("timestep")
        step = pipe.scheduler.step_index
        if step is None:  # before the first step
            step = pipe.scheduler.begin_index or 0
        if time is None or step >= len(pipe.scheduler.timesteps):
            return None
        exact = pipe.scheduler.timesteps[step].to(time.device, torch.float32)
        # a timestep that is not the scheduler's, rounded, stays what it is
        was_rounded = exact.to(time.dtype) == time
        return args, kwargs | {"timestep": torch.where(was_rounded, exact, time.float())}

    return [transformer.register_forward_pre_hook(correct, with_kwargs=True).remove]


def official_sigmas(pipe, _: Foreign) -> list[Undo]:
    """Space the noise levels evenly from 1 towards 0 and shift them once.

    diffusers' scheduler shifts its own levels when it is made, and again when timesteps are set.
    """

    def set_timesteps(
        self,
        num_inference_steps=None,
        device=None,
        sigmas=None,
        mu=None,
        timesteps=None,
    ):
        if sigmas is None and timesteps is None and num_inference_steps:
            sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        return type(self).set_timesteps(self, num_inference_steps, device, sigmas, mu, timesteps)

    return [_replace_method(pipe.scheduler, set_timesteps)]


def cache_contexts(pipe, transformer: Foreign) -> list[Undo]:
    """Give the passes with and without the prompt memories of their own, which caches of diffusers
    such as MagCache mix otherwise.

    The first pass of a step is the one with the prompt.
    """
    last: tuple = (None, None)
    entered: list = []

    def enter(module: Foreign, *_) -> None:
        nonlocal last
        now = pipe.scheduler.timesteps, pipe.scheduler.step_index
        again = now[0] is last[0] and now[1] == last[1]
        last = now
        entered.append(module.cache_context("uncond" if again else "cond"))
        entered[-1].__enter__()

    def leave(*_) -> None:
        entered.pop().__exit__(None, None, None)

    return [
        transformer.register_forward_pre_hook(enter).remove,
        transformer.register_forward_hook(leave, always_call=True).remove,
    ]


def image_once(pipe, transformer: Foreign) -> list[Undo]:
    """Put the first frame of an image-to-video run into the latents alone.

    diffusers up to 0.37 also copies it into the channels of visual conditioning, which the official
    code and later versions leave at zero there. Other pipelines are left as they are.
    """
    if "I2V" not in type(pipe).__name__:
        return []

    def prepare_latents(self, *args, **kwargs) -> Tensor:
        stock_method = type(self).prepare_latents
        given = inspect.signature(stock_method).bind(self, *args, **kwargs).arguments
        latents = stock_method(self, *args, **kwargs)  # [B, T, H, W, noisy, visual_cond, mask]
        channels = transformer.config.in_visual_dim
        if given.get("latents") is None and latents.shape[-1] == 2 * channels + 1:
            latents[:, :1, :, :, channels : 2 * channels] = 0
        return latents

    return [_replace_method(pipe, prepare_latents)]


def _replace_method(owner: object, function: Callable[..., object]) -> Undo:
    """Replace a method of one object by a function of the same name."""
    name = function.__name__
    before = vars(owner).get(name)
    setattr(owner, name, MethodType(function, owner))

    def undo() -> None:
        if before is None:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)

    return undo
