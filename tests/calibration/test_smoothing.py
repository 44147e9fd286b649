"""Folding the factors changes no output; the factors even out the channels and are always usable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration.smoothing import (
    fold_into_affine,
    fold_into_modulation,
    fold_into_weight,
    input_channel_maxima,
    migration_factors,
)

TOKENS, WIDTH, OUT = 12, 16, 10
seeds = st.integers(0, 2**32 - 1)
alphas = st.floats(0, 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def spread_out(seed: int, channels: int) -> np.ndarray:
    """Channels of very different size, some of them zero."""
    sizes = np.exp2(np.random.default_rng(seed).integers(-8, 8, channels)).astype(np.float32)
    return np.where(np.random.default_rng(seed + 1).random(channels) < 0.1, 0, sizes).astype(np.float32)


def assert_unchanged(received: np.ndarray, expected: np.ndarray) -> None:
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), rtol=0)


@given(seeds, alphas)
@settings(deadline=None)
def test_folding_into_a_norm_leaves_the_output(seed: int, alpha: float) -> None:
    x_hat, weight = normal(seed, TOKENS, WIDTH), normal(seed, OUT, WIDTH)
    gain, bias = spread_out(seed, WIDTH), normal(seed, WIDTH)
    x = x_hat * gain + bias
    factors = migration_factors(np.abs(x).max(axis=0), input_channel_maxima(weight), alpha)
    new_gain, new_bias = fold_into_affine(gain, bias, factors)
    assert_unchanged((x_hat * new_gain + new_bias) @ fold_into_weight(weight, factors).T, x @ weight.T)
    rms_gain, none = fold_into_affine(gain, None, factors)
    assert none is None
    assert_unchanged((x_hat * rms_gain) @ fold_into_weight(weight, factors).T, (x_hat * gain) @ weight.T)


@given(seeds, alphas)
@settings(deadline=None)
def test_folding_into_a_modulation_leaves_the_output_for_every_step(seed: int, alpha: float) -> None:
    x_hat, weight = normal(seed, TOKENS, WIDTH), normal(seed, OUT, WIDTH)
    linear = normal(seed, 3 * WIDTH, 5) * np.tile(spread_out(seed, WIDTH), 3)[:, None] / 8
    bias = normal(seed, 3 * WIDTH)
    shift_rows, scale_rows, gate_rows = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3))

    def modulated(linear: np.ndarray, bias: np.ndarray, conditioning: np.ndarray) -> np.ndarray:
        rows = linear @ conditioning + bias
        return x_hat * (1 + rows[scale_rows]) + rows[shift_rows]

    steps = normal(seed + 1, 4, 5)
    maxima = np.max([np.abs(modulated(linear, bias, step)).max(axis=0) for step in steps], axis=0)
    factors = migration_factors(maxima, input_channel_maxima(weight), alpha)
    before = linear.copy(), bias.copy()
    new_linear, new_bias = fold_into_modulation(linear, bias, factors, shift_rows, scale_rows)
    assert new_bias is not None
    for step in steps:
        expected = modulated(linear, bias, step) @ weight.T
        assert_unchanged(modulated(new_linear, new_bias, step) @ fold_into_weight(weight, factors).T, expected)
    np.testing.assert_array_equal(new_linear[gate_rows], linear[gate_rows])
    np.testing.assert_array_equal(new_bias[gate_rows], bias[gate_rows])
    np.testing.assert_array_equal(linear, before[0])
    np.testing.assert_array_equal(bias, before[1])


@given(seeds, alphas)
@settings(deadline=None)
def test_folding_into_the_linear_before_an_attention_projection(seed: int, alpha: float) -> None:
    x, mixing = normal(seed, TOKENS, 6), np.abs(normal(seed, TOKENS, TOKENS))
    mixing /= mixing.sum(axis=1, keepdims=True)
    fused = normal(seed, 2 * WIDTH, 6) * np.tile(spread_out(seed, WIDTH), 2)[:, None]
    bias, projection = normal(seed, 2 * WIDTH), normal(seed, OUT, WIDTH)
    rows = slice(WIDTH, None)
    attended = mixing @ (x @ fused[rows].T + bias[rows])
    factors = migration_factors(np.abs(attended).max(axis=0), input_channel_maxima(projection), alpha)
    new_fused, new_bias = fold_into_affine(fused, bias, factors, rows)
    assert new_bias is not None
    received = mixing @ (x @ new_fused[rows].T + new_bias[rows]) @ fold_into_weight(projection, factors).T
    assert_unchanged(received, attended @ projection.T)
    np.testing.assert_array_equal(new_fused[:WIDTH], fused[:WIDTH])
    np.testing.assert_array_equal(new_bias[:WIDTH], bias[:WIDTH])


magnitudes = hnp.arrays(np.float32, 8, elements=st.floats(0, 2.0**127, width=32) | st.just(0.0))


@given(magnitudes, magnitudes, alphas)
@settings(deadline=None)
def test_factors_are_always_usable(x: np.ndarray, w: np.ndarray, alpha: float) -> None:
    factors = migration_factors(x, w, alpha)
    assert factors.dtype == np.float32
    assert ((factors >= 1 / 1024) & (factors <= 1024)).all()
    assert (factors[(x == 0) | (w == 0)] == 1).all()


def test_factors_are_the_published_formula() -> None:
    x, w = np.array([16.0, 4, 1], np.float32), np.array([0.25, 1, 4], np.float32)
    np.testing.assert_allclose(migration_factors(x, w, 0.5), [8, 2, 0.5])
    np.testing.assert_allclose(migration_factors(x, w, 1.0), x)
    np.testing.assert_allclose(migration_factors(x, w, 0.0), 1 / w)
    half = migration_factors(x, w, 0.5)
    np.testing.assert_allclose(x / half, w * half)  # both sides end equally large


def test_layers_that_share_an_input_share_their_maxima() -> None:
    q, k = np.array([[1, -5], [2, 0]], np.float32), np.array([[-3, 1]], np.float32)
    np.testing.assert_array_equal(input_channel_maxima(q, k), [3, 5])


@pytest.mark.parametrize(
    ("x", "w", "alpha", "limit", "message"),
    [
        ([1, 2], [1], 0.5, 2, "must be equal vectors"),
        ([[1]], [[1]], 0.5, 2, "must be equal vectors"),
        ([-1], [1], 0.5, 2, "negative or not finite"),
        ([np.nan], [1], 0.5, 2, "negative or not finite"),
        ([1], [np.inf], 0.5, 2, "negative or not finite"),
        ([1], [1], 1.1, 2, "alpha=1.1"),
        ([1], [1], 0.5, 0.5, "limit=0.5"),
    ],
)
def test_refuses_what_gives_no_factors(x: list, w: list, alpha: float, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        migration_factors(np.array(x, np.float32), np.array(w, np.float32), alpha, limit)


def test_refuses_factors_of_another_width() -> None:
    factors = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"columns have shape \[4\], the factors \[3\]"):
        fold_into_weight(np.ones((2, 4), np.float32), factors)
    with pytest.raises(ValueError, match=r"rows have shape \[2\], the factors \[3\]"):
        fold_into_affine(np.ones((4, 4), np.float32), None, factors, slice(2))
