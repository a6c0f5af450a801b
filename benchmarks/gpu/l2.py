# SPDX-License-Identifier: Apache-2.0
"""How fast multiprocessors read out of L2: what `benchmarks/gpu/machine.py` assumes of a card,
measured."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import machine
from .card import FULL, Clock, Size, modelled_card

MIB = (8, 16, 32)
TILE = 4096  # elements of bf16 that a program reads at once: 8 KiB, as attention's tiles at D = 64
TURNS, PROGRAMS = 256, 8  # tiles that a program reads, and programs of a multiprocessor


def l2(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """Programs that read a small tensor over and over, past the L1 caches. The best rate becomes
    the ceiling ``l2_bytes``: bytes a clock and multiprocessor, at the model's clock."""
    if size is FULL[1]:
        return
    on_gpu = clock.device.type == "cuda"
    count = torch.cuda.get_device_properties(clock.device).multi_processor_count if on_gpu else 1
    card = modelled_card(clock.device)
    for mib in MIB:
        source = torch.zeros(mib << 19, device=clock.device, dtype=torch.bfloat16)
        times = clock.measure({"ours": reader(source, PROGRAMS * count)})
        moved = 2 * TILE * TURNS * PROGRAMS * count
        rate = moved / 1e6 / times["ours"]  # GB/s
        per_clock = rate / count / (card.ghz if card else 1.0)
        roof["l2_bytes"] = max(per_clock, roof.get("l2_bytes", 0.0))
        yield {
            "op": "L2 to multiprocessors",
            "size": f"{mib} MiB",
            "ms": times,
            "gb_s": rate,
            "bytes_a_clock": per_clock,
            "modelled_bytes_a_clock": machine.L2_BYTES,
        }


def reader(source: Tensor, programs: int):
    """A call by which so many programs read; on a CPU a sum stands in for it."""
    if source.device.type != "cuda":
        return source.sum
    from .l2_kernel import read_tiles

    sums = source.new_empty(programs, dtype=torch.float32)
    tiles = source.numel() // TILE
    return lambda: read_tiles[(programs,)](source, sums, tiles, TURNS, TILE, num_warps=4)
