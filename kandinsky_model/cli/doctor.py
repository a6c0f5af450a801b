# SPDX-License-Identifier: Apache-2.0
"""The report of `kandinsky doctor`: versions, devices, what runs for each operator and why, and
where files are read from."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

import torch

import kandinsky_kernels

from ..checkpoints.locate import TINY
from ..devices.available import cpu_name
from ..media.video import CONTAINERS, encoder

SWITCH = "KANDINSKY_KERNELS"
SWITCHES = ("", "reference")  # the values of this variable that mean something
HUB_SECONDS = 5.0  # how long the hub may take to answer

# Package -> what it is for. Those with "always" come with the installation.
PACKAGES = {
    "torch": "always",
    "numpy": "always",
    "einops": "always",
    "safetensors": "always",
    "av": "mp4 files",
    "pillow": "gif and png files",
    "tqdm": "the progress bar",
    "huggingface_hub": "models from the hub",
    "transformers": "text encoders of the released checkpoints",
    "diffusers": "their prompt template",
    "bitsandbytes": "text encoders in int4, and training with adamw8bit",
    "gguf": "GGUF files",
    "matplotlib": "the curves of inspect and train",
}


Facts = Mapping[str, "str | Facts"]  # by name


def report() -> Iterator[str]:
    """The facts, line by line."""
    for title, section in facts().items():
        yield title.capitalize()
        rows = list(_rows(section))
        widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
        for *names, fact in rows:
            padded = [f"{name:{width}}" for name, width in zip(names, widths, strict=True)]
            yield "  " + "  ".join([*padded, fact])


def _rows(section: Facts) -> Iterator[tuple[str, ...]]:
    """The names that lead to each fact, and the fact."""
    for name, value in section.items():
        if isinstance(value, str):
            yield name, value
        else:
            yield from ((name, *row) for row in _rows(value))


def facts() -> dict[str, Facts]:
    """What this machine offers, by section and name."""
    return {
        "versions": dict(_versions()),
        "devices": dict(_devices()),
        "operators": kandinsky_kernels.kernels(),
        "files": dict(_files()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "kandinsky", kandinsky_kernels.__version__
    for name, purpose in PACKAGES.items():
        try:
            yield name, _torch_version() if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, f"absent; needed for {purpose}"
    yield "compiled kernels", _compiled()
    value = os.environ.get(SWITCH, "")
    if value not in SWITCHES:
        yield SWITCH, f"{value!r} means nothing; set it to reference, or remove it"
    elif value:
        yield SWITCH, value


def _torch_version() -> str:
    """The version with its local part, such as +cu130, which package managers leave out."""
    if torch.version.cuda:
        return f"{torch.__version__}, built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"{torch.__version__}, built for ROCm {torch.version.hip}"
    return f"{torch.__version__}, built without CUDA"


def _compiled() -> str:
    """What the compiled library was built with."""
    try:
        info = kandinsky_kernels.build_info()
    except RuntimeError as error:
        return f"absent ({error})"
    return f"{info['cuda']} CUDA C++ kernels, by {info['compiler']} against torch {info['torch']}"


def _devices() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    simd = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    yield "cpu", f"{cpu_name()}, {cores} cores, {threads} threads, torch uses {simd}"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", "no device is visible" if built else "torch is built without it"
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.total_memory / 2**30:.1f} GiB",
        )


def _files() -> Iterator[tuple[str, str]]:
    for suffix in CONTAINERS:
        try:
            yield suffix[1:], f"encoder {encoder(suffix)}"
        except RuntimeError as error:
            yield suffix[1:], str(error)
    weights = list(TINY.glob("**/*.safetensors"))
    size = sum(file.stat().st_size for file in weights) / 2**20
    is_there = f"{len(weights)} files, {size:.1f} MiB in {TINY}"
    yield "bundled model", is_there if weights else f"absent from {TINY}"
    try:
        from huggingface_hub import constants
    except ImportError:
        yield "hub", "huggingface_hub is absent, so models come from local paths only"
        return
    yield "hub", f"cache {constants.HF_HUB_CACHE}, {_hub_state()}"


def _hub_state() -> str:
    """Whether the hub answers. Any answer will do: a repository may still be closed to the user."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever library the hub's client uses
        return f"no answer from {constants.ENDPOINT} ({type(error).__name__})"
    return f"online ({constants.ENDPOINT} answers)"
