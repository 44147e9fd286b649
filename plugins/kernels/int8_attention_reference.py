"""What the dense attention kernels compute, in NumPy float64: a plain softmax over dequantised codes.

Parameters are the plugins' inputs. Online softmax, e4m3 probabilities and accumulators of few bits are how a kernel
gets there and not part of the meaning; they are the error that tests bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.kernels.value_quantise_reference import ungroup
from reelforge.plugins.schema import QUERY_GROUP

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def attention(q: Array, k: Array, v: Array, visible: Array | None = None) -> Float64:
    """Return ``softmax(q k^T / sqrt(D)) v``, all [B, L, H, D] in float64; the oracle that everything is compared with.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        visible: Bool, broadcastable to [B, H, L, L]; None if every query sees every key. Zeros come out for queries
            that see nothing.
    """
    wide_q, wide_k, wide_v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = wide_q @ np.swapaxes(wide_k, -1, -2) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(-1, keepdims=True)
    mean = weights @ wide_v / np.where(total > 0, total, 1.0)
    return np.ascontiguousarray(mean.transpose(0, 2, 1, 3))


def int8_fp8_attention(
    query: Array,
    query_scale: Array,
    key: Array,
    key_scale: Array,
    value: Array,
    value_scale: Array,
    key_lengths: Array,
    *,
    key_group: int,
) -> Float64:
    """Return ``out`` [B, L, H, D] from codes and scales of ``rotary_qk_norm_quantise`` and ``value_quantise``."""
    values = ungroup(value.astype(np.float64)) * value_scale.astype(np.float64)[..., None]
    values = values[..., : query.shape[2]].transpose(0, 3, 1, 2)
    return attend_to_prefix(query, query_scale, key, key_scale, values, key_lengths, key_group)


int8_fp8_attention_fp16_accumulator = int8_fp8_attention


def int8_fp16_attention(
    query: Array,
    query_scale: Array,
    key: Array,
    key_scale: Array,
    value: Array,
    value_scale: Array,  # noqa: ARG001 - the family's schema
    key_lengths: Array,
    *,
    key_group: int,
) -> Float64:
    """Return ``out`` [B, L, H, D]; ``value`` is v itself, ``value_scale`` has no meaning."""
    return attend_to_prefix(query, query_scale, key, key_scale, value, key_lengths, key_group)


def attend_to_prefix(
    query: Array, query_scale: Array, key: Array, key_scale: Array, values: Array, key_lengths: Array, key_group: int
) -> Float64:
    """Attend to the first ``key_lengths`` [B] keys; values [B, L, H, D]."""
    queries, keys = dequantise_query_and_key(query, query_scale, key, key_scale, key_group)
    counts = np.arange(query.shape[2])[None, :] < key_lengths[:, None]
    return attention(queries, keys, values, counts[:, None, None, :])


def dequantise_query_and_key(
    query: Array, query_scale: Array, key: Array, key_scale: Array, key_group: int
) -> tuple[Float64, Float64]:
    """Return queries and keys, float64 [B, L, H, D]."""
    tokens = query.shape[2]
    wide = []
    for codes, scale, group in ((query, query_scale, QUERY_GROUP), (key, key_scale, key_group)):
        rows = np.repeat(scale.astype(np.float64), group, axis=2)[:, :, :tokens, None]
        wide.append((codes[:, :, :tokens].astype(np.float64) * rows).transpose(0, 2, 1, 3))
    return wide[0], wide[1]
