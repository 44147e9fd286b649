"""One key block of 8-bit attention with online softmax: shared by the dense and the block-sparse kernel.

Shapes: M queries of a program's block, N keys of one block, D head dimension. Scores are in base 2, so that the softmax
needs ``exp2`` only. Knows neither which key blocks are visited nor where the tensors come from.

The integer product starts from the bits of 1.5 * 2**23 instead of zero: reinterpreted as fp32, an accumulator
``1.5 * 2**23 + n`` needs no conversion instruction, and scale, offset and row maximum become one multiply-add. |n|
is at most 127 * 127 * 128 < 2**21, so every sum stays within that binade and is exact.
"""

import triton
import triton.language as tl

PV_FP8 = tl.constexpr(0)
"""P in e4m3 against V in e4m3, each key block summed in fp32 on its own and then added to the output."""
PV_FP8_FP16_ACCUMULATOR = tl.constexpr(1)
"""The same with the key block's sum in fp16, twice as fast on Ada and consumer Blackwell; needs |V| <= 2.25."""
PV_16BIT = tl.constexpr(2)
"""P and V in V's 16-bit type, for GPUs without fp8."""

PAD = tl.constexpr(128)
"""Queries, keys and e4m3 values are padded to a multiple of this with zeros, so that no load of them needs a mask."""

LOG2_E = tl.constexpr(1.4426950408889634)
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23, whose bits these are
MASKED_BITS = tl.constexpr(-16777216)  # the bits of -1.7e38
LARGEST_E4M3_LOG2 = tl.constexpr(8.807354922057604)  # log2(448)


@triton.jit
def regroup_columns(p, M: tl.constexpr, N: tl.constexpr):
    """Put columns in the order in which values are stored, see ``value_quantise``.

    In every 32 columns, (a, b, c, d) of sizes (2, 2, 4, 2) becomes (a, c, b, d). Each thread then holds the very
    elements that the 8-bit product wants as its left operand, and P needs no exchange between threads.
    """
    p = tl.reshape(p, (M, N // 32, 2, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 2, 4, 3, 5)), (M, N))


@triton.jit
def biased_scores(query, key, valid, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return MAGIC_BITS plus the integer scores, int32 [M, N], from int8 query [M, D] and key [D, N].

    With MASKED, only the first ``valid`` keys count. The others start from the bits of a huge negative number, which a
    score cannot change much: masking takes no instruction per score, as every accumulator starts from something.
    """
    start = tl.full((M, N), MAGIC_BITS, tl.int32)
    if MASKED:
        start = tl.where(tl.arange(0, N)[None, :] < valid, start, MASKED_BITS)
    return tl.dot(query, key, acc=start, out_dtype=tl.int32)


@triton.jit
def probabilities(
    biased,
    scale,
    row_max,
    row_sum,
    dtype: tl.constexpr,
    PV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Return ``(p, decay, row_max, row_sum)``: P for one key block, and by how much everything before it shrinks.

    Args:
        biased: int32 [M, N] from :func:`biased_scores`.
        scale: fp32 [M]: scales of query and key, the softmax's scale and log2(e).
        row_max: fp32 [M], base 2.
        row_sum: fp32 [M].
        dtype: P's type.
        PV: One of PV_*.
        M: Queries.
        N: Keys.
    """
    score = biased.to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, 1e-30)  # zero times a masked score would count; 1e-30 times it is -1e8
    largest = tl.maximum(tl.max(score, 1), 0.0)  # scores are near MAGIC; if all are masked, the maximum stays finite
    new_max = tl.maximum(row_max, (largest - MAGIC) * scale)
    shift = -new_max
    if PV != PV_16BIT:
        shift += LARGEST_E4M3_LOG2
    offset = tl.fma(scale, -MAGIC, shift)
    p = tl.exp2(tl.fma(score, scale[:, None], offset[:, None]))
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    p = p.to(dtype)
    if PV != PV_16BIT:
        p = regroup_columns(p, M, N)
    return p, decay, new_max, row_sum


@triton.jit
def accumulate(p, value, sums, decay, PV: tl.constexpr, N: tl.constexpr):
    """Return fp32 ``sums * decay + p @ value``: sums [M, D], decay fp32 [M], p [M, N], value [N, D]."""
    if PV == PV_FP8_FP16_ACCUMULATOR:
        sums = sums * decay[:, None] + tl.dot(p, value, out_dtype=tl.float16).to(tl.float32)
    elif PV == PV_FP8:
        # Without this limit the compiler sums all key blocks in the tensor cores' accumulator, which has about 14 bits
        # of mantissa and truncates: values with a mean came out wrong by tens of per cent after 32,768 keys on an H100.
        sums = sums * decay[:, None] + tl.dot(p, value, max_num_imprecise_acc=N)
    else:
        sums = tl.dot(p, value, sums * decay[:, None])
    return sums
