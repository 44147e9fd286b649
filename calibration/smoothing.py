"""SmoothQuant's migration: channels of an activation are divided by factors, and the weight's columns multiplied.

``(x / s) @ (W * s).T = x @ W.T``, with ``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`` (Xiao et al., "SmoothQuant",
2023, equation 4): outlier channels of the activation become smaller, and the weight takes up what they lose. The
division costs nothing where the operation before the layer is affine per channel and takes it in. The module does not
know the graph: which operation precedes a layer, and which layers share one input and therefore one ``s``.

All functions compute in float64, return new fp32 arrays and leave their arguments as they are. ``C`` is the layer's
input width and the length of every ``s``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_ALPHA = 0.5
DEFAULT_LIMIT = 1024.0


class Affine(NamedTuple):
    """Weight and bias of a norm or a linear; ``bias`` is None where there is none."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None


def input_channel_maxima(*weights: NDArray[Any]) -> NDArray[np.float32]:
    """Return the largest magnitude per column, fp32 ``[C]``, over all weights ``[rows, C]`` that share one input."""
    columns = [np.abs(weight.astype(np.float32)).max(axis=0, initial=0) for weight in weights]
    return np.asarray(np.max(columns, axis=0))


def migration_factors(
    activation_maxima: NDArray[Any],
    weight_maxima: NDArray[Any],
    alpha: float = DEFAULT_ALPHA,
    limit: float = DEFAULT_LIMIT,
) -> NDArray[np.float32]:
    """Return ``s``, fp32 ``[C]``: positive and finite, between ``1 / limit`` and ``limit``.

    A channel that is always zero in the activation or in the weight has nothing to migrate, and the factor 1.

    Args:
        activation_maxima: Largest magnitude per channel, ``[C]``.
        weight_maxima: Largest magnitude per input channel, ``[C]``; see :func:`input_channel_maxima`.
        alpha: 0 leaves the range to the activation, 1 moves all of it into the weight.
        limit: Keeps a channel that is nearly zero on one side from swamping the other.

    Raises:
        ValueError: If the shapes differ, a maximum is negative or not finite, or alpha or limit is out of range.
    """
    x, w = activation_maxima.astype(np.float64), weight_maxima.astype(np.float64)
    if x.shape != w.shape or x.ndim != 1:
        raise ValueError(f"activation maxima {list(x.shape)} and weight maxima {list(w.shape)} must be equal vectors")
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (x >= 0).all() and (w >= 0).all()):
        raise ValueError("a channel maximum is negative or not finite")
    if not 0 <= alpha <= 1 or not 1 <= limit < np.inf:
        raise ValueError(f"alpha={alpha} must lie in 0..1 and limit={limit} be a finite number from 1")
    moved = (x > 0) & (w > 0)
    factors = np.ones_like(x)
    factors[moved] = x[moved] ** alpha / w[moved] ** (1 - alpha)
    return np.clip(factors, 1 / limit, limit).astype(np.float32)


def fold_into_weight(weight: NDArray[Any], factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weight ``[rows, C]`` of a layer whose input arrives divided by ``factors``: columns times ``s``."""
    _check(weight.shape[1:], factors, "the weight's columns have")
    return (weight.astype(np.float64) * factors).astype(np.float32)


def fold_into_affine(
    weight: NDArray[Any], bias: NDArray[Any] | None, factors: NDArray[np.float32], rows: slice = slice(None)
) -> Affine:
    """Return the affine operation before the layer, so that its output arrives divided by ``factors``.

    Covers a LayerNorm's or RMSNorm's weight ``[C]`` and bias, and a linear's ``[R, D]`` whose output rows are the
    layer's input channels (``v`` before an attention's projection: mixing tokens keeps channels apart).

    Args:
        weight: ``[C]`` or ``[R, D]``.
        bias: Its bias ``[C]`` or ``[R]``, or None.
        factors: ``s``, ``[C]``.
        rows: Which ``C`` rows feed the layer; the others stay.
    """
    divided = weight.astype(np.float32)
    _check(weight[rows].shape[:1], factors, "the affine's rows have")
    divisors = factors.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    divided[rows] = weight[rows].astype(np.float64) / divisors
    if bias is None:
        return Affine(divided, None)
    shifted = bias.astype(np.float32)
    shifted[rows] = bias[rows].astype(np.float64) / factors
    return Affine(divided, shifted)


def fold_into_modulation(
    weight: NDArray[Any], bias: NDArray[Any], factors: NDArray[np.float32], shift_rows: slice, scale_rows: slice
) -> Affine:
    """Return the modulation linear whose modulated output arrives divided by ``factors``.

    The layer's input is ``x_hat * (1 + scale) + shift`` with ``scale`` and ``shift`` rows of one linear,
    ``rows @ c + b``. It is divided by ``s`` if ``shift' = shift / s`` and ``1 + scale' = (1 + scale) / s``, that is
    ``scale' = (rows / s) @ c + ((b + 1) / s - 1)``: for every conditioning ``c``, rows and biases are divided, and
    only the bias of the scale is moved by one before and after.

    Args:
        weight: ``[rows, D]``.
        bias: ``[rows]``.
        factors: ``s``, ``[C]``.
        shift_rows: The ``C`` rows that give the shift.
        scale_rows: The ``C`` rows that give the scale.
    """
    shifted_weight, shifted_bias = fold_into_affine(weight, bias, factors, shift_rows)
    assert shifted_bias is not None
    folded, _ = fold_into_affine(shifted_weight, None, factors, scale_rows)
    shifted_bias[scale_rows] = (bias[scale_rows].astype(np.float64) + 1) / factors - 1
    return Affine(folded, shifted_bias)


def _check(shape: tuple[int, ...], factors: NDArray[np.float32], what: str) -> None:
    if shape != factors.shape:
        raise ValueError(f"{what} shape {list(shape)}, the factors {list(factors.shape)}")
