# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: nothing is tuned in a user's process, every number has its reason here.

No GPU has run these yet: they are derived from sizes of registers and shared memory, which the
tests read off the compiled kernels.
"""

import math
from dataclasses import dataclass

import torch

# operators with a GPU result in benchmarks/results
VERIFIED: frozenset[str] = frozenset()
# operators whose CUDA C++ kernel a GPU has found right and faster than Triton's: they run it
CUDA_CPP: frozenset[str] = frozenset()
# operators for which PyTorch has a kernel of its own
PYTORCH = frozenset({"causal_conv3d"})
# operators of `PYTORCH` whose Triton kernel a GPU has found right and over 15 % faster: they run it
TRITON: frozenset[str] = frozenset()
# tokens of a block of NABLA, and of a tile of everything that works on tokens
TOKENS = 64
# scratch for the block lists of one launch of attention; longer lists are cut by heads
LIST_BYTES = 64 << 20
# blocks that `list_blocks` looks at at a time
LIST_CHUNK = 1024
# scratch for the block map: seven heads of Lite 10 s, one of Pro 10 s HD
MAP_BYTES = 64 << 20
# the largest bound of logits, in base 2, that replaces a maximum: shares from 2^-112 on stay normal
# numbers of fp32 and bf16, times values too
BOUND_LOG2 = 56.0
# blocks of a row of the map, which stays in registers
LONGEST_ROW = 16384
# the same for the CUDA C++ kernel, whose lanes hold 122 masses each, more than 10 s of HD need
LONGEST_COMPILED_ROW = 3904
# below this many rows a norm takes one row per program, so that small inputs still reach every
# multiprocessor
FEW_ROWS = 4096


# kernels whose eight warps do not lie along rows alone
ACROSS = frozenset(
    {
        "block_sparse_attention_backward_query-128-ragged",
        "block_sparse_attention_backward_key-128-ragged",
        "frame_causal_attention-512",
    }
)
# bytes of addresses that a kernel may keep on the stack
STACK_BYTES = {
    "block_sparse_attention_backward_key-128": 24,
    "block_sparse_attention_backward_key-64-ragged": 8,
}


@dataclass(frozen=True)
class Launch:
    """How Triton compiles a kernel: warps of a program, stages of its loads, whether tiles are read
    by tensor descriptors, and whether a head is split into two tiles of half its columns."""

    num_warps: int
    num_stages: int
    descriptors: bool = False
    split: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options. Fused multiply-add is asked for, because Triton 3.10 no longer
        does it by itself and results would change with the version."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def padded(width: int, least: int = 2) -> int:
    """The power of two that a kernel pads ``width`` to; Triton's matrix products take 16 at
    least."""
    return max(least, 1 << (width - 1).bit_length())


def has_large_tiles(capability: tuple[int, int]) -> bool:
    """Whether matrix products take their operands from shared memory (sm_90, sm_100): a product
    then occupies few registers, and one group of four warps takes 64 rows of any width."""
    return capability[0] in (9, 10)


def split_head(block: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether attention takes a head of `block` columns as two tiles of half of them.

    Triton puts the four warps of an mma.sync product along the longer side of its result. Sums of
    64 x 128 would lie along the head dim: every warp would need the softmax of all others, with 19
    barriers and 32 shuffles a turn on sm_89. Two sums of 64 x 64 keep a warp to its own rows.
    """
    return block > 64 and dtype.itemsize == 2 and not has_large_tiles(capability)


def attention(block: int, dtype: torch.dtype, capability: tuple[int, int], full: bool) -> Launch:
    """Four warps for 64 rows. A stage holds K and V: 2 * 64 * block elements, 16 KiB for D = 64 in
    bf16.

    Three stages cover the dependent load of the block's number and of its keys. Where a
    multiprocessor has 228 KiB (sm_90, sm_100) or 164 KiB (sm_80) they fit; sm_86, 89 and 120 have
    100 KiB, enough for three stages of 16 KiB with two programs resident, or two of 32. On sm_90
    queries and three stages of D = 64 are the 56 KiB that leave room for four programs, if nothing
    is beside them. Descriptors (TMA) put their barriers there, and take five BAR a turn instead of
    two: they are for sm_100, where a turn has six either way. Ragged blocks get two stages.
    """
    split = split_head(block, dtype, capability)
    if not full:
        wide = block > 64 and not split and not has_large_tiles(capability)
        warps = 8 if wide else 4
        stages = 2 if dtype.itemsize == 2 else 1
        return Launch(warps, stages, split=split)
    roomy = has_large_tiles(capability) or capability == (8, 0)
    stage = 2 * TOKENS * block * dtype.itemsize
    if stage <= 16 << 10 or (roomy and stage <= 32 << 10):
        stages = 3
    else:
        stages = 2 if stage <= 32 << 10 else 1
    descriptors = capability[0] == 10 and dtype.itemsize == 2
    return Launch(4, stages, descriptors, split)


