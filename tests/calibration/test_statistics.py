"""Streaming statistics against keeping every value."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.statistics import BINS, MIN_EXPONENT, TensorStatistics

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches_of_three = st.lists(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 3), st.just(3)), elements=finite), max_size=6
)


def observe(batches: list[np.ndarray], channels: int = 3) -> TensorStatistics:
    statistics = TensorStatistics(channels)
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_same(first: TensorStatistics, second: TensorStatistics) -> None:
    other = second.to_arrays()
    for name, array in first.to_arrays().items():
        assert array.tobytes() == other[name].tobytes(), name


def kept_histogram(values: np.ndarray) -> tuple[int, np.ndarray]:
    """The documented histogram in Python's exact integers and float64."""
    exponent = MIN_EXPONENT
    while values.size and 2.0**exponent <= float(np.abs(values).max()):
        exponent += 1
    histogram = np.zeros(BINS, np.int64)
    for value in np.abs(values.astype(np.float64)).ravel():
        histogram[int(value / (2.0**exponent / BINS))] += 1
    return exponent, histogram


@given(batches_of_three)
@settings(deadline=None)
def test_equals_keeping_everything(batches: list[np.ndarray]) -> None:
    statistics = observe(batches)
    kept = np.concatenate([batch.reshape(-1, 3) for batch in batches]) if batches else np.zeros((0, 3), np.float32)
    assert statistics.count == kept.size
    assert statistics.minimum == kept.min(initial=np.inf)
    assert statistics.maximum == kept.max(initial=-np.inf)
    assert statistics.absolute_maximum == np.abs(kept).max(initial=0)
    np.testing.assert_array_equal(statistics.channel_absolute_maximum, np.abs(kept).max(axis=0, initial=0))
    exponent, histogram = kept_histogram(kept)
    assert statistics.exponent == exponent
    np.testing.assert_array_equal(statistics.histogram, histogram)


@given(batches_of_three, st.randoms())
@settings(deadline=None)
def test_order_and_cut_do_not_matter(batches: list[np.ndarray], random: object) -> None:
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    rows = [row[None] for batch in shuffled for row in batch.reshape(-1, 3)]
    assert_same(observe(batches), observe(shuffled))
    assert_same(observe(batches), observe(rows))


@given(batches_of_three, batches_of_three, batches_of_three)
@settings(deadline=None)
def test_merge_is_the_same_in_any_order(
    first: list[np.ndarray], second: list[np.ndarray], third: list[np.ndarray]
) -> None:
    together = observe([*first, *second, *third])
    for order in ([first, second, third], [third, first, second], [second, third, first]):
        merged = TensorStatistics(3)
        for part in order:
            merged.merge(observe(part))
        assert_same(merged, together)


@given(batches_of_three)
@settings(deadline=None)
def test_arrays_bring_everything_back(batches: list[np.ndarray]) -> None:
    statistics = observe(batches)
    assert_same(TensorStatistics.from_arrays(statistics.to_arrays()), statistics)


def test_pieces_of_a_large_batch_are_the_same_as_the_batch() -> None:
    batch = np.random.default_rng(0).standard_normal((700, 3, 257)).astype(np.float32)
    statistics = observe([batch], 257)
    assert_same(statistics, observe(list(batch), 257))
    exponent, width = statistics.exponent, statistics.bin_width
    expected, _ = np.histogram(np.abs(batch).astype(np.float64), BINS, (0, 2.0**exponent))
    np.testing.assert_array_equal(statistics.histogram, expected)
    assert width == 2.0**exponent / BINS
    assert statistics.histogram[BINS // 2 :].any()


def test_memory_does_not_grow_with_what_is_observed() -> None:
    batch = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
    statistics = TensorStatistics(1024)
    statistics.update(batch[:1])
    tracemalloc.start()
    try:
        statistics.update(batch)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 200_000
    assert peak < batch.nbytes // 2


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_takes_other_types(kind: type) -> None:
    batch = np.array([[1.5, -2.25, 0.0]])
    assert_same(observe([batch.astype(kind)]), observe([batch.astype(np.float32)]))


def test_a_refused_batch_leaves_only_its_count() -> None:
    good = np.ones((2, 3), np.float32)
    bad = np.array([[1e9, np.nan, 0], [np.inf, -np.inf, 2]], np.float32)
    statistics = observe([good])
    with pytest.raises(NonFiniteError) as caught:
        statistics.update(bad)
    error = caught.value
    assert (error.nan, error.infinite, error.elements) == (1, 2, 6)
    assert statistics.non_finite == 3
    statistics.non_finite = 0
    assert_same(statistics, observe([good]))
    assert "the observed tensor holds values that are not finite" in str(error)
    located = error.located("dit", "double.3.image.fc2", 7)
    assert "the input of layer 'double.3.image.fc2' of stage 'dit' at step 7 holds" in str(located)
    assert "1 NaN and 2 infinite of 6 elements" in str(located)
    assert " at step" not in str(error.located("llm", "layers.0.q"))


def test_a_number_beyond_fp32_is_infinite() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        observe([np.array([[1e300, 0, 0]])])


def test_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 4\], expected \[\.\.\., 3\]"):
        TensorStatistics(3).update(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="4 channels, expected 3"):
        TensorStatistics(3).merge(TensorStatistics(4))


@pytest.mark.parametrize("name", TensorStatistics(3).to_arrays())
def test_damaged_arrays_are_refused(name: str) -> None:
    arrays = observe([np.ones((2, 3), np.float32)]).to_arrays()
    with pytest.raises(CalibrationError, match="damaged") as caught:
        TensorStatistics.from_arrays({**arrays, name: np.zeros((7, 7), np.int8)})
    assert name in str(caught.value)
    del arrays[name]
    with pytest.raises(CalibrationError, match="damaged"):
        TensorStatistics.from_arrays(arrays)


@pytest.mark.parametrize(("name", "message"), [("count", "7 elements"), ("exponent", "a range of 2\\*\\*2")])
def test_contradicting_arrays_are_refused(name: str, message: str) -> None:
    arrays = observe([np.ones((2, 3), np.float32)]).to_arrays()
    arrays[name] = arrays[name] + 1
    with pytest.raises(CalibrationError, match=message):
        TensorStatistics.from_arrays(arrays)
