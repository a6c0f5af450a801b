# SPDX-License-Identifier: Apache-2.0
"""Acceleration of diffusers pipelines: `accelerate` makes a Kandinsky 5 pipeline of diffusers, its
transformer or its video VAE run on the operators of `kandinsky_kernels`, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

from . import diffusers_corrections, diffusers_transformer, diffusers_vae, forward_swap

RULES: dict[str, ModuleType] = {
    "Kandinsky5Transformer3DModel": diffusers_transformer,
    "AutoencoderKLHunyuanVideo": diffusers_vae,
}


@dataclass(eq=False)
class AccelerationHandle:
    """What `accelerate` did, and the way back: `undo`, or leaving a `with` block.

    Its text says which modules were replaced, which were not and why, and what has been computed by
    diffusers' own code since.
    """

    replaced: dict[str, int] = field(default_factory=dict)  # name of the class -> how many
    kept: dict[str, str] = field(default_factory=dict)  # name of what was left as it is -> why
    corrected: list[str] = field(default_factory=list)
    _models: list[nn.Module] = field(default_factory=list)
    _reports: forward_swap.Reports = field(default_factory=forward_swap.Reports)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def reports(self) -> list[str]:
        """What has been logged: what ran as diffusers wrote it, and why."""
        return sorted(self._reports)

    def undo(self) -> None:
        """Bring diffusers' own forwards back, so that results are its own again, bit for bit.

        What was added since, such as adapters and hooks, stays.
        """
        while self._undo:
            self._undo.pop()()
        for model in self._models:
            for module in model.modules():
                if forward_swap.accelerated(module):
                    forward_swap.restore(module)
        self._models.clear()

    def __enter__(self) -> AccelerationHandle:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = ["accelerated" if self._models else "not accelerated"]
        lines += [f"  replaced {count} x {name}" for name, count in sorted(self.replaced.items())]
        lines += [f"  corrected {what}" for what in self.corrected]
        lines += [f"  kept {name}: {why}" for name, why in self.kept.items()]
        lines += [f"  {report}" for report in self.reports]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(
    target,
    vae: bool = True,
    exact_time: bool = False,
    official_sigmas: bool = False,
    cache_contexts: bool = False,
    image_once: bool = False,
) -> AccelerationHandle:
    """Make diffusers' Kandinsky 5 run on the operators of `kandinsky_kernels`, in place.

    target: a Kandinsky 5 pipeline (text or image to video or image), its transformer, or its video
    VAE. vae: whether a pipeline's video VAE is accelerated too.

    Modules keep their classes, and parameters their places and names. So adapters, offloading,
    casting, quantisation, compilation, caches, cache-dit, loading, saving and copying work as
    before, set up before or after. NABLA runs at every size whose sides are multiples of 16,
    without an attention backend and without compiling. Rotated queries and keys are not rounded to
    bfloat16 in passing, as diffusers does even in float32; other differences are rounding. What the
    operators must not compute runs as diffusers wrote it, with one line in the log: dense passes
    that record gradients, forward-mode derivatives, other dtypes, a model split over devices,
    modules that were replaced or are watched by hooks, NABLA with an attention backend set.

    The other arguments correct a pipeline towards the official code, with the effects that
    tests/acceleration/test_pipelines.py measures:
    exact_time: the transformer gets the time in float32 instead of the weights' dtype. 10 steps in
    bfloat16: the latents' distance to the float32 run falls from 1.6 % to 0.7 %.
    official_sigmas: times are shifted once, not twice. It moves them by up to 0.07 of 1 at 50 steps
    with shift 5, 0.23 at 16 steps.
    cache_contexts: passes with and without the prompt have memories of their own in diffusers'
    caches. MagCache, 10 or 11 of 24 passes computed: the distance to the run without it falls from
    38 % to 6 %.
    image_once: an image-to-video run has its first frame in the latents alone, not also in the
    channels of visual conditioning, where diffusers up to 0.37 puts a copy.

    Returns a handle that says what was done and takes it back. Raises TypeError for another target,
    ValueError for corrections of what is not a pipeline.
    """
    handle = AccelerationHandle()
    parts = _parts(target)
    wanted = {
        "exact_time": exact_time,
        "official_sigmas": official_sigmas,
        "cache_contexts": cache_contexts,
        "image_once": image_once,
    }
    corrections = [name for name, yes in wanted.items() if yes]
    if corrections and not (hasattr(target, "scheduler") and "transformer" in parts):
        raise ValueError(
            f"{' and '.join(corrections)} must be asked of a pipeline, got "
            f"{type(target).__name__}; pass the pipeline itself."
        )
    for name, module in parts.items():
        why = "vae=False was asked for" if name == "vae" and not vae else _replace(module, handle)
        if why:
            handle.kept[f"{name}, {type(module).__name__}"] = why
    for name in corrections:
        handle._undo += getattr(diffusers_corrections, name)(target, parts["transformer"])
        handle.corrected.append(name)
    return handle


def _parts(target) -> dict[str, nn.Module]:
    """The transformer and the VAE of a pipeline, or the module itself, each without the wrapper
    that torch.compile puts around it."""
    parts: dict[str, nn.Module] = {}
    for name in ("transformer", "vae"):
        part = getattr(target, name, None)
        if isinstance(part, nn.Module):
            parts[name] = part
    parts = parts or {"module": target}
    parts = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}
    if not {type(part).__name__ for part in parts.values()} & set(RULES):
        raise TypeError(
            "target must be a Kandinsky 5 pipeline of diffusers, or its "
            f"{' or '.join(RULES)}, got {type(target).__name__}; "
            "load one with from_pretrained."
        )
    return parts


def _replace(model: nn.Module, handle: AccelerationHandle) -> str | None:
    """Replace the forwards of all modules in `model` that its rules know, or say why not."""
    rules = RULES.get(type(model).__name__)
    if rules is None:
        return "there is nothing here that would make it faster"
    if any(forward_swap.accelerated(module) for module in model.modules()):
        return "it is accelerated already"
    if why := rules.obstacle(model):
        return why
    names = Counter(handle.replaced)
    for module in model.modules():
        function = rules.FORWARDS.get(type(module).__name__)
        # adapters' layers have the names of those they wrap
        if function is None or not type(module).__module__.startswith(("torch.nn.", "diffusers.")):
            continue
        if forward_swap.swap(module, function, handle._reports):
            names[type(module).__name__] += 1
        elif module is model:
            return "its forward has been replaced by something that hides diffusers' own"
    if wrapper := forward_swap.wrapper_of(model):
        forward_swap.report(model, f"is called through a function of {wrapper}")
    handle._models.append(model)
    handle.replaced = dict(names)
    return None
