"""Fixtures of quantised builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.export.build_request import CalibrationRequest
from tests.export.quantised_builds import SHAPE, STEPS


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# three to calibrate, one to measure\na red ball\na blue box\nrain on a window\na green leaf\n")
    return path


@pytest.fixture
def request_(prompts: Path) -> CalibrationRequest:
    """Random weights make no picture, so the gate accepts anything unless a test says otherwise."""
    return CalibrationRequest(prompts=prompts, steps=STEPS, shape=SHAPE, min_psnr_db=0.0)
