"""Metrics against scikit-image's and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from reelforge.tools.bench.picture_quality import cosine, psnr_db, ssim

VIDEO = np.random.default_rng(0).random((2, 16, 16, 3), dtype=np.float32)


def test_psnr_is_that_of_all_frames_together() -> None:
    other = np.clip(VIDEO + np.float32(0.1), 0, 1)
    assert psnr_db(other, VIDEO) == pytest.approx(peak_signal_noise_ratio(VIDEO, other, data_range=1.0), abs=1e-4)
    assert psnr_db(np.zeros(4), np.full(4, 0.1)) == pytest.approx(20.0)
    assert math.isinf(psnr_db(VIDEO, VIDEO))


def test_ssim_is_the_mean_over_frames() -> None:
    other = VIDEO.copy()
    other[1] = other[1, ::-1]
    assert ssim(VIDEO, VIDEO) == pytest.approx(1.0)
    assert ssim(other, VIDEO) == pytest.approx((1.0 + ssim(other[1:], VIDEO[1:])) / 2)
    assert ssim(other[1:], VIDEO[1:]) < 0.5


def test_cosine_sees_directions_only() -> None:
    assert cosine(3 * VIDEO, VIDEO) == pytest.approx(1.0)
    assert cosine(-VIDEO, VIDEO) == pytest.approx(-1.0)
    assert cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
