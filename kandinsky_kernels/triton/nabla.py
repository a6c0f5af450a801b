# SPDX-License-Identifier: Apache-2.0
"""NABLA on GPUs: the choice of blocks, one program per row of the block map; and attention, one
program per block of queries.

Locals: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values.
"""

import triton
import triton.language as tl


@triton.jit
def _near(i_row, o_block, Y, X, near_t, near_y, near_x):
    """Whether blocks lie in the local window around block i_row of a (T, Y, X) grid of blocks."""
    b_t = tl.abs(o_block // (Y * X) - i_row // (Y * X)) <= near_t
    b_y = tl.abs(o_block // X % Y - i_row // X % Y) <= near_y
    return b_t & b_y & (tl.abs(o_block % X - i_row % X) <= near_x)


@triton.jit
def select_blocks(
    p_logit,
    p_selection,
    first,
    N,
    words,
    row_head,
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
    """fp32 logits [heads, rows, N], before the division by root = sqrt(D) -> packed rows `first` on
    of [heads, N, words].

    Masses are integers of 32 bits after the point, so their sums are exact and the lightest kept
    mass is found by bisection, without sorting. The share to drop is the sum of three fp32 numbers,
    because Triton passes no fp64. Grid (rows, heads); BLOCK >= N.
    """
    i_row, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_block = tl.arange(0, BLOCK)
    m_block = o_block < N
    b_logit = (
        tl.load(
            p_logit + i_head * row_head + i_row.to(tl.int64) * N + o_block, m_block, -float("inf")
        )
        / root
    )
    top = tl.max(b_logit, 0)
    usual = (tl.max((b_logit != b_logit).to(tl.int32), 0) == 0) & (tl.abs(top) < float("inf"))
    b_mass = tl.exp(b_logit - top) * 4294967296.0
    # to an integer, half to even
    b_mass = tl.where(b_mass < 8388608.0, b_mass + 8388608.0 - 8388608.0, b_mass)
    b_mass = tl.where(m_block & usual, b_mass, 0.0).to(tl.int64)
    drop = (
        tl.full([], drop_high, tl.float64)
        + tl.full([], drop_middle, tl.float64)
        + tl.full([], drop_low, tl.float64)
    )
    target = drop * tl.sum(b_mass, 0).to(tl.float64)
    low, high = tl.zeros([], tl.int64), tl.max(b_mass, 0)
    while low < high:  # the smallest mass up to which they sum to the target
        middle = (low + high) // 2
        reached = tl.sum(tl.where(b_mass <= middle, b_mass, 0), 0).to(tl.float64) >= target
        low, high = tl.where(reached, low, middle + 1), tl.where(reached, middle, high)
    b_keep = b_mass >= low
    if STABLE:
        b_below = (
            tl.sum(tl.where(b_mass < low, b_mass, 0), 0)
            + tl.cumsum((b_mass == low).to(tl.int64), 0) * low
        )
        b_keep = (b_mass > low) | ((b_mass == low) & (b_below.to(tl.float64) >= target))
    if WINDOW:
        b_keep = b_keep | _near(first + i_row, o_block, Y, X, near_t, near_y, near_x)
    b_bit = (b_keep & m_block).to(tl.int32) << (o_block % 32)
    b_word = tl.sum(tl.reshape(b_bit, [BLOCK // 32, 32]), 1)
    o_word = tl.arange(0, BLOCK // 32)
    tl.store(
        p_selection + i_head * selection_head + (first + i_row).to(tl.int64) * words + o_word,
        b_word,
        o_word < words,
    )


@triton.jit
def list_blocks(p_selection, p_list, p_count, N, words, CHUNK: tl.constexpr):
    """Packed rows int32 [R, words] -> kept blocks in ascending order, int16 (read as unsigned) [R,
    N], and their number int32 [R].

    Grid (R,). A list beyond its count is not written.
    """
    i_row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, N, CHUNK):
        o_block = start + tl.arange(0, CHUNK)
        m_block = o_block < N
        b_word = tl.load(p_selection + i_row * words + o_block // 32, m_block, 0)
        b_keep = (b_word >> (o_block % 32)) & 1
        o_place = count + tl.cumsum(b_keep, 0) - 1
        tl.store(p_list + i_row * N + o_place, o_block.to(tl.int16), m_block & (b_keep == 1))
        count += tl.sum(b_keep, 0)
    tl.store(p_count + i_row, count)


@triton.jit
def _tile(
    p_rows,
    start,
    token,
    o_t,
    o_d,
    m_rows,
    TMA: tl.constexpr,
    i_batch,
    i_head,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows start.. of one (batch, head) as [TOKENS, BLOCK]: by the descriptor p_rows, or from
    p_rows at their first row."""
    if TMA:
        return p_rows.load([i_batch, start, i_head, 0]).reshape([TOKENS, BLOCK])
    else:  # nothing behind an if that is decided at compile time is left out
        return tl.load(
            p_rows + (start.to(tl.int64) + o_t[:, None]) * token + o_d[None], m_rows, 0.0
        )


@triton.jit
def _tokens(p_offsets, i_block, S):
    """A block's first token and number of tokens, inside of the S that there are: nobody waited for
    the offsets to check them."""
    first = tl.minimum(tl.maximum(tl.load(p_offsets + i_block), 0), S)
    return first, tl.minimum(tl.load(p_offsets + i_block + 1), S) - first


@triton.jit
def block_sparse_attention(
    p_query,
    p_key,
    p_value,
    p_list,
    p_count,
    p_offsets,
    p_out,
    p_lse,
    first,
    S,
    H,
    N,
    D,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    scale_log2,
    bound_log2,
    FULL: tl.constexpr,
    BOUNDED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """softmax(scale query key^T) value over the listed blocks of keys, in base 2; out and natural
    log-sum-exp.

    Grid (N, pairs): program (i, j) owns query block i of the j-th (batch, head) from `first` on.
    FULL: every block has TOKENS tokens.
    BOUNDED: no logit exceeds bound_log2, which then stands for every row's maximum: nothing waits
    for a maximum and nothing is rescaled. TMA: key and value are tensor descriptors. BLOCK >= D, a
    power of two.
    """
    i_block, i_pair = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = (first + i_pair) // H, (first + i_pair) % H
    i_row = i_pair.to(tl.int64) * N + i_block
    o_t, o_d = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    m_d = (o_d < D)[None]
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _tokens(p_offsets, i_block, S)
    o_query = (start + o_t).to(tl.int64)
    m_query = (o_t < length)[:, None] & m_d
    p_q = p_query + i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    b_query = tl.load(p_q + o_query[:, None] * q_token + o_d[None], m_query, 0.0)
    if not TMA:
        p_key += i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
        p_value += i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head

    b_max = tl.full([TOKENS], bound_log2 if BOUNDED else -float("inf"), tl.float32)
    # eight parts of a row's sum: added up across threads once, at the end
    b_sums = tl.zeros([TOKENS, 8], tl.float32)
    b_out = tl.zeros([TOKENS, BLOCK], tl.float32)
    count = tl.load(p_count + i_row)
    p_list += i_row * N
    for i in range(count):
        i_key = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first, m_key = i_key * TOKENS, m_d
        if not FULL:
            i_first, i_length = _tokens(p_offsets, i_key, S)
            b_inside = o_t < i_length
            m_key = b_inside[:, None] & m_d
        b_key = _tile(p_key, i_first, k_token, o_t, o_d, m_key, TMA, i_batch, i_head, TOKENS, BLOCK)
        b_logit = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [TOKENS, TOKENS]
        if not FULL:
            b_logit = tl.where(b_inside[None], b_logit, -float("inf"))
        if BOUNDED:
            b_share = tl.exp2(b_logit * scale_log2 - bound_log2)
        else:
            b_max, b_old = tl.maximum(b_max, tl.max(b_logit, 1) * scale_log2), b_max
            b_zero = tl.where(b_max == -float("inf"), 0.0, b_max)  # -inf - -inf is NaN
            b_decay = tl.exp2(b_old - b_zero)
            b_share = tl.exp2(b_logit * scale_log2 - b_zero[:, None])
            b_sums, b_out = b_sums * b_decay[:, None], b_out * b_decay[:, None]
        b_value = _tile(
            p_value, i_first, v_token, o_t, o_d, m_key, TMA, i_batch, i_head, TOKENS, BLOCK
        )
        b_sums += tl.sum(tl.reshape(b_share, [TOKENS, TOKENS // 8, 8]), 1)
        b_out = tl.dot(b_share.to(b_value.dtype), b_value, b_out, input_precision=PRECISION)

    b_sum = tl.sum(b_sums, 1)
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    if count == 0:
        b_sum += 1.0  # zeros, and -inf beside them
    b_out = b_out / b_sum[:, None]
    p_o = p_out + ((i_batch * S + o_query[:, None]) * H + i_head) * D + o_d[None]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), m_query)
    tl.store(p_lse + (i_batch.to(tl.int64) * H + i_head) * S + o_query, b_lse, o_t < length)


@triton.jit
def block_sparse_attention_backward_query(
    p_query,
    p_key,
    p_value,
    p_out,
    p_grad_out,
    p_lse,
    p_grad_lse,
    p_list,
    p_count,
    p_offsets,
    p_common,
    p_grad_query,
    first,
    S,
    H,
    N,
    D,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    scale,
    scale_log2,
    FULL: tl.constexpr,
    TMA: tl.constexpr,
    LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradient of a block of queries; and of every row of it the dot product of out and its
    gradient, less that of lse, for the keys.

    Grid, lists, FULL and TMA as in `block_sparse_attention`; out, its gradient and what is written
    are contiguous. LSE: lse has a gradient.
    """
    i_block, i_pair = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = (first + i_pair) // H, (first + i_pair) % H
    o_t, o_d = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    m_d = (o_d < D)[None]
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _tokens(p_offsets, i_block, S)
    o_query, m_token = (start + o_t).to(tl.int64), o_t < length
    m_query = m_token[:, None] & m_d
    p_q = p_query + i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    b_query = tl.load(p_q + o_query[:, None] * q_token + o_d[None], m_query, 0.0)
    o_row = ((i_batch * S + o_query[:, None]) * H + i_head) * D + o_d[None]
    b_grad_out = tl.load(p_grad_out + o_row, m_query, 0.0)
    b_common = tl.sum(
        tl.load(p_out + o_row, m_query, 0.0).to(tl.float32) * b_grad_out.to(tl.float32), 1
    )
    o_sum = (i_batch.to(tl.int64) * H + i_head) * S + o_query
    if LSE:
        b_common -= tl.load(p_grad_lse + o_sum, m_token, 0.0)
    tl.store(p_common + o_sum, b_common, m_token)
    b_lse = tl.load(p_lse + o_sum, m_token, 0.0) * 1.4426950408889634
    if not TMA:
        p_key += i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
        p_value += i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head

    b_grad = tl.zeros([TOKENS, BLOCK], tl.float32)
    i_row = i_pair.to(tl.int64) * N + i_block
    p_list += i_row * N
    for i in range(tl.load(p_count + i_row)):
        i_key = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first, m_key = i_key * TOKENS, m_d
        if not FULL:
            i_first, i_length = _tokens(p_offsets, i_key, S)
            b_inside = o_t < i_length
            m_key = b_inside[:, None] & m_d
        b_key = _tile(p_key, i_first, k_token, o_t, o_d, m_key, TMA, i_batch, i_head, TOKENS, BLOCK)
        b_value = _tile(
            p_value, i_first, v_token, o_t, o_d, m_key, TMA, i_batch, i_head, TOKENS, BLOCK
        )
        b_logit = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [queries, keys]
        b_share = tl.exp2(b_logit * scale_log2 - b_lse[:, None])
        if not FULL:
            b_share = tl.where(b_inside[None], b_share, 0.0)
        b_change = b_share * (
            tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION) - b_common[:, None]
        )
        b_grad = tl.dot(b_change.to(b_key.dtype), b_key, b_grad, input_precision=PRECISION)
    tl.store(p_grad_query + o_row, (b_grad * scale).to(p_grad_query.dtype.element_ty), m_query)


@triton.jit
def block_sparse_attention_backward_key(
    p_query,
    p_key,
    p_value,
    p_grad_out,
    p_lse,
    p_common,
    p_list,
    p_count,
    p_offsets,
    p_grad_key,
    p_grad_value,
    first,
    S,
    H,
    N,
    D,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    scale,
    scale_log2,
    FULL: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradients of a block of keys and its values, over the listed blocks of queries, those
    that keep it.

    Grid and the rest as above, with keys and queries in each other's places; TMA: query and
    grad_out are tensor descriptors.
    """
    i_block, i_pair = tl.program_id(0), tl.program_id(1)
    i_batch, i_head = (first + i_pair) // H, (first + i_pair) % H
    o_t, o_d = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    m_d = (o_d < D)[None]
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _tokens(p_offsets, i_block, S)
    o_key = (start + o_t).to(tl.int64)[:, None]
    m_key = (o_t < length)[:, None] & m_d
    p_k = p_key + i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
    p_v = p_value + i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head
    b_key = tl.load(p_k + o_key * k_token + o_d[None], m_key, 0.0)
    b_value = tl.load(p_v + o_key * v_token + o_d[None], m_key, 0.0)
    o_sums = (i_batch.to(tl.int64) * H + i_head) * S
    if not TMA:
        p_query += i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
        p_grad_out += (i_batch.to(tl.int64) * S * H + i_head) * D

    b_grad_key, b_grad_value = (
        tl.zeros([TOKENS, BLOCK], tl.float32),
        tl.zeros([TOKENS, BLOCK], tl.float32),
    )
    i_row = i_pair.to(tl.int64) * N + i_block
    p_list += i_row * N
    for i in range(tl.load(p_count + i_row)):
        i_query = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first, m_token, m_query = i_query * TOKENS, o_t < TOKENS, m_d
        if not FULL:
            i_first, i_length = _tokens(p_offsets, i_query, S)
            m_token = o_t < i_length
            m_query = m_token[:, None] & m_d
        b_query = _tile(
            p_query, i_first, q_token, o_t, o_d, m_query, TMA, i_batch, i_head, TOKENS, BLOCK
        )
        b_grad_out = _tile(
            p_grad_out, i_first, H * D, o_t, o_d, m_query, TMA, i_batch, i_head, TOKENS, BLOCK
        )
        b_lse = tl.load(p_lse + o_sums + i_first + o_t, m_token, 0.0) * 1.4426950408889634
        # rows that are not there add zeros, as their tensors are zero
        b_common = tl.load(p_common + o_sums + i_first + o_t, m_token, 0.0)
        # [keys, queries]
        b_share = tl.exp2(
            tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale_log2 - b_lse[None]
        )
        b_grad_value = tl.dot(
            b_share.to(b_grad_out.dtype), b_grad_out, b_grad_value, input_precision=PRECISION
        )
        b_change = b_share * (
            tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION) - b_common[None]
        )
        b_grad_key = tl.dot(
            b_change.to(b_query.dtype), b_query, b_grad_key, input_precision=PRECISION
        )
    o_row = ((i_batch * S + o_key) * H + i_head) * D + o_d[None]
    tl.store(p_grad_key + o_row, (b_grad_key * scale).to(p_grad_key.dtype.element_ty), m_key)
    tl.store(p_grad_value + o_row, b_grad_value.to(p_grad_value.dtype.element_ty), m_key)
