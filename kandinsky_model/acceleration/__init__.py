# SPDX-License-Identifier: Apache-2.0
"""The door for diffusers: `accelerate` makes a pipeline of theirs, its transformer or its video VAE
run on our operators, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from . import class_swap, diffusers_corrections, diffusers_transformer, diffusers_vae

RULES = {
    "Kandinsky5Transformer3DModel": diffusers_transformer,
    "AutoencoderKLHunyuanVideo": diffusers_vae,
}


@dataclass(eq=False)
class Acceleration:
    """What `accelerate` did. `undo` takes it back; so does leaving a `with` block. Its text says
    what was replaced, what not and why."""

    replaced: dict[str, int] = field(default_factory=dict)  # class: how many
    kept: dict[str, str] = field(default_factory=dict)  # what was left as it is: why
    corrected: list[str] = field(default_factory=list)
    _models: list[nn.Module] = field(default_factory=list)
    _reports: set[str] = field(default_factory=set)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def reports(self) -> list[str]:
        """What has been computed by diffusers' own code since, and why."""
        return sorted(self._reports)

    def undo(self) -> None:
        """Bring back what was there: results are again diffusers' own, bit for bit. What came
        after, such as adapters and hooks, stays."""
        while self._undo:
            self._undo.pop()()
        for model in self._models:
            for module in list(_things(model)):
                if class_swap.stock_class(module):
                    class_swap.restore(module)
                vars(module).pop("_reports", None)
        self._models.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = ["accelerated" if self._models else "not accelerated"]
        lines += [f"  replaced {count} x {name}" for name, count in sorted(self.replaced.items())]
        lines += [f"  corrected {what}" for what in self.corrected]
        lines += [f"  kept {name}: {why}" for name, why in self.kept.items()]
        return "\n".join([*lines, *(f"  {report}" for report in self.reports)])

    __repr__ = __str__


def accelerate(
    target,
    vae: bool = True,
    exact_time: bool = False,
    official_sigmas: bool = False,
    cache_contexts: bool = False,
) -> Acceleration:
    """Make diffusers' Kandinsky 5 run on our operators, in place.

    target: a Kandinsky 5 pipeline (text or image to video or image), its transformer, or its video
    VAE. vae: whether a pipeline's video VAE is accelerated too.

    Parameters keep their places and names, so adapters, offloading, casting, quantisation,
    compilation, caches and saving work as before, set up before or after. NABLA runs at every size
    whose sides are multiples of 16, without an attention backend and without compiling. Rotated
    queries and keys are not rounded to bfloat16 in passing, as diffusers does even in float32;
    other differences are rounding. A pass that our operators must not do (gradients, other dtypes,
    a model split over devices, NABLA with an attention backend set) runs as diffusers wrote it,
    with one line in the log. The rest corrects a pipeline towards the official code, with the
    effects that tests/acceleration/test_pipelines.py measures:
    exact_time: the transformer gets the time in float32 instead of the weights' dtype. 10 steps in
    bfloat16: the latents' distance to the float32 run falls from 1.6 % to 0.7 %.
    official_sigmas: times are shifted once, not twice. It moves them by up to 0.07 of 1 at 50 steps
    with shift 5, 0.23 at 16 steps.
    cache_contexts: passes with and without the prompt have memories of their own in diffusers'
    caches. MagCache, 10 or 11 of 24 passes computed: the distance to the run without it falls from
    38 % to 6 %.

    Returns the `Acceleration`. Raises TypeError for another target, ValueError for corrections of
    what is not a pipeline.
    """
    handle, parts = Acceleration(), _parts(target)
    wanted = {
        "exact_time": exact_time,
        "official_sigmas": official_sigmas,
        "cache_contexts": cache_contexts,
    }
    wanted = [name for name, yes in wanted.items() if yes]
    if wanted and not (hasattr(target, "scheduler") and "transformer" in parts):
        raise ValueError(
            f"{' and '.join(wanted)} must be asked of a pipeline, got "
            f"{type(target).__name__}; pass the pipeline itself."
        )
    for name, module in parts.items():
        why = "vae=False was asked for" if name == "vae" and not vae else _replace(module, handle)
        if why:
            handle.kept[f"{name}, {type(module).__name__}"] = why
    for name in wanted:
        handle._undo += getattr(diffusers_corrections, name)(target, parts["transformer"])
        handle.corrected.append(name)
    return handle


def _parts(target) -> dict[str, nn.Module]:
    """The transformer and the VAE of a pipeline, or the module itself, freed of torch.compile's
    wrapper."""
    parts = {name: getattr(target, name, None) for name in ("transformer", "vae")}
    parts = {name: part for name, part in parts.items() if isinstance(part, nn.Module)} or {
        "module": target
    }
    parts = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}
    if not {type(part).__name__ for part in parts.values()} & set(RULES):
        raise TypeError(
            "target must be a Kandinsky 5 pipeline of diffusers, or its "
            f"{' or '.join(RULES)}, got {type(target).__name__}; "
            "load one with from_pretrained."
        )
    return parts


def _things(model: nn.Module):
    """Its modules and their attention processors."""
    for module in model.modules():
        yield module
        if hasattr(module, "processor"):
            yield module.processor


def _replace(model: nn.Module, handle: Acceleration) -> str | None:
    """Give everything in `model` that its rules know a faster class, or say why not."""
    rules = RULES.get(type(model).__name__)
    if rules is None:
        return "there is nothing here that would make it faster"
    if any(class_swap.stock_class(module) for module in model.modules()):
        return "it is accelerated already"
    if why := rules.obstacle(model):
        return why
    things = [
        thing for thing in dict.fromkeys(_things(model)) if type(thing).__name__ in rules.SWAPS
    ]
    for thing in things:
        class_swap.swap(thing, rules.SWAPS[type(thing).__name__])
        if isinstance(thing, nn.Module):
            thing._reports = handle._reports
    handle._models.append(model)
    handle.replaced = dict(
        Counter(handle.replaced) + Counter(type(thing).__name__ for thing in things)
    )
    return None
