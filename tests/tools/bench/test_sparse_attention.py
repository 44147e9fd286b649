"""The benchmark of sparse attention: what is measured, and that its file and chart say what was found."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from reelforge.runtime.attention.table import checked
from reelforge.runtime.codec import from_json
from reelforge.tools.bench.sparse_attention import Measured, document
from reelforge.tools.bench.sparse_attention_chart import draw
from reelforge.tools.bench.sparse_attention_measure import Result, chosen_cases, settings

RATES = {
    "background": (1.0, 1.0),
    "colour": (1.0, 1.0),
    "shape": (0.5, 1.0),
    "motion": (0.9, 1.0),
    "together": (0.4, 0.6),
}
FOUND = Measured(
    "12 prompts",
    dict.fromkeys(RATES, (0.9, 0.95)),
    {"radial 1x1": 100.0},
    (
        Result("radial", (1, 1), "decay 0.5", 0, 0.61, (31.26, 20.04, 45.0), RATES),
        Result("radial", (1, 1), "decay 0.5", 5, 0.71, (41.0, 120.0, 145.0), RATES),
        Result("topk", (4, 4), "25%", 0, 0.5, (14.0,), RATES),
    ),
)


def test_settings_are_tables_that_differ() -> None:
    found = settings((0, 5))
    assert len({(one.table.pattern, one.blocks, one.name, one.table.dense_steps) for one in found}) == len(found)
    for one in found:
        checked(one.table)


def test_prompts_are_spread() -> None:
    scenes = [case.scene for case in chosen_cases(12)]
    assert len(set(scenes)) == 12
    assert len({scene.motion for scene in scenes}) > 3
    assert len(chosen_cases(72)) == 72
    with pytest.raises(ValueError, match="expected: 1 to 72"):
        chosen_cases(73)


def test_the_file_says_what_was_found() -> None:
    text = "\n".join(document(FOUND, "chart.png"))
    assert "| radial decay 0.5 | 1x1 | 0 | 0.61 | 31.3 (20.0) | 0.750 | 0.950 | 0.500 | 0.400-0.600 |" in text
    assert "| radial decay 0.5 | 1x1 | 5 | 0.71 | > 100 (41.0) |" in text
    assert "all four 0.925 (0.900-0.950)" in text
    assert "![Density against PSNR and accuracy](chart.png)" in text
    assert "says nothing about time" in text


def test_results_survive_an_interruption() -> None:
    assert from_json(Measured, json.loads(json.dumps(asdict(FOUND)))) == FOUND


def test_equal_results_give_equal_charts() -> None:
    picture = draw(FOUND.results, 0.9)
    assert picture.startswith(b"\x89PNG")
    assert picture == draw(FOUND.results, 0.9)
