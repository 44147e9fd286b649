"""TeaCache's polynomials: their values, fits of them, their files, and what is published."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.spec import DitSpec
from reelforge.runtime.step_cache.rescaling import Rescaling, fit, published
from reelforge.runtime.step_cache.settings import StepCache
from tests.runtime.fake_bundle import SPEC

TEA = Rescaling((1.5, -0.25, 0.125), 0.01, 0.4, 0.002, 4, "abc")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_values_are_the_polynomials_and_never_negative(coefficients: list[float], change: float) -> None:
    expected = max(float(np.poly1d(coefficients)(change)), 0.0)
    assert Rescaling(tuple(coefficients)).estimate(change) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_beyond_what_was_measured_its_ends_count() -> None:
    assert TEA.estimate(0.0) == TEA.estimate(0.01)
    assert TEA.estimate(7.0) == TEA.estimate(math.inf) == TEA.estimate(0.4)
    assert TEA.estimate(0.2) not in (TEA.estimate(0.01), TEA.estimate(0.4))
    assert math.isnan(TEA.estimate(math.nan)), "what is not a number is never small"


@given(st.lists(st.floats(-2, 2), min_size=5, max_size=5), st.integers(0, 1000), st.integers(6, 60))
@settings(max_examples=60, deadline=None)
def test_a_polynomial_is_found_again(coefficients: list[float], seed: int, points: int) -> None:
    changes = np.random.default_rng(seed).permutation(np.linspace(0.01, 0.7, points))
    made = fit(list(changes), list(np.poly1d(coefficients)(changes)), 3, "abc")
    assert (made.least, made.most, made.generations, made.bundle) == (0.01, 0.7, 3, "abc")
    assert made.deviation == pytest.approx(0, abs=1e-9)
    for change in changes:
        assert made.estimate(change) == pytest.approx(max(np.poly1d(coefficients)(change), 0), abs=1e-7)


def test_a_fit_is_numpys() -> None:
    random = np.random.default_rng(0)
    x, y = random.uniform(0.02, 0.3, 50), random.uniform(0, 0.2, 50)
    made = fit(list(x), list(y))
    np.testing.assert_allclose(made.coefficients, np.polyfit(x, y, 4), rtol=1e-6)
    assert made.deviation == pytest.approx(np.sqrt(np.mean((np.polyval(made.coefficients, x) - y) ** 2)))


def test_what_is_published_is_of_the_released_size_only() -> None:
    full = replace(
        SPEC,
        family="hunyuan_video",
        dit=DitSpec(3072, 24, 128, 20, 40, 2, 12288, 16, (1, 2, 2), 4096, 768, (16, 56, 56), 256.0, 256, 1e-6, True),
    )
    known = published(full)
    assert known is not None
    # The numbers of TeaCache4HunyuanVideo at a change of 0.1, computed by hand with its np.poly1d.
    assert known.estimate(0.1) == pytest.approx(0.0733226126 - 0.401131952 + 0.675869174 - 0.31498780 + 0.0961237896)
    assert all(known.estimate(change) > 0 for change in np.linspace(0, 1, 101))
    assert published(replace(full, dit=replace(full.dit, width=1536))) is None
    assert published(SPEC) is None


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    TEA.write(tmp_path / "tea.json")
    assert Rescaling.read(tmp_path / "tea.json") == TEA
    with pytest.raises(OutputError, match="TeaCache's coefficients cannot be written"):
        TEA.write(tmp_path / "nowhere" / "tea.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "no object of schema version 1"),
        ({"coefficients": [1.0, "2"]}, "'coefficients' is not a list of finite numbers"),
        ({"coefficients": []}, "no coefficients"),
        ({"range": [0.1]}, "a range of 1 numbers"),
        ({"range": [0.4, 0.1]}, "the range 0.4 to 0.1"),
        ({"range": [-0.1, 0.1]}, "the range -0.1 to 0.1"),
        ({"deviation": "small"}, "'deviation' is not a list of finite numbers"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "tea.json"
    TEA.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RequestError, match="does not hold TeaCache's coefficients") as caught:
        StepCache.parse(f"teacache:0.1,coefficients={path}")
    assert said in str(caught.value)
    assert "reelforge measure-coefficients BUNDLE" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        Rescaling.read(tmp_path / "tea.json")
