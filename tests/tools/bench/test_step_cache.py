"""The report on step caching: its numbers from points whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.tools.bench.demo_model import held_out_cases
from reelforge.tools.bench.step_cache import HEADINGS, TEACACHE_PROMPTS, rows, verdicts
from reelforge.tools.bench.step_cache_chart import COLOURS, draw_chart
from reelforge.tools.bench.step_cache_overhead import STEPS as OVERHEAD_STEPS
from reelforge.tools.bench.step_cache_overhead import overhead_us
from reelforge.tools.bench.step_cache_runs import Point, Setting, line, psnr, settings_of

STEPS = 20


def point(series: str, label: str, evaluations: tuple[int, ...], *decibels: float) -> Point:
    cache = "" if series in ("full run", "fewer steps") else "easycache:0.1"
    errors = tuple(0.0 if value == np.inf else 10 ** (-value / 10) for value in decibels)
    return Point(Setting(series, label, STEPS, cache), evaluations, errors, 1.0, (0.1, 0.2), (0.1, 0.1))


FULL = point("full run", "20 steps", (20, 20), np.inf, np.inf)
FEWER = [point("fewer steps", str(n), (n, n), 30.0 + n, 28.0 + n) for n in (5, 10, 15)]


def test_the_ratio_of_all_videos_is_that_of_the_mean_error() -> None:
    made = point("EasyCache", "0.1", (10, 12), 40.0, 30.0)
    assert made.psnr_db == pytest.approx(psnr((1e-4 + 1e-3) / 2))
    assert made.lowest_db == pytest.approx(30.0)
    assert made.mean_evaluations == 11
    assert FULL.psnr_db == np.inf


def test_the_line_of_fewer_steps_is_interpolated() -> None:
    assert line(FEWER, lambda one: one.lowest_db, 12.5) == pytest.approx(28 + 12.5)


def test_rows_say_how_far_above_fewer_steps_a_setting_is() -> None:
    cached = point("EasyCache", "0.1", (10, 15), 45.0, 45.0)
    nothing = point("EasyCache", "0.01", (20, 20), np.inf, np.inf)
    table = rows([FULL, *FEWER, cached, nothing])
    assert all(len(row) == len(HEADINGS) for row in table)
    assert table[0][3:7] == ["equal", "equal", "", ""]
    assert table[4][1:3] == ["12.5 (10-15)", "1.60"]
    assert table[4][6] == "+4.5"
    assert float(table[4][5]) == pytest.approx(45 - line(FEWER, lambda one: one.psnr_db, 12.5), abs=0.06)
    assert table[5][3:7] == ["equal", "equal", "", ""]


@pytest.mark.parametrize(
    ("evaluations", "lowest", "said"),
    [
        (
            (10, 10),
            45.0,
            [
                "**Met**, also by the worst video, by 1 of 1 settings",
                "2.00x fewer",
                "EasyCache: for all videos together **met** (+",
            ],
        ),
        ((12, 12), 45.0, ["**Missed.**"]),
        ((10, 10), 29.0, ["**Missed.**", "for the worst video **missed** by 1 of 1 settings (-9.0 to -9.0)"]),
    ],
)
def test_goals_are_met_or_missed(evaluations: tuple[int, ...], lowest: float, said: list[str]) -> None:
    lines = "\n".join(verdicts([FULL, *FEWER, point("EasyCache", "0.1", evaluations, 50.0, lowest)]))
    for words in said:
        assert words in lines


def test_all_series_are_drawn() -> None:
    settings = settings_of(STEPS, Path("r.json"), Path("tea.json"))
    points = [point(one.series, one.label, (10, 11), 40.0, 35.0) for one in settings]
    picture = draw_chart([FULL, *points], STEPS)
    assert picture.startswith(b"\x89PNG")
    assert draw_chart([FULL, *points], STEPS) == picture
    assert {one.series for one in settings} == set(COLOURS)
    assert {one.steps for one in settings if one.series == "fewer steps"} >= {5, 8, 11, 19}


def test_what_calibrates_is_not_what_is_judged() -> None:
    assert not {case.prompt for case in held_out_cases()} & set(TEACACHE_PROMPTS)


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
def test_the_hosts_own_time_is_measured_for_every_step(threshold: float | None) -> None:
    times = overhead_us(threshold)
    assert len(times) == OVERHEAD_STEPS - 101
    assert min(times) > 0
