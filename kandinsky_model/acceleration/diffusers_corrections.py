# SPDX-License-Identifier: Apache-2.0
"""Where diffusers' Kandinsky 5 pipelines differ from the official ones, put right: each returns
what undoes it.

Their measured effects are in the docstring of `acceleration.accelerate`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from . import class_swap

Undo = Callable[[], object]


def exact_time(pipe, transformer: nn.Module) -> list[Undo]:
    """The time in fp32, which pipelines round to the weights' dtype: in bf16 it can be off by 2 of
    1000."""

    def correct(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        time, i = kwargs.get("timestep"), pipe.scheduler.step_index
        i = (pipe.scheduler.begin_index or 0) if i is None else i  # before the first step
        if time is None or i >= len(pipe.scheduler.timesteps):
            return None
        exact = pipe.scheduler.timesteps[i].to(time.device, torch.float32)
        # only what was rounded from it
        return args, kwargs | {
            "timestep": torch.where(exact.to(time.dtype) == time, exact, time.float())
        }

    return [transformer.register_forward_pre_hook(correct, with_kwargs=True).remove]


class OfficialSigmas:
    """For the scheduler: times evenly spaced from 1 towards 0, then shifted once; stock ones are
    shifted before and after."""

    def set_timesteps(
        self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None
    ):
        if sigmas is None and timesteps is None and num_inference_steps:
            sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        return super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


def official_sigmas(pipe, _: nn.Module) -> list[Undo]:
    scheduler = pipe.scheduler
    class_swap.swap(scheduler, OfficialSigmas)
    return [lambda: class_swap.restore(scheduler)]


def cache_contexts(pipe, transformer: nn.Module) -> list[Undo]:
    """Memories of their own for the passes with and without the prompt, which caches like MagCache
    mix otherwise.

    The first pass of a step is the one with the prompt.
    """
    last, entered = (None, None), []

    def enter(module: nn.Module, *_) -> None:
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
