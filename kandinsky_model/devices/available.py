# SPDX-License-Identifier: Apache-2.0
"""Which device runs, and how many bytes are free on it."""

from __future__ import annotations

import re

import torch


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or for None the first CUDA device, or the CPU; RuntimeError when
    torch cannot use it here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # AssertionError, RuntimeError and NotImplementedError, all of many lines
    except Exception as error:
        raise RuntimeError(
            f"the device must be usable by torch {torch.__version__} here, but "
            f"{name!r} is not "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); use cpu"
        ) from None
    return device


def free_bytes(device: torch.device, own: int = 0) -> int | None:
    """What a run may use unless it is told: a share of what is free on a GPU, `own` bytes of ours
    there included; None on a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + reserved + own))


FREE_SHARE = 0.9  # of a GPU's free memory; the rest is for convolution workspaces and fragments


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


def parse_bytes(text: str) -> int:
    """Bytes from "10GB", "9.5 GiB", "800mb" or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(
            "a memory budget must be a positive number of bytes, or of KB, MB, GB, "
            f"KiB, MiB or GiB, got {text!r}; "
            "write for example 10GB"
        )
    return int(float(match[1]) * UNITS[match[2]])
