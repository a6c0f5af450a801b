# SPDX-License-Identifier: Apache-2.0
"""What this machine offers: versions, devices, what runs for each operator and why, optional
packages, hub cache."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

import kandinsky_kernels

from ..checkpoints.locate import TINY
from ..devices.available import cpu_name
from ..media.video import h264_encoder

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
    "matplotlib": "the curves of inspect and train",
}


def report() -> Iterator[str]:
    """The report, line by line."""
    for title, lines in (
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Operators", _operators()),
        ("Files", _files()),
    ):
        yield title
        yield from (f"  {line}" for line in lines)


def _versions() -> Iterator[str]:
    yield f"{'python':16} {platform.python_version()} on {platform.platform()}"
    yield f"{'kandinsky':16} {kandinsky_kernels.__version__}"
    for name, purpose in PACKAGES.items():
        try:
            yield f"{name:16} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name:16} absent; needed for {purpose}"


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield (
        f"cpu: {cpu_name()}, {cores} cores, {torch.get_num_threads()} threads, torch uses "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield (
                f"cuda:{index}: {card.name}, compute capability {card.major}.{card.minor}, "
                f"{card.total_memory / 2**30:.1f} GiB"
            )
    else:
        yield "cuda: " + (
            "no device is visible"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without it"
        )


def _operators() -> Iterator[str]:
    table = kandinsky_kernels.kernels()
    width = max(map(len, table))
    for op, row in table.items():
        for device, what in row.items():
            yield f"{op:{width}}  {device:4}  {what}"


def _files() -> Iterator[str]:
    try:
        yield f"mp4: encoder {h264_encoder()}"
    except RuntimeError as error:
        yield f"mp4: {error}"
    weights = list(TINY.glob("**/*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    yield (
        f"bundled model: {len(weights)} files, {size / 2**20:.1f} MiB in {TINY}"
        if weights
        else f"bundled model: absent from {TINY}"
    )
    try:
        from huggingface_hub import constants
    except ImportError:
        yield "hub: huggingface_hub is absent, so models come from local paths only"
        return
    yield (
        f"hub: cache {constants.HF_HUB_CACHE}, "
        f"{'offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else 'online'}"
    )
