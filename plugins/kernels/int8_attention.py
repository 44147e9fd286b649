"""``int8_fp8_attention`` and its variants: dense attention with int8 scores, for compiled and interpreted use.

A program owns one block of queries of one head and walks over all key blocks. Query, key and value come from
``rotary_qk_norm_quantise`` and ``value_quantise``, padded to whole blocks, so that no load needs a mask.
"""

import triton
import triton.language as tl

from reelforge.plugins.kernels.online_softmax import LOG2_E, PAD, PV_16BIT, accumulate, biased_scores, probabilities


@triton.jit
def int8_attention_kernel(
    query,
    query_scale,
    key,
    key_scale,
    value,
    value_scale,
    key_lengths,
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
    """Attend with one block of queries; grid (query blocks, heads, batch).

    Args:
        query: int8 [B, H, L, D].
        query_scale: fp32 [B, H, P / QUERY_GROUP], P = L padded to 128.
        key: int8 [B, H, P, D].
        key_scale: fp32 [B, H, P / KEY_GROUP].
        value: e4m3 [B, H, D, P], or 16-bit [B, L, H, D] for PV_16BIT.
        value_scale: fp32 [B, H, D]; not read for PV_16BIT.
        key_lengths: int32 [B], keys that count, at least 1.
        tokens: L.
        out: 16-bit [B, L, H, D].
        HEAD_DIM: D.
        QUERY_GROUP: Queries that share a scale.
        KEY_GROUP: Keys that share a scale; equals BLOCK_N.
        BLOCK_M: Queries of a program.
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
    if PV == PV_16BIT:
        value_row = (heads * HEAD_DIM).to(tl.int64)
        value_base = value + batch * tokens * value_row + head * HEAD_DIM
        value_base += columns[:, None] * value_row + features[None, :]
    else:
        value_row = 1
        value_base = value + stream * padded * HEAD_DIM + columns[:, None] + features[None, :] * padded

    length = tl.load(key_lengths + batch)
    last = (length - 1) // BLOCK_N
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    # Only the last block has keys that may not count; it comes after the loop, which then needs no mask.
    for block in tl.range(0, last, num_stages=STAGES):
        key_tile = tl.load(key_base + block * BLOCK_N * HEAD_DIM)
        biased = biased_scores(query_tile, key_tile, 0, False, BLOCK_M, BLOCK_N)
        scale = row_scale * tl.load(key_scale_base + block)
        p, decay, row_max, row_sum = probabilities(
            biased, scale, row_max, row_sum, value.dtype.element_ty, PV, BLOCK_M, BLOCK_N
        )
        value_tile = tl.load(value_base + block * BLOCK_N * value_row)
        sums = accumulate(p, value_tile, sums, decay, PV, BLOCK_N)

    start = last * BLOCK_N
    key_tile = tl.load(key_base + start * HEAD_DIM)
    biased = biased_scores(query_tile, key_tile, length - start, True, BLOCK_M, BLOCK_N)
    scale = row_scale * tl.load(key_scale_base + last)
    p, decay, row_max, row_sum = probabilities(
        biased, scale, row_max, row_sum, value.dtype.element_ty, PV, BLOCK_M, BLOCK_N
    )
    value_pointers = value_base + start * value_row
    if PV == PV_16BIT:
        value_tile = tl.load(value_pointers, mask=(start + columns < length)[:, None], other=0.0)
    else:
        value_tile = tl.load(value_pointers)
    sums = accumulate(p, value_tile, sums, decay, PV, BLOCK_N)

    sums = sums / row_sum[:, None]
    if PV != PV_16BIT:
        sums *= tl.load(value_scale + stream * HEAD_DIM + features)[None, :]
    out_row = heads * HEAD_DIM
    out_base = out + batch.to(tl.int64) * tokens * out_row + head * HEAD_DIM
    offsets = rows[:, None].to(tl.int64) * out_row + features[None, :]
    tl.store(out_base + offsets, sums.to(out.dtype.element_ty), mask=inside)
