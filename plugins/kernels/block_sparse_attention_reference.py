"""What the block-sparse kernels compute, in NumPy float64: the dense reference under the mask that lists describe."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.kernels.int8_attention_reference import attention, dequantise_query_and_key
from reelforge.plugins.kernels.value_quantise_reference import ungroup
from reelforge.plugins.schema import PAD

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def visible_keys(block_index: Array, block_start: Array, block_keys: Array, tokens: int, key_group: int) -> Array:
    """Return which key each query sees, bool [B, H, tokens, tokens].

    Args:
        block_index: int32 [entries].
        block_start: int32 [H, query blocks + 1].
        block_keys: int32 [B, key blocks].
        tokens: L.
        key_group: Keys of a block.
    """
    heads, blocks = block_start.shape[0], block_start.shape[1] - 1
    listed = np.zeros((heads, blocks, block_keys.shape[1]), bool)
    for head in range(heads):
        for block in range(blocks):
            listed[head, block, block_index[block_start[head, block] : block_start[head, block + 1]]] = True
    by_key = np.repeat(np.repeat(listed, PAD, axis=1), key_group, axis=2)[:, :tokens, :tokens]
    counts = np.arange(key_group)[None, None, :] < block_keys[:, :, None]
    return np.asarray(by_key[None] & counts.reshape(len(block_keys), -1)[:, None, None, :tokens])


def block_sparse_attention(
    query: Array,
    query_scale: Array,
    key: Array,
    key_scale: Array,
    value: Array,
    value_scale: Array,
    block_index: Array,
    block_start: Array,
    block_keys: Array,
    *,
    key_group: int,
) -> Float64:
    """Return ``out`` [B, L, H, D]."""
    tokens = query.shape[2]
    values = ungroup(value.astype(np.float64)) * value_scale.astype(np.float64)[..., None]
    queries, keys = dequantise_query_and_key(query, query_scale, key, key_scale, key_group)
    visible = visible_keys(block_index, block_start, block_keys, tokens, key_group)
    return attention(queries, keys, values[..., :tokens].transpose(0, 3, 1, 2), visible)


block_sparse_attention_fp16_accumulator = block_sparse_attention


def block_sparse_fp16_attention(
    query: Array,
    query_scale: Array,
    key: Array,
    key_scale: Array,
    value: Array,
    value_scale: Array,  # noqa: ARG001 - the family's schema
    block_index: Array,
    block_start: Array,
    block_keys: Array,
    *,
    key_group: int,
) -> Float64:
    """Return ``out`` [B, L, H, D]; ``value`` is v itself, ``value_scale`` has no meaning."""
    queries, keys = dequantise_query_and_key(query, query_scale, key, key_scale, key_group)
    visible = visible_keys(block_index, block_start, block_keys, query.shape[2], key_group)
    return attention(queries, keys, value, visible)
