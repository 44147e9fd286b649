"""``block_sparse_attention``: the arithmetic of ``int8_attention`` over lists of key blocks, which are run-time inputs.

One kernel serves every pattern: a query block of a head walks over its own list. Lists lie one after another (a query
block of text sees everything, and a rectangular table would be as wide as the longest list for all). Knows nothing of
tiles, windows or orders of tokens.
"""

import triton
import triton.language as tl

from reelforge.plugins.kernels.online_softmax import LOG2_E, PAD, PV_16BIT, accumulate, biased_scores, probabilities


@triton.jit
def block_sparse_attention_kernel(
    query,
    query_scale,
    key,
    key_scale,
    value,
    value_scale,
    block_index,
    block_start,
    block_keys,
    tokens,
    out,
    HEAD_DIM: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend with one block of queries to the key blocks of its list; grid (query blocks, heads, batch).

    Args:
        query: int8 [B, H, L, D].
        query_scale: fp32 [B, H, P / QUERY_GROUP], P = L padded to 128.
        key: int8 [B, H, P, D].
        key_scale: fp32 [B, H, P / KEY_GROUP].
        value: e4m3 [B, H, D, P], or 16-bit [B, L, H, D] for PV_16BIT.
        value_scale: fp32 [B, H, D]; not read for PV_16BIT.
        block_index: int32 [entries], key blocks of KEY_GROUP keys, list after list.
        block_start: int32 [H, P / 128 + 1], where the list of a head and query block starts and, next, ends.
        block_keys: int32 [B, P / KEY_GROUP], how many keys of each block count, from its first.
        tokens: L.
        out: 16-bit [B, L, H, D]; zero for queries whose list is empty.
        HEAD_DIM: D.
        QUERY_GROUP: Queries that share a scale.
        KEY_GROUP: Keys that share a scale; equals BLOCK_N.
        BLOCK_M: Queries of a program; divides 128.
        BLOCK_N: Keys of an iteration.
        PV: How P and V are multiplied.
        STAGES: Key blocks in flight.
    """
    tl.static_assert(KEY_GROUP == BLOCK_N)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    heads = tl.num_programs(1)
    stream = (batch * heads + head).to(tl.int64)
    padded = tl.cdiv(tokens, PAD) * PAD
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    features = tl.arange(0, HEAD_DIM)

    query_base = query + stream * tokens * HEAD_DIM
    inside = rows[:, None] < tokens
    query_tile = tl.load(query_base + rows[:, None] * HEAD_DIM + features[None, :], mask=inside, other=0)
    row_scale = tl.load(query_scale + stream * (padded // QUERY_GROUP) + rows // QUERY_GROUP)
    row_scale *= LOG2_E / HEAD_DIM**0.5
    key_base = key + stream * padded * HEAD_DIM + columns[None, :] * HEAD_DIM + features[:, None]
    key_scale_base = key_scale + stream * (padded // KEY_GROUP)
    block_keys += batch * (padded // KEY_GROUP)
    if PV == PV_16BIT:
        value_row = (heads * HEAD_DIM).to(tl.int64)
        value_base = value + batch * tokens * value_row + head * HEAD_DIM
        value_base += columns[:, None] * value_row + features[None, :]
    else:
        value_row = 1
        value_base = value + stream * padded * HEAD_DIM + columns[:, None] + features[None, :] * padded

    list_of_block = head * (padded // PAD + 1) + tl.program_id(0) * BLOCK_M // PAD
    first = tl.load(block_start + list_of_block)
    end = tl.load(block_start + list_of_block + 1)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for entry in tl.range(first, end, num_stages=STAGES):
        block = tl.load(block_index + entry)
        start = block * BLOCK_N
        key_tile = tl.load(key_base + start * HEAD_DIM)
        biased = biased_scores(query_tile, key_tile, tl.load(block_keys + block), True, BLOCK_M, BLOCK_N)
        scale = row_scale * tl.load(key_scale_base + block)
        p, decay, row_max, row_sum = probabilities(
            biased, scale, row_max, row_sum, value.dtype.element_ty, PV, BLOCK_M, BLOCK_N
        )
        value_pointers = value_base + start * value_row
        if PV == PV_16BIT:  # unlike the others', these values are not padded to whole blocks
            value_tile = tl.load(value_pointers, mask=(start + columns < tokens)[:, None], other=0.0)
        else:
            value_tile = tl.load(value_pointers)
        sums = accumulate(p, value_tile, sums, decay, PV, BLOCK_N)

    sums = sums / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    if PV != PV_16BIT:
        sums *= tl.load(value_scale + stream * HEAD_DIM + features)[None, :]
    out_row = heads * HEAD_DIM
    out_base = out + batch.to(tl.int64) * tokens * out_row + head * HEAD_DIM
    offsets = rows[:, None].to(tl.int64) * out_row + features[None, :]
    tl.store(out_base + offsets, sums.to(out.dtype.element_ty), mask=inside)
