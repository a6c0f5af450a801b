# SPDX-License-Identifier: Apache-2.0
"""Which device runs, what the processor is called, and how many bytes are free."""

from __future__ import annotations

import platform
import re

import torch

# Of a GPU's free memory; the rest is left for convolution workspaces and fragmentation.
FREE_SHARE = 0.9

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def cpu_name() -> str:
    """The processor's model, as Linux names it; elsewhere what Python knows of it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):  # another system, or a processor without a model name
        return platform.processor() or platform.machine()


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; for None the current CUDA device if there is one, else the CPU.

    Raises RuntimeError when torch cannot allocate on the device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch raises AssertionError, RuntimeError or NotImplementedError here, over many lines.
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RuntimeError(
            f"the device must be usable by torch {torch.__version__} here, but "
            f"{name!r} is not ({reason}); use cpu"
        ) from None
    return device


def free_bytes(device: torch.device, own: int = 0) -> int | None:
    """The memory budget of a run that was given none: `FREE_SHARE` of what is free on a GPU, None
    (no limit) on a CPU.

    own: bytes of this process's tensors on the device that the run may move away, and which
    therefore count as free.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What the caching allocator holds without using it is free as well.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (free + cached + own))


def parse_bytes(text: str) -> int:
    """Bytes from "10GB", "9.5 GiB", "800mb" or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(
            "a memory budget must be a positive number of bytes, or of KB, MB, GB, "
            f"KiB, MiB or GiB, got {text!r}; write for example 10GB"
        )
    return int(float(match[1]) * UNITS[match[2]])
