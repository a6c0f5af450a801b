# SPDX-License-Identifier: Apache-2.0
"""Dense attention in Triton as its tutorials write it, by which the model of
`benchmarks/gpu/machine.py` is held against a published measurement."""

import triton
import triton.language as tl


@triton.jit
def dense_attention(
    p_query,
    p_key,
    p_value,
    p_out,
    S,
    x_head,
    scale_log2,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """softmax(query key^T) value of [heads, S, WIDTH], whose heads are `x_head` elements apart.

    Grid (S / ROWS, heads); S is a multiple of ROWS and of KEYS."""
    first = tl.program_id(1).to(tl.int64) * x_head
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_key = tl.arange(0, KEYS)
    o_d = tl.arange(0, WIDTH)
    b_query = tl.load(p_query + first + o_row[:, None] * WIDTH + o_d[None])
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, S, KEYS):
        o_tile = (start + o_key)[:, None] * WIDTH + o_d[None]
        b_key = tl.load(p_key + first + o_tile)
        b_logit = tl.dot(b_query, tl.trans(b_key))
        b_old = b_max
        b_max = tl.maximum(b_max, tl.max(b_logit, 1) * scale_log2)
        b_share = tl.exp2(b_logit * scale_log2 - b_max[:, None])
        b_decay = tl.exp2(b_old - b_max)
        b_sum = b_sum * b_decay + tl.sum(b_share, 1)
        b_value = tl.load(p_value + first + o_tile)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_share.to(b_value.dtype), b_value, b_out)
    p_rows = p_out + first + o_row[:, None] * WIDTH + o_d[None]
    tl.store(p_rows, (b_out / b_sum[:, None]).to(p_out.dtype.element_ty))
