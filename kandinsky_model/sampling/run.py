# SPDX-License-Identifier: Apache-2.0
"""One sampling run as data: all that the transformer reads. A run can be stopped, kept in a file,
and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoints.headers import read_headers
from ..config import DiTConfig
from ..files import replacing
from ..media.video import check_output
from ..text.embeddings import Conditioning
from .given import Given, check_given
from .settings import Settings, check_settings, named
from .values import integer, one_line, texts

ABOUT = "kandinsky_run"  # the tensor of bytes that holds settings and step as JSON
# The names of tensors: of a picture to edit; before those of given frames, and of step caches.
SOURCE = "source"
FRAME_PREFIX = "frame."
MEMORY_PREFIX = "memory."

# The settings that all videos of a run have in common.
SHARED = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "scheduler_scale",
    "attention",
    "precision",
    "cache",
    "lora",
    "quantization",
    "preset",
)


@dataclass(frozen=True, eq=False)
class Run:
    """A batch of B videos on its way.

    settings: of each video. latents: [B, T, h, w, C], noise, or what `step` steps have made of it.
    cond, uncond: the embedded prompts and negative prompts; `uncond` is None without guidance.
    given: the latents of pictures. memories: what the branches of a step cache remember, by the
    names of `Remembering.memories`. adapters: `Adapters.fingerprints` of the run; empty where there
    are none or where nobody asked yet. rest: the jobs of the command line that were to follow,
    each an object with the name of its "output", of its "strip" or None, and the "arguments" of
    `Kandinsky5.generate`.
    """

    settings: list[Settings]
    latents: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    given: Given
    step: int = 0
    memories: Mapping[str, Tensor] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    rest: tuple[Mapping[str, Any], ...] = ()

    def to(self, device: torch.device) -> Run:
        """The same run with every tensor that the transformer reads on `device`."""
        return Run(
            self.settings,
            self.latents.to(device),
            self.cond.to(device),
            None if self.uncond is None else self.uncond.to(device),
            self.given.to(device),
            self.step,
            {name: tensor.to(device) for name, tensor in self.memories.items()},
            self.adapters,
            self.rest,
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all. Raises what `check_output` raises."""
        path = check_output(path, (".safetensors",))
        with replacing(path) as target:
            target.write_bytes(self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        about = {
            "step": self.step,
            "settings": [asdict(one) for one in self.settings],
            "adapters": list(self.adapters),
            "rest": list(self.rest),
        }
        data = bytearray(json.dumps(about).encode())
        tensors = self._tensors() | {ABOUT: torch.frombuffer(data, dtype=torch.uint8)}
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the file by their names in it."""
        tensors = {"latents": self.latents}
        for name, text in (("cond", self.cond), ("uncond", self.uncond)):
            if text is not None:
                tensors[f"{name}.embeds"] = text.embeds
                tensors[f"{name}.pooled"] = text.pooled
                if text.lengths is not None:
                    tensors[f"{name}.lengths"] = text.lengths
        for index, frame in self.given.frames.items():
            tensors[f"{FRAME_PREFIX}{index}"] = frame
        if self.given.source is not None:
            tensors[SOURCE] = self.given.source
        for name, tensor in self.memories.items():
            tensors[f"{MEMORY_PREFIX}{name}"] = tensor
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what `save` wrote. Raises ValueError or OSError for any other file."""
        if ABOUT not in read_headers([Path(path)]):
            raise ValueError(
                f"{path} must hold an interrupted run, but it has no such settings; "
                "choose another file"
            )
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except (ValueError, SafetensorError) as error:
            raise ValueError(
                f"{path} must hold an interrupted run, but {one_line(error)}; choose another file"
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Run:
        """The run of which `to_bytes` gave these bytes. Raises ValueError or SafetensorError for
        other bytes."""
        # Cloned, because products round differently by where in a cache line a tensor begins.
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        about = _about(tensors[ABOUT])
        frames = {}
        for name, tensor in _prefixed(tensors, FRAME_PREFIX).items():
            if not name.isdecimal():
                raise ValueError(f"a given frame has a number, got {name!r:.80}")
            frames[int(name)] = tensor
        settings = [Settings.parse(one) for one in about.settings]
        uncond = _conditioning(tensors, "uncond") if "uncond.embeds" in tensors else None
        run = cls(
            settings,
            _tensor(tensors, "latents"),
            _conditioning(tensors, "cond"),
            uncond,
            Given(frames, tensors.get(SOURCE)),
            about.step,
            _prefixed(tensors, MEMORY_PREFIX),
            about.adapters,
            about.rest,
        )
        run.check()
        unknown = sorted(tensors.keys() - run._tensors().keys() - {ABOUT})
        if unknown:
            raise ValueError(f"it has a tensor that no run has, {unknown[0]!r:.80}")
        return run

    def check(self, config: DiTConfig | None = None) -> None:
        """Raise ValueError unless settings and tensors go together, and with the network of
        `config`."""
        if not self.settings:
            raise ValueError("a run must have settings, got none")
        first = self.settings[0]
        for one in self.settings:
            for name in SHARED:
                if getattr(one, name) != getattr(first, name):
                    raise ValueError(
                        f"the videos of a run share their {name}, got {getattr(first, name)!r} and "
                        f"{getattr(one, name)!r}"
                    )
        if not 0 <= self.step <= first.num_inference_steps:
            raise ValueError(
                f"a run of {first.num_inference_steps} steps is after 0 to "
                f"{first.num_inference_steps} of them, got {self.step}"
            )
        if first.guided and self.uncond is None:
            raise ValueError("a run with guidance has an embedded negative prompt, got none")
        for name, tensor, shape, dtype in self._expected(config):
            _check_tensor(name, tensor, shape, dtype)
        for text in (self.cond, self.uncond):
            if text is not None and text.lengths is not None:
                L = text.embeds.shape[1]
                if text.lengths.min() < 1 or text.lengths.max() > L:
                    raise ValueError(f"lengths of texts lie in 1..{L}, got {text.lengths.tolist()}")
        check_given(self.given, self.latents.shape)
        if self.memories and first.cache == "none":
            raise ValueError("a run without a step cache remembers nothing, got memories of one")

    def check_weights(
        self, lora: tuple[str, ...], fingerprints: tuple[str, ...], quantization: str
    ) -> None:
        """Raise ValueError unless a model has the adapters and the quantization that the run began
        with. lora, fingerprints: what `Adapters.active` and `Adapters.fingerprints` say of it."""
        first = self.settings[0]
        if first.quantization != quantization:
            raise ValueError(
                f"the run was made with {first.quantization or 'unquantised'} weights, got "
                f"{quantization or 'unquantised'} ones; load the model with "
                f"quantize={first.quantization or None!r}"
            )
        scales, wanted = ([one.rpartition(":")[2] for one in all_] for all_ in (lora, first.lora))
        if scales != wanted or (self.adapters and self.adapters != fingerprints):
            raise ValueError(
                f"the run was made with the adapters {', '.join(first.lora) or 'none'}, got "
                f"{', '.join(lora) or 'none'}; load the same files with the same scales, in the "
                "same order"
            )

    def _expected(self, config: DiTConfig | None) -> Iterator[Expected]:
        """Every tensor with the shape and dtype that settings and network ask for, where "float"
        stands for any floating dtype."""
        first = self.settings[0]
        B = len(self.settings)
        C = config.in_visual_dim if config else None
        yield "latents", self.latents, (B, *first.latent_shape, C), "float"
        text_dim = config.in_text_dim if config else None
        pooled_dim = config.in_text_dim2 if config else None
        for name, text in (("cond", self.cond), ("uncond", self.uncond)):
            if text is not None:
                yield f"{name}.embeds", text.embeds, (B, None, text_dim), "float"
                yield f"{name}.pooled", text.pooled, (B, pooled_dim), "float"
                if text.lengths is not None:
                    yield f"{name}.lengths", text.lengths, (B,), "int64"
        width = config.model_dim if config else None
        for name, tensor in self.memories.items():
            if name.endswith(".decision"):
                yield name, tensor, (3,), "int64"
            else:
                yield name, tensor, (B, first.grid.tokens, width), "float"


# name, tensor, its shape with None for any size, its dtype
Expected = tuple[str, Tensor, tuple[int | None, ...], str]


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: str) -> None:
    is_dtype = tensor.is_floating_point() if dtype == "float" else tensor.dtype == torch.int64
    fits = tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not (fits and is_dtype):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"the run requires {name} of {dtype} [{wanted}], got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


@dataclass(frozen=True)
class About:
    """What a file of a run holds beside tensors. settings: as JSON has them."""

    settings: list
    step: int
    adapters: tuple[str, ...]
    rest: tuple[Mapping[str, Any], ...]


def _about(stored: Tensor) -> About:
    """Read a tensor of bytes that hold JSON."""
    try:
        about = json.loads(stored.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its settings are no JSON: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("settings"), list):
        raise ValueError("its settings are no JSON object with a list of them")
    unknown = sorted(about.keys() - {"settings", "step", "adapters", "rest"})
    if unknown:
        raise ValueError(f"its settings must be those of this version, got {unknown[0]!r:.80} too")
    try:
        step = integer("step", about.get("step"))
        adapters = texts("adapters", about.get("adapters", ()))
    except TypeError as error:
        raise ValueError(str(error)) from None
    rest = about.get("rest", [])
    if not isinstance(rest, list) or not all(map(_is_job, rest)):
        raise ValueError("its jobs that were to follow have no output, strip and arguments")
    for job in rest:
        _check_arguments(job["arguments"])
    return About(about["settings"], step, adapters, tuple(rest))


def _is_job(job: object) -> bool:
    """Whether this is one of a run's `rest`."""
    return (
        isinstance(job, dict)
        and isinstance(job.get("output"), str)
        and isinstance(job.get("strip", 0), str | None)
        and isinstance(job.get("arguments"), dict)
        and "prompt" in job["arguments"]
        and not {"callback", "memory_budget"} & job["arguments"].keys()
    )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of a job that `Kandinsky5.generate` would refuse, which else
    came to light when the jobs before it are done."""
    settings = dict(arguments)
    settings.pop("expand_prompt", None)
    given = [settings.pop(name, None) for name in ("image", "last_image")]
    try:
        texts("image", [path for path in given if path is not None])
        chosen = {"prompt": settings.pop("prompt"), "seed": settings.pop("seed", None)}
        check_settings(**chosen, **named(settings))
    except TypeError as error:
        raise ValueError(f"a job that was to follow cannot be done: {error}") from None


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"it has no tensor {name}")
    return tensors[name]


def _conditioning(tensors: Mapping[str, Tensor], name: str) -> Conditioning:
    embeds = _tensor(tensors, f"{name}.embeds")
    pooled = _tensor(tensors, f"{name}.pooled")
    return Conditioning(embeds, tensors.get(f"{name}.lengths"), pooled)


class Interrupted(KeyboardInterrupt):
    """Sampling was stopped by the keyboard. run: what `Kandinsky5.resume` goes on with."""

    def __init__(self, run: Run):
        super().__init__(f"after {run.step} of {run.settings[0].num_inference_steps} steps")
        self.run = run
