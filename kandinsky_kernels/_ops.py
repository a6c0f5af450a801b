# SPDX-License-Identifier: Apache-2.0
"""The namespace of the operators.

Where a package is built for the Hugging Face hub, the builder puts a module of its own in this
one's place. Its namespace bears the name of the build, so that several can be loaded at once, and
importing it loads the compiled library.
"""

import torch

ops = torch.ops.kandinsky_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The name by which the dispatcher knows the operator."""
    return f"kandinsky_kernels::{op_name}"
