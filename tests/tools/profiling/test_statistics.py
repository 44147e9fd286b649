"""Medians, percentiles and intervals against NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reelforge.tools.profiling.statistics import paired_ratio, percentile, timing

TIMES = st.lists(st.floats(0.01, 1e5), min_size=1, max_size=40)


@given(TIMES)
def test_a_timing_is_what_numpy_says(values: list[float]) -> None:
    found = timing(values)
    assert found.median_ms == pytest.approx(np.median(values))
    assert found.p95_ms == pytest.approx(np.percentile(values, 95))
    assert (found.count, found.min_ms, found.max_ms) == (len(values), min(values), max(values))
    quartiles = np.percentile(values, 75) - np.percentile(values, 25)
    assert found.spread == pytest.approx(quartiles / np.median(values), abs=1e-9)


@given(TIMES, st.floats(0, 1))
def test_percentiles(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) == pytest.approx(np.quantile(values, share))


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=2, max_size=31))
def test_the_interval_is_students(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    logarithms = np.log(np.array(theirs) / np.array(ours))
    ratio, low, high = paired_ratio(ours, theirs)
    assert low is not None
    assert high is not None
    assert math.log(ratio) == pytest.approx(logarithms.mean(), abs=1e-9)
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(logarithms)
    assert math.log(high) - math.log(low) == pytest.approx(2 * half, rel=1e-3, abs=1e-9)


@given(st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=2, max_size=9))
def test_swapping_the_bundles_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    ratio, low, high = paired_ratio(ours, theirs)
    inverse, other_low, other_high = paired_ratio(theirs, ours)
    assert low is not None and high is not None and other_low is not None and other_high is not None  # noqa: PT018
    assert (inverse, other_low, other_high) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_one_round_has_no_interval() -> None:
    assert paired_ratio([2.0], [3.0]) == (pytest.approx(1.5), None, None)