def attention_backward(
    block: int, dtype: torch.dtype, capability: tuple[int, int], full: bool
) -> tuple[Launch, Launch]:
    """How the kernel of the gradient of queries is launched, which sums up one tile, and that of
    the gradients of keys and values, which sums up two.

    Registers decide. Split heads take four warps, which mma.sync leaves just enough registers for:
    the queries' kernel takes up to 255, that of keys and values keeps 8 to 24 bytes of addresses on
    the stack, which its loop reads on sm_120 alone. With the masks of ragged blocks it would keep
    nine numbers there in every turn (and on sm_120 the queries' kernel ten), so it is not split and
    takes eight warps. Eight warps are also
    for two of: no matrix unit of sm_90, D = 128 (250 of 255 registers on sm_90), masks.
    The queries' third stage leaves room for two more programs.
    Descriptors on sm_100 alone, as for `attention`; with them sm_120 spills. fp32 tiles are twice
    as large and get one stage.
    """
    wide = block > 64
    narrow = dtype.itemsize == 2
    hopper = has_large_tiles(capability)
    split = split_head(block, dtype, capability)
    descriptors = capability[0] == 10 and full and narrow
    stages = (2 if wide else 3) if narrow else 1
    queries_split = split and (full or capability[0] < 12)
    queries_warps = 8 if wide and not hopper and not queries_split else 4
    of_queries = Launch(queries_warps, stages, descriptors, queries_split)
    heavy = wide + (not full) + (not hopper) > 1
    keys_split = split and full
    warps = 8 if heavy and not keys_split else 4
    of_keys = Launch(warps, 2 if narrow else 1, descriptors, keys_split)
    return of_queries, of_keys


def norm_rows(rows: int) -> int:
    """Rows per program: eight pay for loading the modulation, three fp32 vectors for rows of 16-bit
    numbers."""
    return 8 if rows >= FEW_ROWS else 1


