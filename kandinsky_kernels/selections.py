# SPDX-License-Identifier: Apache-2.0
"""Packed selections: which of N blocks of keys each block of queries keeps, one bit for each.

A row of a selection has W = ceil(N / 32) words of int32, and bit j % 32 of word j // 32 says that
block j is kept. Operators do not look at the bits beyond N; what packs selections leaves them 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from ._memory import explained


@explained("pack_selection")
def pack_selection(keep: Tensor) -> Tensor:
    """bool [..., N] -> int32 [..., W]: bit j % 32 of word j // 32 says that block j is kept.

    Raises TypeError on other dtypes, ValueError without a dimension.
    """
    _check_packing(keep)
    N = keep.shape[-1]
    W = -(-N // 32)
    padded = F.pad(keep, (0, 32 * W - N))  # [..., 32 W]
    bits = padded.unflatten(-1, (W, 32))  # [..., W, 32]
    ones = torch.ones(32, dtype=torch.int64, device=keep.device)
    weights = ones << torch.arange(32, device=keep.device)
    return (bits * weights).sum(-1).to(torch.int32)  # [..., W]; bit 31 becomes the sign


@explained("unpack_selection")
def unpack_selection(selection: Tensor, blocks: int) -> Tensor:
    """int32 [..., W] -> bool [..., blocks]: which blocks are kept.

    Raises ValueError where W is not ceil(blocks / 32) and where a block beyond ``blocks`` is kept,
    for which nobody looks on a GPU; TypeError on other dtypes.
    """
    _check_unpacking(selection, blocks)
    return unpacked(selection, blocks)


def unpacked(selection: Tensor, blocks: int) -> Tensor:
    """`unpack_selection` of a selection that was checked, whatever the bits beyond its blocks."""
    places = torch.arange(32, device=selection.device, dtype=torch.int32)
    bits = (selection[..., None] >> places) & 1  # [..., W, 32]
    return bits.flatten(-2)[..., :blocks].bool()


@explained("selection_density")
def selection_density(selection: Tensor, blocks: int) -> float:
    """The kept blocks of a packed selection over all of them: a number from 0 to 1.

    Args:
        selection: int32 [..., N, W].
        blocks: N.

    Raises:
        ValueError: where the selection has another number of blocks, or keeps one beyond them.
        TypeError: on other dtypes.
    """
    _check_density(selection, blocks)
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


@explained("transpose_selection")
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
    _check_transposing(selection)
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


# ---- what is refused


def _check_unpacking(selection: Tensor, blocks: int) -> None:
    """There are as many words as ``blocks`` bits need, and no block beyond them is kept.

    The latter is not looked for on a GPU, which would have to be waited for.
    """
    fit = selection.dim() > 0 and blocks >= 0
    if not fit or selection.shape[-1] != checks.words(blocks):
        raise ValueError(
            f"selection must have ceil(N / 32) words for N = {blocks} blocks in its last "
            f"dimension, got {list(selection.shape)}."
        )
    checks.dtype("selection", selection, torch.int32)
    read = blocks % 32 and checks.known(selection) and selection.device.type == "cpu"
    if read and (selection[..., -1] >> blocks % 32).any():
        raise ValueError(
            f"selection must keep no block beyond N = {blocks}; give the number of blocks it was "
            "made for."
        )


def _check_packing(keep: Tensor) -> None:
    if not keep.dim():
        raise ValueError("keep must have shape [..., N], got []; add the missing dimension.")
    if keep.dtype != torch.bool:
        raise TypeError(
            f"keep must be bool, got {checks.spelled(keep.dtype)}; compare it with something first."
        )


def _check_density(selection: Tensor, blocks: int) -> None:
    """There is a row for each of ``blocks`` blocks of queries."""
    if selection.dim() < 2 or selection.shape[-2] != blocks:
        raise ValueError(
            f"selection must have a row for each of N = {blocks} blocks, got "
            f"{list(selection.shape)}; give the number of blocks it was made for."
        )


def _check_transposing(selection: Tensor) -> None:
    """The selection is that of N blocks of queries among N blocks of keys."""
    N = selection.shape[-2] if selection.dim() > 1 else 0
    fit = selection.dim() > 1 and selection.shape[-1] == checks.words(N)
    if selection.dtype != torch.int32 or not fit:
        kind = checks.spelled(selection.dtype)
        raise ValueError(
            f"selection must be int32 [..., N, ceil(N / 32)], got {kind} "
            f"{list(selection.shape)}; make it with select_blocks or pack_selection."
        )
