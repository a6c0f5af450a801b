# SPDX-License-Identifier: Apache-2.0
"""Whether PyTorch is asked for a derivative of what is done to tensors."""

import torch
from torch.autograd import forward_ad


def has_tangents(args: tuple) -> bool:
    """Whether forward-mode differentiation is on and any argument takes part in it."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(arg).tangent is not None
        for arg in args
        if isinstance(arg, torch.Tensor)
    )


def derives(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative of what is done to these tensors is wanted, of either mode."""
    return (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        or has_tangents(tensors)
    )
