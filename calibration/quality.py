"""How far one array is from another: PSNR and SSIM of videos, cosine and relative error of tensors, drift of latents.

Plain functions in float64. The module knows no model, no bundle, and not which numbers are good enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Video = NDArray[np.floating[Any]]

_SSIM_WINDOW = 7  # scikit-image's default
_SMALLEST_NORM = float(np.finfo(np.float32).tiny)


def psnr(received: Video, expected: Video) -> float:
    """Return the peak signal-to-noise ratio in dB of values in [0, 1], over all of them at once; infinity if equal.

    ``10 log10(1 / mean((received - expected)^2))``: the data range is 1.

    Args:
        received: ``[frames, height, width, 3]``.
        expected: The same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(received, expected)
    error = float(np.mean(_difference(received, expected) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(received: Video, expected: Video) -> float:
    """Return the structural similarity of values in [0, 1]: scikit-image's, the mean over frames.

    The window is 7 pixels wide, or the largest odd width that fits into a smaller frame.

    Args:
        received: ``[frames, height, width, 3]``.
        expected: The same shape.

    Raises:
        ValueError: If the shapes differ, or a side is shorter than 3 pixels.
    """
    from skimage.metrics import structural_similarity  # here, because it takes a second to import

    _require_same_shape(received, expected)
    side = min(received.shape[1:3])
    window = min(_SSIM_WINDOW, side - 1 + side % 2)
    if window < 3:
        raise ValueError(f"frames of {received.shape[1]}x{received.shape[2]} pixels are too small for a window of 3")
    return float(
        np.mean(
            [
                structural_similarity(
                    one.astype(np.float64), other.astype(np.float64), win_size=window, channel_axis=-1, data_range=1.0
                )
                for one, other in zip(received, expected, strict=True)
            ]
        )
    )


def cosine(received: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the cosine of the angle between two tensors; 1 if both are zero, 0 if one of them is.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(received, expected)
    a, b = received.astype(np.float64).reshape(-1), expected.astype(np.float64).reshape(-1)
    norms = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    if 0.0 in norms:
        return 1.0 if norms == (0.0, 0.0) else 0.0
    return min(1.0, max(-1.0, float(a @ b) / (norms[0] * norms[1])))


def relative_error(received: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return ``|received - expected| / |expected|`` in L2 norms; an expectation of zeros counts as fp32's smallest.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape(received, expected)
    error = float(np.linalg.norm(_difference(received, expected)))
    return error / max(float(np.linalg.norm(expected.astype(np.float64).reshape(-1))), _SMALLEST_NORM)


def drift(received: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> tuple[float, ...]:
    """Return the relative error after each step of two trajectories that began with the same noise.

    Args:
        received: The latents after each step.
        expected: As many.

    Raises:
        ValueError: If the trajectories have different lengths or shapes.
    """
    return tuple(relative_error(one, other) for one, other in zip(received, expected, strict=True))


def _difference(received: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    difference: NDArray[np.float64] = received.astype(np.float64) - expected.astype(np.float64)
    return difference.reshape(-1)


def _require_same_shape(received: NDArray[Any], expected: NDArray[Any]) -> None:
    if received.shape != expected.shape:
        raise ValueError(f"shapes {list(received.shape)} and {list(expected.shape)} cannot be compared")
