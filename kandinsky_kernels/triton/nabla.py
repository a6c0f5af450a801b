# SPDX-License-Identifier: Apache-2.0
"""NABLA's attention on GPUs over the blocks that `selection` chose, one program per block of
queries.

Locals: i_ an index, o_ offsets, m_ a mask, p_ a pointer, b_ a block of values. The number `first`
of a launch's first head is not specialised: it differs from launch to launch, and zero and one
would each make another binary.
"""

import triton
import triton.language as tl


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
def _block_tokens(p_offsets, i_block, S):
    """A block's first token and its number of tokens.

    Both are held inside of the S tokens that there are, because nobody has waited for the GPU to
    check the offsets.
    """
    start = tl.minimum(tl.maximum(tl.load(p_offsets + i_block), 0), S)
    return start, tl.minimum(tl.load(p_offsets + i_block + 1), S) - start


@triton.jit
def _tile(
    p_rows,
    start,
    column,
    token,
    D,
    m_token,
    i_batch,
    i_head,
    TMA: tl.constexpr,
    FULL: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows from `start` and columns from `column` on of one (batch, head) of a tensor
    [B, S, H, D], as [TOKENS, WIDTH]; zeros where there is nothing.

    p_rows is a tensor descriptor (TMA), or points to the first row of that (batch, head), and
    `token` is the stride between rows. m_token [TOKENS] is read unless the block is FULL.
    """
    if TMA:
        return p_rows.load([i_batch, start, i_head, column]).reshape([TOKENS, WIDTH])
    else:  # without this branch Triton would compile what follows for descriptors as well
        o_t = tl.arange(0, TOKENS)
        o_d = column + tl.arange(0, WIDTH)
        m_tile = (o_d < D)[None]
        if not FULL:
            m_tile = m_token[:, None] & m_tile
        o_row = start.to(tl.int64) + o_t[:, None]
        return tl.load(p_rows + o_row * token + o_d[None], m_tile, 0.0)


@triton.jit
def _tiles(
    p_rows,
    start,
    token,
    D,
    m_token,
    i_batch,
    i_head,
    TMA: tl.constexpr,
    FULL: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The left and the right half of the columns of a tile; without SPLIT the left one is all of
    it, and stands for both."""
    b_left = _tile(
        p_rows, start, 0, token, D, m_token, i_batch, i_head, TMA, FULL, TOKENS, WIDTH
    )  # [TOKENS, WIDTH]
    b_right = b_left
    if SPLIT:
        b_right = _tile(
            p_rows, start, WIDTH, token, D, m_token, i_batch, i_head, TMA, FULL, TOKENS, WIDTH
        )
    return b_left, b_right


@triton.jit
def _product(
    b_left, b_right, b_other_left, b_other_right, PRECISION: tl.constexpr, SPLIT: tl.constexpr
):
    """Products of every row with every other row, over all columns: [TOKENS, TOKENS]."""
    b_product = tl.dot(b_left, tl.trans(b_other_left), input_precision=PRECISION)
    if SPLIT:
        b_product = tl.dot(b_right, tl.trans(b_other_right), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def _store(p_rows, o_row, o_d, b_rows, m_token, D):
    """Store rows that begin at o_row [TOKENS, 1], columns o_d of them."""
    m_tile = m_token[:, None] & (o_d < D)[None]
    tl.store(p_rows + o_row + o_d[None], b_rows.to(p_rows.dtype.element_ty), m_tile)


@triton.jit(do_not_specialize=["first"])
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """softmax(scale query key^T) value over the listed blocks of keys, in base 2.

    query, key, value [B, S, H, D] -> out [B, S, H, D] and the natural log-sum-exp fp32 [B, H, S].
    Grid (N, pairs): program (i, j) owns query block i of the j-th (batch, head) from `first` on.

    FULL: every block has TOKENS tokens.
    BOUNDED: no logit exceeds bound_log2, which then stands for every row's maximum, so that
    nothing waits for a maximum and nothing is rescaled.
    TMA: key and value are tensor descriptors.
    SPLIT: a head is two tiles of WIDTH columns, otherwise one; WIDTH is a power of two. Triton
    lays the four warps of an mma.sync product out along the longer side of its result. A sum of
    64 rows of 128 columns would put them along the head dim, so that every warp needs the whole
    softmax of the others; two sums of 64 columns keep each warp to rows of its own.
    """
    i_block = tl.program_id(0)
    i_pair = tl.program_id(1)
    i_batch = (first + i_pair) // H
    i_head = (first + i_pair) % H
    o_t = tl.arange(0, TOKENS)
    o_d = tl.arange(0, WIDTH)
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _block_tokens(p_offsets, i_block, S)
    m_query = o_t < length
    p_query += i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    b_query_left, b_query_right = _tiles(
        p_query, start, q_token, D, m_query, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )  # [TOKENS, WIDTH] each
    if not TMA:
        p_key += i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
        p_value += i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head

    b_max = tl.full([TOKENS], bound_log2 if BOUNDED else -float("inf"), tl.float32)
    # eight parts of a row's sum, which are added up across threads once, at the end
    b_sums = tl.zeros([TOKENS, 8], tl.float32)
    b_out_left = tl.zeros([TOKENS, WIDTH], tl.float32)
    b_out_right = tl.zeros([TOKENS, WIDTH], tl.float32)  # left out of the binary without SPLIT
    i_row = i_pair.to(tl.int64) * N + i_block
    count = tl.load(p_count + i_row)
    p_list += i_row * N
    for i in range(count):
        i_key = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first = i_key * TOKENS
        m_key = o_t < TOKENS
        if not FULL:
            i_first, i_length = _block_tokens(p_offsets, i_key, S)
            m_key = o_t < i_length
        b_key_left, b_key_right = _tiles(
            p_key, i_first, k_token, D, m_key, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        b_logit = _product(
            b_query_left, b_query_right, b_key_left, b_key_right, PRECISION, SPLIT
        )  # [queries, keys]
        if not FULL:
            b_logit = tl.where(m_key[None], b_logit, -float("inf"))
        if BOUNDED:
            b_share = tl.exp2(b_logit * scale_log2 - bound_log2)
        else:
            b_old = b_max
            b_max = tl.maximum(b_max, tl.max(b_logit, 1) * scale_log2)
            b_zero = tl.where(b_max == -float("inf"), 0.0, b_max)  # -inf - -inf is NaN
            b_decay = tl.exp2(b_old - b_zero)
            b_share = tl.exp2(b_logit * scale_log2 - b_zero[:, None])
            b_sums = b_sums * b_decay[:, None]
            b_out_left = b_out_left * b_decay[:, None]
            if SPLIT:
                b_out_right = b_out_right * b_decay[:, None]
        b_value_left, b_value_right = _tiles(
            p_value, i_first, v_token, D, m_key, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        b_sums += tl.sum(tl.reshape(b_share, [TOKENS, TOKENS // 8, 8]), 1)
        b_share = b_share.to(b_value_left.dtype)
        b_out_left = tl.dot(b_share, b_value_left, b_out_left, input_precision=PRECISION)
        if SPLIT:
            b_out_right = tl.dot(b_share, b_value_right, b_out_right, input_precision=PRECISION)

    b_sum = tl.sum(b_sums, 1)
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    if count == 0:
        b_sum += 1.0  # a block that keeps nothing gives zeros, and -inf beside them
    o_query = (start + o_t).to(tl.int64)
    o_row = ((i_batch * S + o_query[:, None]) * H + i_head) * D
    _store(p_out, o_row, o_d, b_out_left / b_sum[:, None], m_query, D)
    if SPLIT:
        _store(p_out, o_row, WIDTH + o_d, b_out_right / b_sum[:, None], m_query, D)
    tl.store(p_lse + (i_batch.to(tl.int64) * H + i_head) * S + o_query, b_lse, m_query)


@triton.jit(do_not_specialize=["first"])
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
    SPLIT: tl.constexpr,
    LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradient of a block of queries (arXiv 2205.14135, appendix B.2).

    `common` fp32 [B, H, S] is what the softmax of a row takes off the gradient of each of its
    logits: the dot product of out and its gradient, less the gradient of lse. It is stored too,
    for the gradients of keys and values.

    Grid, lists, FULL, TMA, SPLIT and WIDTH as in `block_sparse_attention`; out, its gradient and
    what is written are contiguous. LSE: lse has a gradient.
    """
    i_block = tl.program_id(0)
    i_pair = tl.program_id(1)
    i_batch = (first + i_pair) // H
    i_head = (first + i_pair) % H
    o_t = tl.arange(0, TOKENS)
    o_d = tl.arange(0, WIDTH)
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _block_tokens(p_offsets, i_block, S)
    o_query = (start + o_t).to(tl.int64)
    m_query = o_t < length
    p_query += i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    b_query_left, b_query_right = _tiles(
        p_query, start, q_token, D, m_query, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )  # [TOKENS, WIDTH] each
    p_grad_out += (i_batch.to(tl.int64) * S * H + i_head) * D
    b_grad_out_left, b_grad_out_right = _tiles(
        p_grad_out, start, H * D, D, m_query, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )
    p_out += (i_batch.to(tl.int64) * S * H + i_head) * D
    b_out_left, b_out_right = _tiles(
        p_out, start, H * D, D, m_query, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )
    b_common = tl.sum(b_out_left.to(tl.float32) * b_grad_out_left.to(tl.float32), 1)  # [TOKENS]
    if SPLIT:
        b_common += tl.sum(b_out_right.to(tl.float32) * b_grad_out_right.to(tl.float32), 1)
    o_sum = (i_batch.to(tl.int64) * H + i_head) * S + o_query
    if LSE:
        b_common -= tl.load(p_grad_lse + o_sum, m_query, 0.0)
    tl.store(p_common + o_sum, b_common, m_query)
    b_lse = tl.load(p_lse + o_sum, m_query, 0.0) * 1.4426950408889634
    if not TMA:
        p_key += i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
        p_value += i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head

    b_grad_left = tl.zeros([TOKENS, WIDTH], tl.float32)
    b_grad_right = tl.zeros([TOKENS, WIDTH], tl.float32)
    i_row = i_pair.to(tl.int64) * N + i_block
    p_list += i_row * N
    for i in range(tl.load(p_count + i_row)):
        i_key = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first = i_key * TOKENS
        m_key = o_t < TOKENS
        if not FULL:
            i_first, i_length = _block_tokens(p_offsets, i_key, S)
            m_key = o_t < i_length
        b_key_left, b_key_right = _tiles(
            p_key, i_first, k_token, D, m_key, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        b_value_left, b_value_right = _tiles(
            p_value, i_first, v_token, D, m_key, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        b_logit = _product(
            b_query_left, b_query_right, b_key_left, b_key_right, PRECISION, SPLIT
        )  # [queries, keys]
        b_share = tl.exp2(b_logit * scale_log2 - b_lse[:, None])
        if not FULL:
            b_share = tl.where(m_key[None], b_share, 0.0)
        b_grad_share = _product(
            b_grad_out_left, b_grad_out_right, b_value_left, b_value_right, PRECISION, SPLIT
        )
        b_change = (b_share * (b_grad_share - b_common[:, None])).to(b_key_left.dtype)
        b_grad_left = tl.dot(b_change, b_key_left, b_grad_left, input_precision=PRECISION)
        if SPLIT:
            b_grad_right = tl.dot(b_change, b_key_right, b_grad_right, input_precision=PRECISION)
    o_row = ((i_batch * S + o_query[:, None]) * H + i_head) * D
    _store(p_grad_query, o_row, o_d, b_grad_left * scale, m_query, D)
    if SPLIT:
        _store(p_grad_query, o_row, WIDTH + o_d, b_grad_right * scale, m_query, D)


@triton.jit(do_not_specialize=["first"])
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The gradients of a block of keys and of its values, over the listed blocks of queries, which
    are those that keep it.

    Grid and the rest as in `block_sparse_attention_backward_query`, with keys and queries in each
    other's places. TMA: query and grad_out are tensor descriptors.
    """
    i_block = tl.program_id(0)
    i_pair = tl.program_id(1)
    i_batch = (first + i_pair) // H
    i_head = (first + i_pair) % H
    o_t = tl.arange(0, TOKENS)
    o_d = tl.arange(0, WIDTH)
    start, length = i_block * TOKENS, TOKENS
    if not FULL:
        start, length = _block_tokens(p_offsets, i_block, S)
    m_key = o_t < length
    p_key += i_batch.to(tl.int64) * k_batch + i_head.to(tl.int64) * k_head
    p_value += i_batch.to(tl.int64) * v_batch + i_head.to(tl.int64) * v_head
    b_key_left, b_key_right = _tiles(
        p_key, start, k_token, D, m_key, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )  # [TOKENS, WIDTH] each
    b_value_left, b_value_right = _tiles(
        p_value, start, v_token, D, m_key, i_batch, i_head, False, FULL, SPLIT, TOKENS, WIDTH
    )
    o_sums = (i_batch.to(tl.int64) * H + i_head) * S
    if not TMA:
        p_query += i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
        p_grad_out += (i_batch.to(tl.int64) * S * H + i_head) * D

    b_grad_key_left = tl.zeros([TOKENS, WIDTH], tl.float32)
    b_grad_key_right = tl.zeros([TOKENS, WIDTH], tl.float32)
    b_grad_value_left = tl.zeros([TOKENS, WIDTH], tl.float32)
    b_grad_value_right = tl.zeros([TOKENS, WIDTH], tl.float32)
    i_row = i_pair.to(tl.int64) * N + i_block
    p_list += i_row * N
    for i in range(tl.load(p_count + i_row)):
        i_query = tl.load(p_list + i).to(tl.int32) & 0xFFFF
        i_first = i_query * TOKENS
        m_query = o_t < TOKENS
        if not FULL:
            i_first, i_length = _block_tokens(p_offsets, i_query, S)
            m_query = o_t < i_length
        b_query_left, b_query_right = _tiles(
            p_query, i_first, q_token, D, m_query, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        b_grad_out_left, b_grad_out_right = _tiles(
            p_grad_out, i_first, H * D, D, m_query, i_batch, i_head, TMA, FULL, SPLIT, TOKENS, WIDTH
        )
        # rows beyond a ragged block add zeros, because their tensors were read as zeros
        b_lse = tl.load(p_lse + o_sums + i_first + o_t, m_query, 0.0) * 1.4426950408889634
        b_common = tl.load(p_common + o_sums + i_first + o_t, m_query, 0.0)
        b_logit = _product(
            b_key_left, b_key_right, b_query_left, b_query_right, PRECISION, SPLIT
        )  # [keys, queries]
        b_share = tl.exp2(b_logit * scale_log2 - b_lse[None])
        b_share_in = b_share.to(b_grad_out_left.dtype)
        b_grad_value_left = tl.dot(
            b_share_in, b_grad_out_left, b_grad_value_left, input_precision=PRECISION
        )
        if SPLIT:
            b_grad_value_right = tl.dot(
                b_share_in, b_grad_out_right, b_grad_value_right, input_precision=PRECISION
            )
        b_grad_share = _product(
            b_value_left, b_value_right, b_grad_out_left, b_grad_out_right, PRECISION, SPLIT
        )
        b_change = (b_share * (b_grad_share - b_common[None])).to(b_query_left.dtype)
        b_grad_key_left = tl.dot(b_change, b_query_left, b_grad_key_left, input_precision=PRECISION)
        if SPLIT:
            b_grad_key_right = tl.dot(
                b_change, b_query_right, b_grad_key_right, input_precision=PRECISION
            )
    o_key = (start + o_t).to(tl.int64)[:, None]
    o_row = ((i_batch * S + o_key) * H + i_head) * D
    _store(p_grad_key, o_row, o_d, b_grad_key_left * scale, m_key, D)
    _store(p_grad_value, o_row, o_d, b_grad_value_left, m_key, D)
    if SPLIT:
        _store(p_grad_key, o_row, WIDTH + o_d, b_grad_key_right * scale, m_key, D)
        _store(p_grad_value, o_row, WIDTH + o_d, b_grad_value_right, m_key, D)
