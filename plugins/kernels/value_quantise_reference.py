"""What ``value_quantise``'s kernels compute, in NumPy float64; parameters are the plugins' inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.schema import CHUNK, PAD

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def value_statistics(v: Array) -> Float64:
    """Return the largest magnitude per channel over each CHUNK tokens, [B, H, chunks, D], from v [B, L, H, D]."""
    magnitudes = np.abs(v.astype(np.float64)).transpose(0, 2, 1, 3)
    return np.maximum.reduceat(magnitudes, np.arange(0, v.shape[1], CHUNK), axis=2)


def value_quantise(v: Array, value_max: Array, *, value_range: float) -> tuple[Array, Float64]:
    """Return ``value`` e4m3 [B, H, D, P], regrouped, and ``value_scale`` [B, H, D]; P is L padded to PAD."""
    import ml_dtypes

    largest = value_max.astype(np.float64).max(axis=2)
    factor = np.divide(value_range, largest, out=np.zeros_like(largest), where=largest > 0)
    channels = v.astype(np.float64).transpose(0, 2, 3, 1) * factor[..., None]
    padded = np.pad(channels, ((0, 0), (0, 0), (0, 0), (0, -v.shape[1] % PAD)))
    return regroup(padded.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)), largest / value_range


def regroup(x: Array) -> Array:
    """Put tokens, the last axis, in stored order: in every 32, (a, b, c, d) of 2, 2, 4 and 2 becomes (a, c, b, d)."""
    parts = x.reshape(*x.shape[:-1], -1, 2, 2, 4, 2)
    return np.swapaxes(parts, -3, -2).reshape(x.shape)


def ungroup(x: Array) -> Array:
    """Undo :func:`regroup`."""
    parts = x.reshape(*x.shape[:-1], -1, 2, 4, 2, 2)
    return np.swapaxes(parts, -3, -2).reshape(x.shape)