def norm(block: int) -> Launch:
    """About 16 elements per thread, so that a row and its modulation stay in registers."""
    return Launch(max(1, min(16, block // 512)), 1)


def norm_backward_rows(rows: int) -> int:
    """Rows per program: each leaves two or three fp32 rows of sums behind, which 64 rows make a
    twentieth of what is moved."""
    return max(1, min(64, rows // 512))


def norm_backward(block: int) -> Launch:
    """About eight elements per thread: beside the row and its gradient there are up to three sums
    and three modulations."""
    return Launch(max(1, min(16, block // 256)), 1)


@dataclass(frozen=True)
class RopeTile:
    """Tokens and heads that `norm_rope` and its gradient take at a time, and their launch."""

    tokens: int
    heads: int
    launch: Launch


def rope(heads: int, block: int) -> RopeTile:
    """Four warps, each with whole tokens: 32 lanes of 16 bytes are four heads of 64 or two of 128.

    A lane has 16 numbers of x, as many of its angles and as many sums: 72 registers on sm_90, where
    seven programs are resident with 28 KiB of x on their way.
    """
    together = math.gcd(heads, max(1, 256 // block))
    row = together * block
    warps = max(4, min(16, row // 512))
    tokens = max(1, min(TOKENS, 512 * warps // row))
    return RopeTile(tokens, together, Launch(warps, 1))


def row(block: int, stable: bool = False) -> Launch:
    """64 masses of 32 bits per lane. The bisection reads them some fourteen times; a row of 2,048
    is one warp, which adds them up without a barrier. Where the first of equal masses are dropped,
    their places are counted too: 32 per lane, or sm_100 and 120 spill."""
    masses = 1024 if stable else 2048
    return Launch(max(1, min(16, block // masses)), 1)


# of `list_blocks`, and of `join_moments` of the VAE
LIST = Launch(4, 1)

# ---- video VAE

# elements of which one program of `slab_moments` takes the statistics: 8 terms per fp32 sum, 48
# programs for one latent frame of 64 x 96 x 512
SLAB_ELEMENTS = 1 << 16
# elements at a time: two fp32 sums of 32 elements per thread
SLAB_TILE = 1 << 13
SLABS = Launch(8, 1)
# slabs that `join_moments` adds at a time
JOINED = 32
# elements of a tile of `group_norm_silu`: 32 per thread, and a pixel's channels are read whole
NORM_TILE = 1 << 12
NORMED = Launch(4, 1)


@dataclass(frozen=True)
class AttentionTile:
    """Rows of queries, keys at a time and depth of a product of `frame_causal_attention`, and its
    launch."""

    rows: int
    keys: int
    depth: int
    launch: Launch


def frame_attention(block: int, capability: tuple[int, int]) -> AttentionTile:
    """The sums of 64 rows of 512 take 128 registers of each of 256 threads; what is beside them
    must fit into the other 127.

    Compiled sizes for 512: queries stay in shared memory with two stages of keys and values, 136
    KiB (sm_80, sm_90), or sums stay in tensor memory and 64 KiB suffice (sm_100). With 99 KiB
    (sm_86, 89, 120) half the rows fit, at 98 KiB.
    """
    depth = min(64, block)
    if capability[0] == 10:
        return AttentionTile(64, 64, depth, Launch(8, 1))
    if capability[0] == 9 or capability == (8, 0):
        return AttentionTile(64, 32, depth, Launch(8, 2))
    return AttentionTile(32, 32, min(128, block), Launch(8, 2))


@dataclass(frozen=True)
class ConvolutionTile:
    """Pixels, channels and depth of a product of `causal_conv3d`, and its launch."""

    rows: int
    columns: int
    depth: int
    launch: Launch


def convolution(channels: int, out_channels: int, capability: tuple[int, int]) -> ConvolutionTile:
    """The larger a tile, the fewer bytes it reads out of L2 for its FLOPs, which is what limits a
    program without multicast.

    sm_90 and sm_100: 256 x 128 either way, 85 FLOPs for a byte; their sums take 128 registers of
    each of 256 threads or lie in tensor memory, and four stages 192 KiB. A depth of 64 is a row of
    128 bytes, which their matrix units read best. Elsewhere 128 x 128, 64 FLOPs for a byte, and a
    depth of 32: four stages, of which three are in memory, are 48 KiB, room for a second program
    where there are 99.
    """
    roomy = has_large_tiles(capability)
    depth = min(64 if roomy else 32, padded(channels, 16))
    columns = min(256 if roomy else 128, padded(out_channels, 16))
    rows = 256 if roomy and columns == 128 else 128
    return ConvolutionTile(rows, columns, depth, Launch(8, 4))


# What the binaries of Triton 3.9 are, which the tests hold them to. First the programs that a
# multiprocessor of each architecture holds, by registers, shared memory and warps; then the most
# barriers, exchanges between lanes, stores to shared memory and reads of the stack in a turn of the
# main loop, or in a kernel without one; then percents of the tensor cores' time, by the model of
# benchmarks/gpu/machine.py. `python -m tests.support.cubins --record` prints it.
BINARIES = """
                                                 80 86 89 90 120  BAR SHFL STS LDL  80 86 89 90 120
select_blocks-1464                               19  - 16 14   9    0   48   4   0   -  -  -  -   -
select_blocks-1464-stable                         8  -  6  6   6    7   76  12   0   -  -  -  -   -
select_blocks-3660                               10  -  8  8   7    2   48   4   0   -  -  -  -   -
select_blocks-3660-stable                         4  -  3  3   3    7   80  14   0   -  -  -  -   -
list_blocks                                      10  - 10  9   9    4   40   9   0   -  -  -  -   -
modulated_norm-1792                               8  -  8  8   8    4   14   2   0   -  -  -  -   -
gated_add_norm-1792                               6  -  6  6   6    4   14   2   0   -  -  -  -   -
norm_rope-64                                      7  -  8  7   8    0    6   0   0   -  -  -  -   -
modulated_norm_backward-1792                      4  -  4  4   3    8   32   4   0   -  -  -  -   -
gated_add_norm_backward-1792                      2  -  2  2   2    8   32   4   0   -  -  -  -   -
norm_rope_backward-64                             5  -  5  5   5    0   12   0   0   -  -  -  -   -
block_sparse_attention-64-bounded                 3  2  2  4   2    2    0   0   0  79 99 99 84  99
block_sparse_attention-64                         3  2  2  4   2    2    4   0   0  70 98 98 65  99
block_sparse_attention-64-ragged-bounded          2  2  2  3   2    2    0   0   0   -  -  -  -   -
block_sparse_attention-64-ragged                  2  2  2  3   2    2    4   0   0   -  -  -  -   -
block_sparse_attention_backward_query-64          3  2  2  3   2    2    0   0   0  74 99 99 85  99
block_sparse_attention_backward_key-64            2  2  2  2   2    2    0   0   0  58 95 95 51  93
block_sparse_attention_backward_query-64-ragged   2  2  2  3   2    2    0   0   0   -  -  -  -   -
block_sparse_attention_backward_key-64-ragged     1  1  1  2   1    2    0   0   0   -  -  -  -   -
modulated_norm-4096                               4  -  4  4   4    4   16   2   0   -  -  -  -   -
gated_add_norm-4096                               2  -  3  3   3    4   16   2   0   -  -  -  -   -
norm_rope-128                                     8  -  7  7   7    0    8   0   0   -  -  -  -   -
modulated_norm_backward-4096                      2  -  2  1   1    8   36   4   0   -  -  -  -   -
gated_add_norm_backward-4096                      1  -  1  1   1    8   36   4   0   -  -  -  -   -
norm_rope_backward-128                            5  -  5  5   5    0   16   0   0   -  -  -  -   -
block_sparse_attention-128-bounded                2  2  2  2   2    2    0   0   0  75 97 97 84  99
block_sparse_attention-128                        2  2  2  2   2    2    4   0   0  66 99 99 69  99
block_sparse_attention-128-ragged-bounded         2  2  2  2   2    2    0   0   0   -  -  -  -   -
block_sparse_attention-128-ragged                 2  2  2  2   2    2    4   0   0   -  -  -  -   -
block_sparse_attention_backward_query-128         2  1  1  2   1    2    0   0   0  68 88 88 70  91
block_sparse_attention_backward_key-128           2  1  1  2   1    2    0   0   3  70 89 89 81  90
block_sparse_attention_backward_query-128-ragged  2  1  1  2   1    3    0   0   0   -  -  -  -   -
block_sparse_attention_backward_key-128-ragged    1  1  1  1   1    5    0  16   0   -  -  -  -   -
slab_moments-128                                  2  -  2  2   2    0    0   0   0   -  -  -  -   -
group_norm_silu-128                               9  -  9  9   9    3    0   2   0   -  -  -  -   -
group_norm_silu-128-front                         9  -  9  9   9    3    0   2   0   -  -  -  -   -
slab_moments-256                                  2  -  2  2   2    0    0   0   0   -  -  -  -   -
group_norm_silu-256                               9  -  9  8   8    7    0   2   0   -  -  -  -   -
group_norm_silu-256-front                         9  -  9  9   9    7    0   2   0   -  -  -  -   -
slab_moments-512                                  2  -  2  2   2    0    0   0   0   -  -  -  -   -
group_norm_silu-512                              10  -  9  9   9    3    0   2   0   -  -  -  -   -
group_norm_silu-512-front                        10  -  9 10   9    3    0   2   0   -  -  -  -   -
join_moments                                     10  -  9  9   9    4   12   2   0   -  -  -  -   -
frame_causal_attention-512                        1  1  1  1   1   17   64  16   0   -  -  -  -   -
causal_conv3d-16-512-333                          1  1  1  1   2    2    0   0   0   -  -  -  -   -
causal_conv3d-512-512-333                         1  1  1  1   2    3    0   0   0   -  -  -  -   -
causal_conv3d-256-128-333                         1  1  1  1   2    3    0   0   0   -  -  -  -   -
causal_conv3d-256-256-222                         1  1  1  1   2    3    0   0   0   -  -  -  -   -
causal_conv3d-256-256-333-strided                 1  1  1  1   2    3    0   0   0   -  -  -  -   -
causal_conv3d-128-3-333                           4  3  3  3   3    3    0   0   0   -  -  -  -   -
"""
