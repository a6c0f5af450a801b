# SPDX-License-Identifier: Apache-2.0
"""Operators of the Kandinsky 5.0 family.

Each has one meaning, in `reference`, and at most one kernel for each kind of device.
"""

from ._library import build_info, kernels, load_extension, load_launchers
from .flops import register_with_the_counter
from .nabla import block_sparse_attention, select_blocks
from .norm import Rotary, gated_add_norm, modulated_norm, norm_rope, norm_rope_means
from .reference import block_means
from .selections import pack_selection, selection_density, transpose_selection, unpack_selection
from .vae import causal_conv3d, frame_causal_attention, group_affine, group_moments, group_norm_silu

load_launchers()
load_extension()
register_with_the_counter()

__version__ = "0.1.0"
__all__ = [
    "Rotary",
    "block_means",
    "block_sparse_attention",
    "build_info",
    "causal_conv3d",
    "frame_causal_attention",
    "gated_add_norm",
    "group_affine",
    "group_moments",
    "group_norm_silu",
    "kernels",
    "modulated_norm",
    "norm_rope",
    "norm_rope_means",
    "pack_selection",
    "select_blocks",
    "selection_density",
    "transpose_selection",
    "unpack_selection",
]
