"""The soak's line: growth is found, noise is not taken for growth; and a short soak on the fake bundle passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelforge.tools.bench.runtime_soak import soak, trend_of
from tests.runtime.fake_bundle import write_fake_bundle


@pytest.mark.parametrize(("slope", "grows"), [(0.0, False), (-5000.0, False), (1.0, False), (50_000.0, True)])
def test_growth_is_told_from_noise(slope: float, grows: bool) -> None:
    noise = np.random.default_rng(0).normal(0, 1e6, 150)
    trend = trend_of(list(70e6 + noise + slope * np.arange(150)))
    assert trend.grows is grows
    assert trend.low < slope < trend.high
    assert trend.high - trend.low < 20_000, "a megabyte in fifty requests would be seen"


def test_a_perfect_line() -> None:
    trend = trend_of([3.0, 5.0, 7.0, 9.0])
    assert trend.slope == pytest.approx(2.0)
    assert trend.grows
    assert not trend_of([4.0, 4.0, 4.0]).grows


def test_a_short_soak(tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "fake.bundle")
    result = soak(tmp_path / "fake.bundle", requests=40)
    assert len(result.samples) == 40
    assert sum(result.outcomes.values()) == 40
    assert set(result.outcomes) <= {"finished", "cancelled", "failed", "decoded"}
    assert len(result.outcomes) >= 3
    assert not result.trends["descriptors"].grows
    assert result.loads < 6 + 6 * (result.outcomes.get("failed", 0) + 1)
