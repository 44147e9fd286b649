"""Metrics against independent ones in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from reelforge.calibration.quality import cosine, drift, psnr, relative_error, ssim

RANDOM = np.random.default_rng(5)


def videos(frames: int = 3, height: int = 16, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    expected = RANDOM.random((frames, height, width, 3))
    received = np.clip(expected + 0.05 * RANDOM.standard_normal(expected.shape), 0, 1)
    return received.astype(np.float32), expected.astype(np.float32)


def test_psnr_is_scikit_image_s() -> None:
    received, expected = videos()
    assert psnr(received, expected) == pytest.approx(
        peak_signal_noise_ratio(expected.astype(np.float64), received.astype(np.float64), data_range=1.0), rel=1e-12
    )


@given(st.floats(1e-6, 1.0))
def test_psnr_of_a_constant_difference(difference: float) -> None:
    expected = np.zeros((1, 4, 4, 3))
    assert psnr(expected + difference, expected) == pytest.approx(-20 * math.log10(difference), abs=1e-9)


def test_psnr_sees_what_fp32_squares_lose() -> None:
    """One value off by the least step of fp32 below one, among a million."""
    expected = np.full((1, 512, 1024, 3), 1.0, np.float32)
    received = expected.copy()
    received[0, 0, 0, 0] = np.nextafter(np.float32(1), np.float32(0))
    step = 1.0 - float(received[0, 0, 0, 0])
    assert psnr(received, expected) == pytest.approx(10 * math.log10(expected.size / step**2), rel=1e-12)


def test_equal_videos() -> None:
    video = videos()[0]
    assert psnr(video, video) == math.inf
    assert ssim(video, video) == 1.0


def test_ssim_is_scikit_image_s_mean_over_frames() -> None:
    received, expected = videos()
    wanted = np.mean(
        [
            structural_similarity(expected[frame], received[frame], channel_axis=2, data_range=1.0)
            for frame in range(len(expected))
        ]
    )
    assert ssim(received, expected) == pytest.approx(wanted, abs=1e-6)
    assert ssim(received[:1], expected[:1]) != ssim(received, expected)


@pytest.mark.parametrize(("side", "window"), [(3, 3), (4, 3), (5, 5), (6, 5), (7, 7), (8, 7)])
def test_ssim_of_small_frames(side: int, window: int) -> None:
    received, expected = videos(2, side, 20)
    wanted = [
        structural_similarity(one, other, channel_axis=2, data_range=1.0, win_size=window)
        for one, other in zip(expected, received, strict=True)
    ]
    assert ssim(received, expected) == pytest.approx(np.mean(wanted), abs=1e-6)


def test_ssim_of_frames_without_a_window() -> None:
    with pytest.raises(ValueError, match="2x20 pixels are too small"):
        ssim(np.zeros((1, 2, 20, 3)), np.zeros((1, 2, 20, 3)))


def test_cosine_and_relative_error_in_float64() -> None:
    a = RANDOM.standard_normal((4, 5, 6)).astype(np.float32)
    b = (a + 0.1 * RANDOM.standard_normal(a.shape)).astype(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert cosine(a, b) == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()), rel=1e-14)
    assert relative_error(a, b) == pytest.approx(np.sqrt(((x - y) ** 2).sum() / (y**2).sum()), rel=1e-14)


@given(st.floats(0.001, 1000), st.integers(0, 2**32 - 1))
def test_what_scaling_does(factor: float, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(50)
    assert cosine(factor * values, values) == pytest.approx(1, abs=1e-12)
    assert cosine(-factor * values, values) == pytest.approx(-1, abs=1e-12)
    assert -1 <= cosine(factor * values, values) <= 1
    assert relative_error(factor * values, values) == pytest.approx(abs(factor - 1), abs=1e-9)


def test_zeros_have_a_direction_only_together() -> None:
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert (cosine(zeros, zeros), cosine(zeros, ones), cosine(ones, zeros)) == (1.0, 0.0, 0.0)
    assert relative_error(zeros, zeros) == 0.0
    assert math.isfinite(relative_error(ones, zeros))
    assert relative_error(ones, zeros) > 1e30


def test_drift_is_the_relative_error_after_each_step() -> None:
    expected = [RANDOM.standard_normal((1, 4, 2, 3, 3)) for _ in range(3)]
    received = [expected[0], 1.01 * expected[1], 0.9 * expected[2]]
    assert drift(received, expected) == pytest.approx((0.0, 0.01, 0.1))


def test_different_shapes_are_refused() -> None:
    a, b = np.zeros((2, 8, 8, 3)), np.zeros((1, 8, 8, 3))
    for metric in (psnr, ssim, cosine, relative_error):
        with pytest.raises(ValueError, match=r"\[2, 8, 8, 3\] and \[1, 8, 8, 3\]"):
            metric(a, b)
    with pytest.raises(ValueError, match="longer"):
        drift([a], [a, a])
