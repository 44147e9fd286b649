"""What the command line and requests may say about step caching, and every way to say it wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.schedule import flow_match_sigmas
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.rescaling import Rescaling
from reelforge.runtime.step_cache.settings import Method, Reuse, StepCache

RATIOS = MagnitudeRatios((1.0, 0.8, 0.5, 0.2), (1.0, 1.1, 0.9, 0.5), (0.0, 0.1, 0.1, 0.2), 3, "abc")

TEA = Rescaling((1.5, -0.25, 0.125), 0.01, 0.4, 0.002, 4, "abc")


@pytest.fixture
def ratios_file(tmp_path: Path) -> Path:
    path = tmp_path / "ratios.json"
    RATIOS.write(path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("easycache:0.025", StepCache(Method.EASYCACHE, 0.025)),
        ("easycache:0", StepCache(Method.EASYCACHE, 0.0)),
        ("easycache: 1e-1 , warmup=3", StepCache(Method.EASYCACHE, 0.1, 3)),
        (
            "easycache:0.1,reuse=residual,max-skips=2",
            StepCache(Method.EASYCACHE, 0.1, None, Reuse.RESIDUAL, 2),
        ),
        ("easycache:0.1,reuse=velocity", StepCache(Method.EASYCACHE, 0.1, reuse=Reuse.VELOCITY)),
    ],
)
def test_what_can_be_written(text: str, expected: StepCache) -> None:
    assert StepCache.parse(text) == expected
    assert expected.problems() == []


def test_ratios_come_from_a_file(ratios_file: Path) -> None:
    made = StepCache.parse(f"magcache:0.12,ratios={ratios_file}")
    assert made == StepCache(Method.MAGCACHE, 0.12, ratios=RATIOS)
    assert made.problems() == []


@pytest.mark.parametrize(
    ("text", "parted", "stages"),
    [
        ("easycache:0.1", False, ("step_change", "step_reuse")),
        ("magcache:0.1", False, ("step_reuse",)),
        ("teacache:0.1", False, ("input_change", "step_reuse")),
        ("teacache:0.1,reuse=tokens", True, ("dit_head", "dit_body", "dit_tail", "input_change", "token_reuse")),
        ("fbcache:0.08", True, ("dit_head", "dit_body", "dit_tail", "head_change", "step_reuse")),
        ("fbcache:0.08,reuse=tokens", True, ("dit_head", "dit_body", "dit_tail", "head_change", "token_reuse")),
    ],
)
def test_what_a_bundle_must_have(text: str, parted: bool, stages: tuple[str, ...]) -> None:
    made = StepCache.parse(text)
    assert (made.parted, made.stages) == (parted, stages)


def test_coefficients_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tea.json"
    TEA.write(path)
    made = StepCache.parse(f"teacache:0.1,coefficients={path}")
    assert made == StepCache(Method.TEACACHE, 0.1, coefficients=TEA)
    assert made.problems() == []
    assert StepCache.parse("teacache:0.1") == StepCache(Method.TEACACHE, 0.1)
    assert StepCache.parse("teacache:0.1").problems() == [], "what is published may serve the bundle"


@pytest.mark.parametrize(
    "text",
    ["", "easycache", "easycache:", "easycache:much", "0.025", "teacake:0.1", "easycache:0.1,", "easycache:0.1,warmup",
     "easycache:0.1,warmup=few", "easycache:0.1,warmup=2,warmup=3", "easycache:0.1,reuse=all", "easycache:0.1,cache=2",
     "easycache:0.1,max-skips=1.5", "easycache:0.1:warmup=2"],
)  # fmt: skip
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError, match="cannot be read") as caught:
        StepCache.parse(text)
    assert repr(text) in str(caught.value)
    assert "easycache:0.025" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (StepCache(Method.EASYCACHE, float("nan")), "threshold=nan"),
        (StepCache(Method.EASYCACHE, float("inf")), "threshold=inf"),
        (StepCache(Method.EASYCACHE, -0.1), "threshold=-0.1"),
        (StepCache(Method.EASYCACHE, "0.1"), "threshold='0.1'"),  # type: ignore[arg-type]
        (StepCache(Method.EASYCACHE, 0.1, warmup=1), "warmup=1"),
        (StepCache("easycache", 0.1), "method='easycache'"),  # type: ignore[arg-type]
        (StepCache(Method.EASYCACHE, 0.1, reuse="residual"), "reuse='residual'"),  # type: ignore[arg-type]
        (StepCache(Method.EASYCACHE, 0.1, warmup=2.5), "warmup=2.5"),  # type: ignore[arg-type]
        (StepCache(Method.EASYCACHE, 0.1, max_skips=0), "max_skips=0"),
        (StepCache(Method.MAGCACHE, 0.1), "magcache without ratios"),
        (StepCache(Method.EASYCACHE, 0.1, ratios=RATIOS), "ratios with easycache"),
        (StepCache(Method.TEACACHE, 0.1, ratios=RATIOS), "ratios with teacache"),
        (StepCache(Method.MAGCACHE, 0.1, ratios=RATIOS, coefficients=TEA), "coefficients with magcache"),
        (StepCache(Method.TEACACHE, 0.1, coefficients=replace(TEA, coefficients=())), "coefficients: no coefficients"),
        (StepCache(Method.MAGCACHE, 0.1, ratios=replace(RATIOS, ratios=(1.0, 0.5))), "4 sigmas and 2 ratios"),
    ],
)
def test_values_that_mean_nothing(setting: StepCache, said: str) -> None:
    (problem,) = setting.problems()
    assert said in problem.received
    assert problem.expected
    assert problem.fix


def test_several_problems_are_listed_together() -> None:
    assert len(StepCache(Method.MAGCACHE, -1.0, warmup=0, max_skips=0).problems()) == 4


def test_defaults_are_the_papers_shares() -> None:
    easy, mag, tea = (StepCache(method, 0.1) for method in (Method.EASYCACHE, Method.MAGCACHE, Method.TEACACHE))
    assert ([tea.first_steps(steps) for steps in (1, 50)], tea.longest_run()) == ([2, 2], 3)
    assert [easy.first_steps(steps) for steps in (1, 20, 50, 55)] == [2, 2, 5, 6]
    assert [mag.first_steps(steps) for steps in (1, 20, 50)] == [2, 4, 10]
    assert replace(easy, warmup=7).first_steps(50) == 7
    assert (easy.longest_run(), mag.longest_run(), replace(mag, max_skips=2).longest_run()) == (3, 4, 2)


# Ratios


def test_the_measured_schedule_gives_the_measured_ratios() -> None:
    np.testing.assert_allclose(RATIOS.at(np.array(RATIOS.sigmas, np.float32)), RATIOS.ratios, rtol=1e-6)


@given(st.integers(2, 40), st.integers(2, 40), st.floats(1, 12), st.floats(1, 12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_other_schedules_have_the_same_magnitudes(
    measured: int, wanted: int, shift: float, other_shift: float, seed: int
) -> None:
    """Whatever the steps, the product of the ratios down to a measured noise level is the measured magnitude there."""
    sigmas = flow_match_sigmas(measured, shift)[:-1]
    ratios = np.concatenate([[1.0], np.random.default_rng(seed).uniform(0.7, 1.3, measured - 1)])
    made = MagnitudeRatios(tuple(map(float, sigmas)), tuple(map(float, ratios)))
    schedule = flow_match_sigmas(wanted, other_shift)[:-1]
    found = made.at(schedule)
    assert found[0] == 1
    assert (found > 0).all()
    joined = np.unique(np.concatenate([schedule, sigmas]))[::-1]
    levels = np.cumprod(made.at(joined))
    for sigma, magnitude in zip(sigmas, np.cumprod(ratios), strict=True):
        assert levels[np.flatnonzero(joined == sigma)[0]] == pytest.approx(magnitude, rel=1e-6)
    assert np.prod(found) == pytest.approx(levels[np.flatnonzero(joined == schedule[-1])[0]], rel=1e-5)


def test_below_the_measured_range_the_slope_goes_on() -> None:
    found = RATIOS.at(np.array([1.0, 0.2, 0.1], np.float32))
    assert found[2] == pytest.approx(0.5 ** (0.1 / 0.3), rel=1e-6)


def test_a_file_comes_back_as_it_was_written(ratios_file: Path, tmp_path: Path) -> None:
    assert MagnitudeRatios.read(ratios_file) == RATIOS
    with pytest.raises(OutputError, match="magnitude ratios cannot be written"):
        RATIOS.write(tmp_path / "nowhere" / "ratios.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "no object of schema version 1"),
        ({"ratios": [1.0, "2"]}, "'ratios' is not a list of finite numbers"),
        ({"sigmas": None}, "'sigmas' is not a list"),
        ({"sigmas": [1.0, float("nan"), 0.5, 0.2]}, "'sigmas' is not a list of finite"),
        ({"ratios": [1.0]}, "4 sigmas and 1 ratios"),
        ({"ratios": [1.0, 1.0, -1.0, 1.0]}, "not a finite number above 0"),
        ({"sigmas": [1.0, 0.8, 0.8, 0.2]}, "the sigmas do not fall"),
    ],
)
def test_files_that_hold_something_else(ratios_file: Path, change: dict[str, object], said: str) -> None:
    content = json.loads(ratios_file.read_text())
    ratios_file.write_text(json.dumps({**content, **change}))
    with pytest.raises(RequestError, match="does not hold magnitude ratios") as caught:
        StepCache.parse(f"magcache:0.1,ratios={ratios_file}")
    assert said in str(caught.value)
    assert "reelforge measure-ratios BUNDLE" in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'"text"'])
def test_files_that_are_not_json_objects(ratios_file: Path, content: bytes) -> None:
    ratios_file.write_bytes(content)
    with pytest.raises(RequestError, match="does not hold magnitude ratios"):
        MagnitudeRatios.read(ratios_file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        MagnitudeRatios.read(tmp_path / "ratios.json")
