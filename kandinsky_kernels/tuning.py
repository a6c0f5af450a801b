# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: nothing is tuned in a user's process, every number has its reason here.

No GPU has run these yet: they are derived from sizes of registers and shared memory, which the tests read off the compiled kernels.
"""

from dataclasses import dataclass

VERIFIED: frozenset[str] = frozenset()  # operators with a GPU result in benchmarks/results
CUDA_CPP: frozenset[str] = frozenset()  # operators whose CUDA C++ kernel a GPU has found right and faster than Triton's: they run it
TOKENS = 64  # per block of NABLA, and per tile of everything that works on tokens
LIST_BYTES = 64 << 20  # scratch for block lists per launch of attention; longer ones are cut by heads
LIST_CHUNK = 1024
MAP_BYTES = 64 << 20  # scratch for the block map: seven heads of Lite 10 s, one of Pro 10 s HD
LONGEST_ROW = 16384  # blocks; a row of the map stays in registers
LONGEST_COMPILED_ROW = 3904  # blocks; a lane of the CUDA C++ kernel holds 122 masses, more than 10 s of HD need
FEW_ROWS = 4096  # below this many rows a norm takes one row per program, so that small inputs still reach every multiprocessor


@dataclass(frozen=True)
class Launch:
    """num_warps and num_stages of a Triton launch."""

    num_warps: int
    num_stages: int


def padded(width: int, least: int = 2) -> int:
    """The power of two that a kernel pads ``width`` to; Triton's matrix products take 16 at least."""
    return max(least, 1 << (width - 1).bit_length())


def attention(block: int, bits: int, capability: tuple[int, int]) -> Launch:
    """Four warps are one Hopper warpgroup for 64 rows. A stage holds K and V: 2 * 64 * block * bits / 8 bytes, 16 KiB for D = 64 in bf16.

    Three stages cover the dependent load of the block's number and of its keys. Where an SM has 227 KiB (sm_90, sm_100) or 163 KiB
    (sm_80) they always fit; sm_86, 89 and 120 have 99 KiB, enough for three stages of 16 KiB with two programs resident, or two of 32.
    """
    roomy = capability[0] in (9, 10) or capability == (8, 0)
    stage = 2 * TOKENS * block * bits // 8
    return Launch(4, 3 if stage <= 16 << 10 or (roomy and stage <= 32 << 10) else 2 if stage <= 32 << 10 else 1)


def norm_rows(rows: int) -> int:
    """Rows per program: eight pay for loading the modulation, three fp32 vectors for rows of 16-bit numbers."""
    return 8 if rows >= FEW_ROWS else 1


def norm(block: int) -> Launch:
    """About 16 elements per thread, so that a row and its modulation stay in registers."""
    return Launch(max(1, min(16, block // 512)), 1)


def rope_heads(heads: int) -> int:
    """Heads per program: the angles, fp32, are as many bytes as four heads of 16-bit numbers; past seven nothing is gained."""
    return next(count for count in (7, 8, 6, 5, 4, 3, 2, 1) if heads % count == 0)


def rope(block: int) -> Launch:
    """About 32 elements of a tile of 64 tokens per thread."""
    return Launch(max(1, min(8, block // 16)), 1)


def row(block: int) -> Launch:
    """About 16 masses of 64 bits per thread; the bisection reads them some thirty times."""
    return Launch(max(1, min(16, block // 512)), 1)


LIST = Launch(4, 1)
