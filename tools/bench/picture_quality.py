"""How far one video, or one velocity, is from another. Plain functions of arrays; the module knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

FloatArray = NDArray[np.floating[Any]]


def psnr_db(received: FloatArray, expected: FloatArray) -> float:
    """Return the peak signal-to-noise ratio over all values of videos in [0, 1], in dB; infinite if they are equal."""
    error = float(np.mean((received.astype(np.float64) - expected) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(received: FloatArray, expected: FloatArray) -> float:
    """Return the structural similarity of videos ``[T, H, W, 3]`` in [0, 1]: scikit-image's, the mean over frames."""
    pairs = zip(received, expected, strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs]))


def cosine(received: FloatArray, expected: FloatArray) -> float:
    """Return the cosine of the angle between two tensors."""
    a, b = received.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
