# SPDX-License-Identifier: Apache-2.0
"""Whether PyTorch wants a derivative of what an operator computes."""

import torch
from torch.autograd import forward_ad


def has_tangents(args: tuple) -> bool:
    """Whether forward-mode differentiation is on and any argument takes part in it."""
    if forward_ad._current_level < 0:
        return False
    tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def derives(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative with respect to any of these tensors is wanted, in either mode."""
    recorded = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    return recorded or has_tangents(tensors)
