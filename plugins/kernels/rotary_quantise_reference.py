"""What ``rotary_quantise``'s kernels compute, in NumPy float64.

Parameters are the plugins' inputs, results their outputs; the number of partial sums is no part of a result's meaning,
but of its shape. Rounding of codes is half to even; fp32 arithmetic may round a value between two codes the other way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.schema import CHUNK, PAD, QUERY_GROUP

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def normalise_and_rotate(x: Array, norm: Array, rope_cos: Array, rope_sin: Array, eps: float) -> Float64:
    """Return RMS-normalised x with its image tokens rotated, float64 [B, L, H, D].

    Args:
        x: [B, L, H, D], image tokens first.
        norm: [2, D], for image and for text tokens.
        rope_cos: [image_tokens, D / 2].
        rope_sin: Likewise.
        eps: Of the norm.
    """
    wide = x.astype(np.float64)
    wide /= np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    image = rope_cos.shape[0]
    wide[:, :image] *= norm[0]
    wide[:, image:] *= norm[1]
    half = x.shape[-1] // 2
    cos, sin = (table.astype(np.float64)[None, :, None, :] for table in (rope_cos, rope_sin))
    first, second = wide[:, :image, :, :half].copy(), wide[:, :image, :, half:].copy()
    wide[:, :image, :, :half] = first * cos - second * sin
    wide[:, :image, :, half:] = second * cos + first * sin
    return wide


def key_statistics(k: Array, key_norm: Array, rope_cos: Array, rope_sin: Array, *, eps: float) -> Float64:
    """Return sums of normalised, rotated keys over each CHUNK tokens, [B, H, chunks, D]."""
    keys = normalise_and_rotate(k, key_norm, rope_cos, rope_sin, eps).transpose(0, 2, 1, 3)
    return np.add.reduceat(keys, np.arange(0, k.shape[1], CHUNK), axis=2)


def rotary_qk_norm_quantise(
    q: Array,
    k: Array,
    query_norm: Array,
    key_norm: Array,
    rope_cos: Array,
    rope_sin: Array,
    key_sums: Array,
    *,
    eps: float,
    key_group: int,
) -> tuple[Array, Float64, Array, Float64]:
    """Return ``query`` int8 [B, H, L, D], ``query_scale``, ``key`` int8 [B, H, P, D] and ``key_scale``.

    P is L padded to PAD; scales are [B, H, P / QUERY_GROUP] and [B, H, P / key_group].
    """
    tokens = q.shape[1]
    queries = normalise_and_rotate(q, query_norm, rope_cos, rope_sin, eps).transpose(0, 2, 1, 3)
    keys = normalise_and_rotate(k, key_norm, rope_cos, rope_sin, eps).transpose(0, 2, 1, 3)
    keys = keys - key_sums.astype(np.float64).sum(axis=2, keepdims=True) / tokens
    query, query_scale = quantise_groups(queries, QUERY_GROUP)
    key, key_scale = quantise_groups(keys, key_group)
    return query[:, :, :tokens], query_scale, key, key_scale


def quantise_groups(x: Float64, group: int) -> tuple[Array, Float64]:
    """Quantise [B, H, L, D], padded to PAD tokens with zeros, to int8 with a scale per ``group`` tokens."""
    padding = -x.shape[2] % PAD
    padded = np.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    groups = padded.reshape(*x.shape[:2], -1, group * x.shape[3])
    largest = np.abs(groups).max(-1)
    factor = np.divide(127.0, largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(groups * factor[..., None]).astype(np.int8)
    return codes.reshape(padded.shape), largest / 127.0
