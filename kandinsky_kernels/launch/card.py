# SPDX-License-Identifier: Apache-2.0
"""Which generation of card a tensor lies on, and what the kernels need of it."""

from __future__ import annotations

import torch
from torch import Tensor

OLDEST = (8, 0)  # Ampere: the first with matrix units for bf16 and asynchronous copies
INTERPRETED = (9, 0)  # what Triton's interpreter, which runs on CPU tensors, stands for
# AMD's cards have capabilities of their own counting: gfx942 is (9, 4), and no Hopper. They are
# given what every card has.
AMD = (8, 9)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability by which `tuning` chooses for the tensor's card."""
    if not x.is_cuda:
        return INTERPRETED
    return AMD if torch.version.hip else torch.cuda.get_device_capability(x.device)


def refuse_card(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a card, or None.

    For sm_75 Triton multiplies matrices by scalar instructions, 8,224 for a tile of attention,
    because it has no matrix units for bf16: PyTorch's own operators are faster.
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    needed, got = (".".join(map(str, version)) for version in (OLDEST, found))
    return f"its kernels need a card of compute capability {needed} or newer, got {got}"
