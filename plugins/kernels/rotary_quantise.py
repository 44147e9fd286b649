"""``key_statistics`` and ``rotary_qk_norm_quantise``: from projected q and k to what 8-bit attention reads.

q and k are normalised per head (RMSNorm), image tokens rotated (half-split layout), the mean over tokens taken off k,
and both stored as int8 with a scale per group of tokens. The mean needs all tokens before the first is quantised, so it
is a kernel of its own, which leaves partial sums. A softmax is invariant to any vector taken off all keys: the mean
only has to be the same for all of them, and is there to make the codes' range small.

Bytes per element of q and k together, tables aside: 2 + 2 + 2 read and 1 + 1 written; k is read twice. Each head reads
8 bytes of tables besides, per element of q: programs that run side by side are heads of the same tokens.
"""

import triton
import triton.language as tl

from reelforge.plugins.kernels.online_softmax import PAD

PARTS = tl.constexpr(
    32
)  # partial sums read at once: one after another, their latency would be most of the kernel's time
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to |x| < 2**22 leaves no bits behind the point


@triton.jit
def normalise_and_rotate(
    source, offsets, norm_weight, rope_cos, rope_sin, rows, tokens, image_tokens, EPS: tl.constexpr, HALF: tl.constexpr
):
    """Return the two fp32 halves [R, HALF] of R tokens of one head; zero for rows behind the last token.

    Args:
        source: 16-bit or fp32 [B, L, H, D].
        offsets: int64 [R], of the rows' first elements.
        norm_weight: fp32 [2, D], for image and for text tokens.
        rope_cos: fp32 [image_tokens, HALF].
        rope_sin: fp32 [image_tokens, HALF].
        rows: int32 [R], token numbers.
        tokens: L.
        image_tokens: How many tokens, from the first, are of the image.
        EPS: Of the norm.
        HALF: D / 2.
    """
    pair = tl.arange(0, HALF)
    inside = (rows < tokens)[:, None]
    image = (rows < image_tokens)[:, None]
    first = tl.load(source + offsets[:, None] + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + offsets[:, None] + HALF + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + EPS)[:, None]
    image_first, image_second = tl.load(norm_weight + pair), tl.load(norm_weight + HALF + pair)
    text_first, text_second = tl.load(norm_weight + 2 * HALF + pair), tl.load(norm_weight + 3 * HALF + pair)
    first *= inverse * tl.where(image, image_first[None, :], text_first[None, :])
    second *= inverse * tl.where(image, image_second[None, :], text_second[None, :])
    angles = rows[:, None] * HALF + pair[None, :]
    cos = tl.load(rope_cos + angles, mask=image, other=1.0)
    sin = tl.load(rope_sin + angles, mask=image, other=0.0)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_codes(
    first, second, codes, scales, rows, stored, group_base, HALF: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    """Quantise R tokens with a scale per G of them: int8 to ``codes`` [R, 2 * HALF], fp32 to ``scales``.

    Codes are written for the rows below ``stored``, scales for all groups.
    """
    pair = tl.arange(0, HALF)
    row_max = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
    group_max = tl.max(tl.reshape(row_max, (R // G, G)), 1)
    tl.store(scales + group_base + tl.arange(0, R // G), group_max / 127.0)
    factor = 127.0 / tl.maximum(group_max, 1e-30)  # a group of zeros stays one
    factor = tl.reshape(tl.broadcast_to(factor[:, None], (R // G, G)), (R,))[:, None]
    inside = (rows < stored)[:, None]
    pointers = codes + rows[:, None] * (2 * HALF) + pair[None, :]
    tl.store(pointers, (((first * factor) + ROUND) - ROUND).to(tl.int8), mask=inside)
    tl.store(pointers + HALF, (((second * factor) + ROUND) - ROUND).to(tl.int8), mask=inside)


@triton.jit
def key_statistics_kernel(
    k,
    key_norm,
    rope_cos,
    rope_sin,
    tokens,
    image_tokens,
    key_sums,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum normalised, rotated keys over one chunk of tokens; grid (heads, chunks, batch).

    Args:
        k: 16-bit [B, L, H, D].
        key_norm: fp32 [2, D], for image and for text tokens.
        rope_cos: fp32 [image_tokens, D / 2].
        rope_sin: Likewise.
        tokens: L.
        image_tokens: Of which so many, from the first, are rotated.
        key_sums: fp32 [B, H, ceil(L / CHUNK), D].
        HEAD_DIM: D.
        EPS: Of the norm.
        CHUNK: Tokens of a program.
        ROWS: Tokens of an iteration.
    """
    half: tl.constexpr = HEAD_DIM // 2
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, chunks = tl.num_programs(0), tl.num_programs(1)
    pair = tl.arange(0, half)
    base = batch.to(tl.int64) * tokens * heads * HEAD_DIM + head * HEAD_DIM
    first_sum = tl.zeros((half,), tl.float32)
    second_sum = tl.zeros((half,), tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens), ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = base + rows.to(tl.int64) * heads * HEAD_DIM
        first, second = normalise_and_rotate(
            k, offsets, key_norm, rope_cos, rope_sin, rows, tokens, image_tokens, EPS, half
        )
        first_sum += tl.sum(first, 0)
        second_sum += tl.sum(second, 0)
    target = key_sums + ((batch * heads + head) * chunks + chunk).to(tl.int64) * HEAD_DIM + pair
    tl.store(target, first_sum)
    tl.store(target + half, second_sum)


@triton.jit
def rotary_qk_norm_quantise_kernel(
    q,
    k,
    query_norm,
    key_norm,
    rope_cos,
    rope_sin,
    key_sums,
    tokens,
    image_tokens,
    query,
    query_scale,
    key,
    key_scale,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
):
    """Quantise 128 tokens of q and k of one head; grid (heads, padded tokens / 128, batch).

    Args:
        q: 16-bit [B, L, H, D].
        k: 16-bit [B, L, H, D].
        query_norm: fp32 [2, D], for image and for text tokens.
        key_norm: fp32 [2, D].
        rope_cos: fp32 [image_tokens, D / 2].
        rope_sin: Likewise.
        key_sums: fp32 [B, H, ceil(L / CHUNK), D] from ``key_statistics``.
        tokens: L.
        image_tokens: Of which so many, from the first, are rotated.
        query: int8 [B, H, L, D].
        query_scale: fp32 [B, H, P / QUERY_GROUP], P = L padded to 128.
        key: int8 [B, H, P, D], zeros behind the last token.
        key_scale: fp32 [B, H, P / KEY_GROUP].
        HEAD_DIM: D.
        EPS: Of the norms.
        CHUNK: Tokens of a partial sum.
        QUERY_GROUP: Queries that share a scale.
        KEY_GROUP: Keys that share a scale.
    """
    half: tl.constexpr = HEAD_DIM // 2
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, blocks = tl.num_programs(0), tl.num_programs(1)
    stream = (batch * heads + head).to(tl.int64)
    pair = tl.arange(0, half)
    rows = block * PAD + tl.arange(0, PAD)
    offsets = batch.to(tl.int64) * tokens * heads * HEAD_DIM + head * HEAD_DIM + rows.to(tl.int64) * heads * HEAD_DIM

    first, second = normalise_and_rotate(
        q, offsets, query_norm, rope_cos, rope_sin, rows, tokens, image_tokens, EPS, half
    )
    groups = (stream * blocks + block) * (PAD // QUERY_GROUP)
    codes = query + stream * tokens * HEAD_DIM
    store_codes(first, second, codes, query_scale, rows, tokens, groups, half, PAD, QUERY_GROUP)

    first_mean = tl.zeros((half,), tl.float32)
    second_mean = tl.zeros((half,), tl.float32)
    chunks = tl.cdiv(tokens, CHUNK)
    sums = key_sums + stream * chunks * HEAD_DIM + pair[None, :]
    for start in tl.range(0, chunks, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        first_mean += tl.sum(tl.load(sums + part * HEAD_DIM, mask=part < chunks, other=0.0), 0)
        second_mean += tl.sum(tl.load(sums + part * HEAD_DIM + half, mask=part < chunks, other=0.0), 0)
    first, second = normalise_and_rotate(
        k, offsets, key_norm, rope_cos, rope_sin, rows, tokens, image_tokens, EPS, half
    )
    inside = (rows < tokens)[:, None]
    first = tl.where(inside, first - (first_mean / tokens)[None, :], 0.0)
    second = tl.where(inside, second - (second_mean / tokens)[None, :], 0.0)
    groups = (stream * blocks + block) * (PAD // KEY_GROUP)
    codes = key + stream * blocks * PAD * HEAD_DIM
    store_codes(first, second, codes, key_scale, rows, blocks * PAD, groups, half, PAD, KEY_GROUP)
