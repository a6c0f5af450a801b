# SPDX-License-Identifier: Apache-2.0
"""How operators are launched on GPUs: grids, what a kernel refuses, and the small case on which it
is tried before its first use.

Importing these modules attaches the Triton kernels to the operators.
"""

from . import nabla, norm, vae

__all__ = ["nabla", "norm", "vae"]
