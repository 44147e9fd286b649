"""``value_statistics`` and ``value_quantise``: values to e4m3, a scale per channel, transposed as attention reads them.

The 8-bit tensor core instructions take values with the tokens of one channel side by side. Within every 32 tokens they
are stored in the order that lets a thread use the probabilities it computed itself, see ``regroup_columns``.

Bytes per element: 2 + 2 read and 1 written; v is read twice, since the scale needs all tokens first.
"""

import triton
import triton.language as tl

from reelforge.plugins.kernels.online_softmax import PAD, regroup_columns

PARTS = tl.constexpr(32)  # partial maxima read at once


@triton.jit
def value_statistics_kernel(
    v,
    tokens,
    value_max,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Take the largest magnitude per channel over one chunk of tokens; grid (heads, chunks, batch).

    Args:
        v: 16-bit [B, L, H, D].
        tokens: L.
        value_max: fp32 [B, H, ceil(L / CHUNK), D].
        HEAD_DIM: D.
        CHUNK: Tokens of a program.
        ROWS: Tokens of an iteration.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, chunks = tl.num_programs(0), tl.num_programs(1)
    features = tl.arange(0, HEAD_DIM)
    base = v + batch.to(tl.int64) * tokens * heads * HEAD_DIM + head * HEAD_DIM + features[None, :]
    largest = tl.zeros((HEAD_DIM,), tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        tile = tl.load(base + rows.to(tl.int64) * heads * HEAD_DIM, mask=rows < tokens, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(tile.to(tl.float32)), 0))
    target = value_max + ((batch * heads + head) * chunks + chunk).to(tl.int64) * HEAD_DIM + features
    tl.store(target, largest)


@triton.jit
def value_quantise_kernel(
    v,
    value_max,
    tokens,
    value,
    value_scale,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Quantise 128 tokens of one head; grid (heads, padded tokens / 128, batch).

    Args:
        v: 16-bit [B, L, H, D].
        value_max: fp32 [B, H, ceil(L / CHUNK), D] from ``value_statistics``.
        tokens: L.
        value: e4m3 [B, H, D, P], P = tokens padded to 128; regrouped in every 32, zeros behind the last token.
        value_scale: fp32 [B, H, D].
        HEAD_DIM: D.
        CHUNK: Tokens of a partial maximum.
        RANGE: What the largest value becomes: 448, or 2.25 for the fp16 accumulator.
    """
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, blocks = tl.num_programs(0), tl.num_programs(1)
    stream = (batch * heads + head).to(tl.int64)
    features = tl.arange(0, HEAD_DIM)
    chunks = tl.cdiv(tokens, CHUNK)
    largest = tl.zeros((HEAD_DIM,), tl.float32)
    for start in tl.range(0, chunks, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        pointers = value_max + (stream * chunks + part) * HEAD_DIM + features[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(pointers, mask=part < chunks, other=0.0), 0))
    if block == 0:
        tl.store(value_scale + stream * HEAD_DIM + features, largest / RANGE)
    factor = RANGE / tl.maximum(largest, 1e-30)  # a channel of zeros stays one

    rows = (block * PAD + tl.arange(0, PAD))[:, None]
    base = v + batch.to(tl.int64) * tokens * heads * HEAD_DIM + head * HEAD_DIM + features[None, :]
    tile = tl.load(base + rows.to(tl.int64) * heads * HEAD_DIM, mask=rows < tokens, other=0.0).to(tl.float32)
    codes = tl.trans((tile * factor[None, :]).to(value.dtype.element_ty))
    columns = block * PAD + tl.arange(0, PAD)
    target = value + stream * HEAD_DIM * blocks * PAD + features[:, None] * (blocks * PAD) + columns[None, :]
    tl.store(target, regroup_columns(codes, HEAD_DIM, PAD))
