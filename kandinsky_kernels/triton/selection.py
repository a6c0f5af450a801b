# SPDX-License-Identifier: Apache-2.0
"""NABLA's choice of blocks on GPUs, one program per row of the block map.

Locals: i_ an index, o_ offsets, p_ a pointer, b_ a block of values. The number `first` of a
launch's first row is not specialised: it differs from launch to launch, and zero and one would each
make another binary.
"""

import triton
import triton.language as tl


@triton.jit
def _over(o_number, divisor):
    """o_number // divisor, both below 2^15, by one multiplication: (2 n + 1) / (2 d) rounds down to
    the same number and is further than an error of 2^-17 from the next one."""
    reciprocal = tl.full([], 1 << 31, tl.uint32) // divisor.to(tl.uint32)
    return tl.umulhi((2 * o_number + 1).to(tl.uint32), reciprocal).to(tl.int32)


@triton.jit
def _around(o_place, i_place, near):
    """Whether places are at most `near` away from i_place; below its lowest number an unsigned one
    is large."""
    return (o_place - (i_place - near)).to(tl.uint32) <= (2 * near).to(tl.uint32)


@triton.jit
def _near(i_row, o_block, Y, X, near_t, near_y, near_x):
    """Whether blocks lie in the local window around block i_row of a (T, Y, X) grid of blocks."""
    o_line = _over(o_block, X)
    o_t = _over(o_block, Y * X)
    i_line = i_row // X
    i_t = i_line // Y
    b_t = _around(o_t, i_t, near_t)
    b_y = _around(o_line - o_t * Y, i_line - i_t * Y, near_y)
    b_x = _around(o_block - o_line * X, i_row - i_line * X, near_x)
    return b_t & b_y & b_x


@triton.jit
def _mass(bits):
    """The whole part, int64, of the fp32 number that has these bits."""
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def _sum_up_to(b_mass, limit):
    """The exact sum, int64, of the masses that are at most `limit`."""
    return tl.sum(tl.where(b_mass <= limit, b_mass, 0).to(tl.int64), 0)


@triton.jit
def _lightest(b_mass, total, target, N):
    """The lightest of N masses up to which they sum to `target`, as int64; 0 where that is 0.

    Bisects the bits of fp32 numbers, which order like the numbers, from 0 to 2^32, until one mass
    alone is between the limits. Between them each weighs the lower one at least, so that the
    difference of the sums up to either tells when that is so: it is the mass itself. N masses
    that are all lighter than an N-th of the target do not reach it: that is the first limit.
    """
    low = tl.zeros([], tl.int32)
    high = tl.where(target > 0, 0x4F800000, 0)
    below = tl.zeros([], tl.int64)  # sum of the masses below `low`
    reached = total  # sum of the masses up to `high`
    middle = (target.to(tl.float32) / N).to(tl.int32, bitcast=True) - 1
    middle = tl.maximum(middle, 0)
    while (low < high) & (reached - below >= 2 * _mass(low)):
        some = _sum_up_to(b_mass, _mass(middle).to(tl.uint32))
        enough = some >= target
        high = tl.where(enough, middle, high)
        reached = tl.where(enough, some, reached)
        low = tl.where(enough, low, middle + 1)
        below = tl.where(enough, below, some)
        middle = low + (high - low) // 2
    return tl.where(low < high, reached - below, _mass(high))


@triton.jit(do_not_specialize=["first"])
def select_blocks(
    p_logit,
    p_selection,
    first,
    N,
    words,
    logit_head,
    logit_row,
    selection_head,
    root,
    drop_high,
    drop_middle,
    drop_low,
    Y,
    X,
    near_t,
    near_y,
    near_x,
    WINDOW: tl.constexpr,
    STABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fp32 logits [heads, rows, logit_row], before the division by root = sqrt(D) and -inf from N
    on -> packed rows `first` on of [heads, N, words].

    Masses are integers of 32 bits after the point, so their sums are exact and the lightest kept
    mass is found by bisection, without sorting. The share to drop is the sum of three fp32 numbers,
    because Triton passes no fp64. Grid (rows, heads); BLOCK >= logit_row.
    """
    i_row, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_block = tl.arange(0, BLOCK)
    p_row = p_logit + i_head * logit_head + i_row.to(tl.int64) * logit_row
    b_logit = tl.load(p_row + o_block, o_block < logit_row, -float("inf")) / root
    top = tl.max(b_logit, 0)
    usual = (tl.max((b_logit != b_logit).to(tl.int32), 0) == 0) & (tl.abs(top) < float("inf"))
    b_mass = tl.exp(b_logit - top) * 4294967296.0
    # to an integer, half to even
    b_mass = tl.where(b_mass < 8388608.0, b_mass + 8388608.0 - 8388608.0, b_mass)
    # 2^32 - 1 stands for 2^32, the heaviest: the next lighter mass is 2^32 - 256
    b_more = tl.where(b_mass == 4294967296.0, 255, 0).to(tl.uint32)
    b_mass = tl.minimum(b_mass, 4294967040.0).to(tl.uint32) + b_more
    heaviest = tl.sum((b_mass == 4294967295).to(tl.int32), 0).to(tl.int64)
    total = tl.sum(b_mass.to(tl.int64), 0) + heaviest
    drop = (
        tl.full([], drop_high, tl.float64)
        + tl.full([], drop_middle, tl.float64)
        + tl.full([], drop_low, tl.float64)
    )
    target = tl.ceil(drop * total.to(tl.float64)).to(tl.int64)
    target = tl.where(usual, target, 0)  # everything is kept
    least = _lightest(b_mass, total, target, N)  # int64
    b_least = tl.minimum(least, 4294967295).to(tl.uint32)
    b_keep = b_mass >= b_least
    if STABLE:
        below = tl.sum(tl.where(b_mass < b_least, b_mass, 0).to(tl.int64), 0)
        dropped = (target - 1 - below) // tl.maximum(least, 1)  # of the equal ones
        b_equal = b_mass == b_least
        b_place = tl.cumsum(b_equal.to(tl.int32), 0) - 1
        b_keep = (b_mass > b_least) | (b_equal & (b_place >= dropped))
    if WINDOW:
        b_keep = b_keep | _near(first + i_row, o_block, Y, X, near_t, near_y, near_x)
    b_word = tl.sum(tl.reshape(b_keep.to(tl.int32) << (o_block % 32), [BLOCK // 32, 32]), 1)
    o_word = tl.arange(0, BLOCK // 32)
    b_word = tl.where(o_word == N // 32, b_word & ((1 << (N % 32)) - 1), b_word)
    p_selection += i_head * selection_head + (first + i_row).to(tl.int64) * words
    tl.store(p_selection + o_word, b_word, o_word < words)
