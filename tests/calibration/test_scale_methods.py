"""The clips against numpy on the values themselves, brute force, and what each method promises."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.number_formats import (
    FORMATS,
    FP8_E4M3,
    INT8,
    NumberFormat,
    dequantise,
    quantise,
    unsigned_codes,
)
from reelforge.calibration.scale_methods import (
    ScaleMethod,
    _divergence,
    activation_range,
    activation_scale,
    entropy_clip,
    mse_clip,
    percentile_clip,
    squared_errors,
    weight_scales,
)
from reelforge.calibration.statistics import TensorStatistics

every_format = pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
every_method = pytest.mark.parametrize("method", ScaleMethod)
SAMPLES = 30_000


def sample(name: str) -> np.ndarray:
    generator = np.random.default_rng(5)
    values = {
        "normal": lambda: generator.standard_normal(SAMPLES),
        "laplace": lambda: generator.laplace(size=SAMPLES),
        "uniform": lambda: generator.uniform(-3, 3, SAMPLES),
        "outliers": lambda: np.append(generator.standard_normal(SAMPLES), [150.0, -90.0, 60.0]),
        "one_sided": lambda: np.abs(generator.standard_normal(SAMPLES)) * 1e-3,
    }[name]()
    return values.astype(np.float32)[:, None]


def observed(values: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics(values.shape[-1])
    statistics.update(values)
    return statistics


def measured_error(values: np.ndarray, clip: float, number_format: NumberFormat) -> float:
    """The mean squared error by quantising every value: knows nothing of histograms."""
    scale = clip / number_format.largest
    return float(np.mean((dequantise(quantise(values, scale, number_format), scale) - values.astype(np.float64)) ** 2))


distributions = pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "outliers", "one_sided"])


@every_format
@distributions
def test_mse_is_as_good_as_brute_force(number_format: NumberFormat, name: str) -> None:
    values = sample(name)
    largest = float(np.abs(values).max())
    clips = largest * 2.0 ** -np.arange(0, 9, 1 / 32)
    best = min(measured_error(values, clip, number_format) for clip in clips)
    chosen = mse_clip(observed(values), number_format)
    assert measured_error(values, chosen, number_format) <= best * 1.01
    assert 0 < chosen <= largest


@distributions
def test_mse_of_int8_is_where_brute_force_is(name: str) -> None:
    values = sample(name)
    clips = np.abs(values).max() * 2.0 ** -np.arange(0, 9, 1 / 32)
    best = clips[np.argmin([measured_error(values, clip, INT8) for clip in clips])]
    assert mse_clip(observed(values), INT8) == pytest.approx(best, rel=0.08)  # flat around the minimum


@every_format
@given(st.floats(0.05, 20))
@settings(max_examples=20, deadline=None)
def test_expected_error_is_the_integral(number_format: NumberFormat, clip: float) -> None:
    edges = np.array([0.0, 0.3, 1.0, 4.0])
    counts = np.array([2.0, 5.0, 1.0])
    dense = [(np.arange(100_000) + 0.5) / 100_000 * (b - a) + a for a, b in itertools.pairwise(edges)]
    errors = [measured_error(part, clip, number_format) for part in dense]
    expected = float(np.dot(errors, counts) / counts.sum())
    received = squared_errors(edges, counts, clip / number_format.largest * number_format.grid[None])
    assert received.tolist() == [pytest.approx(expected, rel=2e-3, abs=1e-12)]


def measured_range_error(values: np.ndarray, limits: np.ndarray) -> float:
    scale, zero_point = unsigned_codes(*limits.tolist())
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return float(np.mean(((codes - zero_point) * scale - values.astype(np.float64)) ** 2))


@pytest.mark.parametrize("name", ["normal", "laplace", "uniform", "outliers", "one_sided", "gelu", "negative"])
def test_the_range_of_mse_is_as_good_as_brute_force(name: str) -> None:
    values = {"gelu": lambda: np.maximum(sample("laplace"), -0.17), "negative": lambda: -sample("one_sided")}.get(
        name, lambda: sample(name)
    )()
    ends = np.array([min(values.min(), 0), max(values.max(), 0)])
    clips = np.abs(ends).max() * 2.0 ** -np.arange(0, 9, 1 / 32)
    best = min(measured_range_error(values, np.clip(ends, -clip, clip)) for clip in clips)
    statistics = observed(values)
    scale = activation_scale(statistics, INT8, ScaleMethod.MSE)
    chosen = activation_range(statistics, scale, ScaleMethod.MSE)
    assert measured_range_error(values, chosen) <= best * 1.02
    if name in ("gelu", "one_sided", "negative"):  # twice the codes, a quarter of the error
        assert measured_range_error(values, chosen) < 0.4 * measured_error(values, scale * 127, INT8)


@every_method
@given(hnp.arrays(np.float32, (20, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=20, deadline=None)
def test_ranges_hold_zero_and_what_is_not_clipped(method: ScaleMethod, values: np.ndarray) -> None:
    statistics = observed(values)
    scale = activation_scale(statistics, INT8, method)
    limits = activation_range(statistics, scale, method)
    ends = np.array([min(values.min(), 0), max(values.max(), 0)], np.float32)
    assert limits.dtype == np.float32
    assert ends[0] <= limits[0] <= 0 <= limits[1] <= ends[1]
    assert not np.signbit(limits[limits == 0]).any()
    if method is ScaleMethod.MAX:
        np.testing.assert_array_equal(limits, ends)
    elif method is not ScaleMethod.MSE:
        np.testing.assert_allclose(limits, np.clip(ends, -127 * scale, 127 * scale), rtol=1e-6)


def test_mse_clips_tails_and_keeps_what_has_none() -> None:
    for name in ("normal", "laplace", "outliers"):
        statistics = observed(sample(name))
        assert mse_clip(statistics, INT8) < 0.93 * statistics.absolute_maximum, name
    assert mse_clip(observed(sample("uniform")), INT8) > 0.98 * 3


@distributions
@pytest.mark.parametrize("percentile", [50, 99.0, 99.9, 99.99, 99.999, 100])
def test_percentile_equals_numpy_within_a_bin(name: str, percentile: float) -> None:
    statistics = observed(sample(name))
    magnitudes = np.sort(np.abs(sample(name).astype(np.float64)).ravel())
    # Between two samples numpy's definitions differ; any of them lies between the neighbours.
    lowest = np.percentile(magnitudes, percentile, method="inverted_cdf")
    highest = np.percentile(magnitudes, percentile, method="higher")
    clip = percentile_clip(statistics, percentile)
    assert lowest - statistics.bin_width <= clip <= highest + statistics.bin_width


def test_percentile_grows_with_the_percentage() -> None:
    statistics = observed(sample("laplace"))
    clips = [percentile_clip(statistics, percentile) for percentile in (50, 99, 99.9, 99.99, 99.999, 100)]
    assert clips == sorted(clips)
    assert clips[-1] == statistics.absolute_maximum


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_impossible_percentiles_are_refused(percentile: float) -> None:
    with pytest.raises(CalibrationError, match="is not possible"):
        activation_scale(observed(sample("normal")), INT8, ScaleMethod.PERCENTILE, percentile)


@every_format
def test_entropy_keeps_the_full_range_of_a_uniform_distribution(number_format: NumberFormat) -> None:
    values = np.linspace(-3, 3, 400_001, dtype=np.float32)[:, None]
    assert entropy_clip(observed(values), number_format) >= 0.99 * 3


def test_a_peak_at_zero_does_not_decide_entropy() -> None:
    """As behind a GELU: most values are nearly zero, and the others use the whole range."""
    random = np.random.default_rng(11)
    spread = random.uniform(-3, 3, 20_000)
    peak = random.normal(0, 1e-4, 400_000)
    values = np.concatenate([spread, peak]).astype(np.float32).reshape(-1, 4)
    assert entropy_clip(observed(values), INT8) >= 0.9 * 3


def test_entropy_clips_long_tails_of_int8() -> None:
    # Empty bins are no candidates: with lone outliers at 60, 90 and 150 one of them is chosen, and the largest are cut.
    for name, low, high in [("normal", 2.0, 4.2), ("laplace", 4.0, 10.0), ("outliers", 59.0, 61.0)]:
        assert low < entropy_clip(observed(sample(name)), INT8) < high, name


def test_divergence_is_the_published_pseudocode() -> None:
    """The publication in loops over floats, for the first candidates, the last, and one with an empty last bin."""
    values = np.random.default_rng(2).laplace(size=(20_000, 1)).astype(np.float32)
    bins = observed(values).histogram.reshape(2048, -1).sum(axis=1)
    used = max(i for i in range(2048) if bins[i]) + 1
    empty = min(i for i in range(128, used) if not bins[i]) + 1
    for size in (128, 129, 200, 255, 256, empty, used):
        reference = [float(count) for count in bins[:size]]
        reference[-1] += float(bins[size:].sum())
        candidate = [0.0] * size
        for level in range(128):
            span = range(level * size // 128, (level + 1) * size // 128)
            filled = [i for i in span if bins[i]]
            for i in filled:
                candidate[i] = sum(float(bins[j]) for j in span) / len(filled)
        expected = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p:
                p, q = p / sum(reference), q / sum(candidate)
                expected += p * np.log(p / q) if q else np.inf
        assert _divergence(bins[:used].astype(float), size, INT8) == pytest.approx(expected, rel=1e-9), size
        assert np.isinf(expected) == (size == empty)


@every_format
@every_method
@given(st.integers(-40, 40))
@settings(max_examples=5, deadline=None)
def test_scales_follow_the_values(number_format: NumberFormat, method: ScaleMethod, exponent: int) -> None:
    values = np.random.default_rng(1).laplace(size=(4000, 1)).astype(np.float32)
    scale = activation_scale(observed(values), number_format, method)
    scaled = activation_scale(observed(np.ldexp(values, exponent)), number_format, method)
    assert scaled == pytest.approx(np.ldexp(scale, exponent), rel=1e-6)


@every_format
@every_method
@given(hnp.arrays(np.float32, (20, 1), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=10, deadline=None)
def test_no_scale_is_zero_or_beyond_the_maximum(
    number_format: NumberFormat, method: ScaleMethod, values: np.ndarray
) -> None:
    scale = activation_scale(observed(values), number_format, method)
    assert scale.dtype == np.float32
    assert np.isfinite(scale)
    assert scale > 0
    largest = np.abs(values).max()
    if largest > 1e-30:
        assert scale <= np.float32(largest / number_format.largest) * (1 + 1e-6)
    quantise(values, scale, number_format)


@every_format
@every_method
def test_a_tensor_of_zeros_has_scale_one(number_format: NumberFormat, method: ScaleMethod) -> None:
    assert activation_scale(observed(np.zeros((4, 1), np.float32)), number_format, method) == 1


@every_method
@pytest.mark.parametrize("value", [1.0, 0.7, 1e-38, 3e38])
def test_a_constant_tensor_keeps_its_value(method: ScaleMethod, value: float) -> None:
    scale = activation_scale(observed(np.full((500, 1), value, np.float32)), INT8, method)
    received = dequantise(quantise(np.float32([value]), scale, INT8), scale)
    assert received[0] == pytest.approx(value, rel=0.02)


def test_max_is_the_maximum() -> None:
    values = sample("normal")
    for number_format in FORMATS.values():
        scale = activation_scale(observed(values), number_format, ScaleMethod.MAX)
        assert scale == np.float32(np.abs(values).max() / number_format.largest)


def test_nothing_observed_and_non_finite_statistics_are_refused() -> None:
    statistics = TensorStatistics(1)
    with pytest.raises(CalibrationError, match="a tensor was never observed"):
        activation_scale(statistics, INT8, ScaleMethod.MAX)
    statistics.update(np.ones((1, 1), np.float32))
    with pytest.raises(NonFiniteError):
        statistics.update(np.full((1, 1), np.nan, np.float32))
    with pytest.raises(CalibrationError, match="1 NaN or infinite elements"):
        activation_scale(statistics, INT8, ScaleMethod.MAX)


@every_format
@given(hnp.arrays(np.float32, (4, 6), elements=st.floats(-(2.0**99), 2.0**99, width=32)), st.integers(-2, 1))
@settings(deadline=None)
def test_weight_scales_keep_every_channel_within_half_a_step(
    number_format: NumberFormat, weight: np.ndarray, axis: int
) -> None:
    scales = weight_scales(weight, number_format, axis)
    assert scales.shape == (weight.shape[axis],)
    assert (np.isfinite(scales) & (scales > 0)).all()
    codes = quantise(weight, scales, number_format, axis)
    restored = dequantise(codes, scales, axis).astype(np.float64)
    spread = np.expand_dims(scales, 1 if axis in (0, -2) else 0).astype(np.float64)
    half_steps = number_format.step(weight / spread) / 2 * spread
    assert (np.abs(restored - weight) <= half_steps * (1 + 1e-4) + 1e-44).all()


@every_format
def test_zero_and_tiny_channels(number_format: NumberFormat) -> None:
    weight = np.array([[0, 0], [1e-45, 0], [-1e-38, 1e-39], [2, -4]], np.float32)
    scales = weight_scales(weight, number_format)
    assert scales[0] == 1
    assert (scales >= np.finfo(np.float32).tiny).all()
    codes = quantise(weight, scales, number_format, 0)
    np.testing.assert_array_equal(codes[0].astype(np.float32), 0)
    assert codes[3].astype(np.float32)[1] == -number_format.largest


def test_weight_scales_of_convolutions_and_half_precision() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2, 2)).astype(ml_dtypes.bfloat16)
    expected = np.abs(weight.astype(np.float32)).reshape(4, -1).max(axis=1) / np.float32(448)
    np.testing.assert_array_equal(weight_scales(weight, FP8_E4M3), expected)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = np.array([[1, np.nan], [np.inf, 0]], np.float32)
    with pytest.raises(NonFiniteError, match="a weight holds values that are not finite"):
        weight_scales(weight, INT8)
