# SPDX-License-Identifier: Apache-2.0
"""Packed selections: which of N blocks of keys each block of queries keeps, one bit for each.

A row of a selection has W = ceil(N / 32) words of int32, and bit j % 32 of word j // 32 says that
block j is kept. The bits beyond N mean nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks


def pack_selection(keep: Tensor) -> Tensor:
    """bool [..., N] -> int32 [..., W]: bit j % 32 of word j // 32 says that block j is kept.

    Raises TypeError on other dtypes, ValueError without a dimension.
    """
    checks.pack_selection(keep)
    N = keep.shape[-1]
    W = -(-N // 32)
    padded = F.pad(keep, (0, 32 * W - N))  # [..., 32 W]
    bits = padded.unflatten(-1, (W, 32))  # [..., W, 32]
    ones = torch.ones(32, dtype=torch.int64, device=keep.device)
    weights = ones << torch.arange(32, device=keep.device)
    return (bits * weights).sum(-1).to(torch.int32)  # [..., W]; bit 31 becomes the sign


def unpack_selection(selection: Tensor, blocks: int) -> Tensor:
    """int32 [..., W] -> bool [..., blocks]: which blocks are kept.

    Raises ValueError where W is not ceil(blocks / 32), TypeError on other dtypes.
    """
    checks.unpack_selection(selection, blocks)
    places = torch.arange(32, device=selection.device, dtype=torch.int32)
    bits = (selection[..., None] >> places) & 1  # [..., W, 32]
    return bits.flatten(-2)[..., :blocks].bool()


def selection_density(selection: Tensor, blocks: int) -> float:
    """The kept blocks of a packed selection over all of them: a number from 0 to 1.

    Args:
        selection: int32 [..., N, W].
        blocks: N.

    Raises:
        ValueError: where the selection has another number of blocks.
        TypeError: on other dtypes.
    """
    checks.selection_density(selection, blocks)
    keep = unpack_selection(selection, blocks)  # [..., N, N]
    return keep.double().mean().item()


# Tiles of 32 x 32 bits are transposed by swapping their off-diagonal quarters, then those of their
# quarters, and so on (Warren, Hacker's Delight, 7-3). Each mask has ones for the columns of the low
# halves.
_SWAPS = (
    (16, 0x0000FFFF),
    (8, 0x00FF00FF),
    (4, 0x0F0F0F0F),
    (2, 0x33333333),
    (1, 0x55555555),
)


def transpose_selection(selection: Tensor) -> Tensor:
    """Which blocks of queries keep each block of keys.

    Bit i of row j of the result is bit j of row i of the selection. The map of N x N blocks never
    exists.

    Args:
        selection: packed, int32 [..., N, W], on any device.

    Returns:
        int32 [..., N, W], contiguous.

    Raises:
        ValueError: on other shapes and dtypes.
    """
    checks.transpose_selection(selection)
    N, W = selection.shape[-2:]
    padded = F.pad(selection, (0, 0, 0, 32 * W - N))  # [..., 32 W, W]
    bits = padded.unflatten(-2, (W, 32))  # [..., tile of rows, 32, word]
    for width, mask in _SWAPS:
        pairs = bits.unflatten(-2, (-1, 2, width))  # [..., tile, 32 / (2 width), 2, width, word]
        low, high = pairs.unbind(-3)  # rows that lie `width` apart
        swapped = ((low >> width) ^ high) & mask
        low = low ^ (swapped << width)
        high = high ^ swapped
        bits = torch.stack((low, high), -3)
        bits = bits.flatten(-4, -2)  # [..., tile of rows, 32, word]
    bits = bits.transpose(-3, -1)  # [..., word, 32, tile of rows]
    rows = bits.flatten(-3, -2)  # [..., 32 W, W]
    return rows[..., :N, :].contiguous()
