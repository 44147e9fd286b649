"""The soak's line: growth is found, noise is not taken for growth; and a short soak on the fake bundle is flat."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from reelforge.tools.bench import runtime_soak
from reelforge.tools.bench.runtime_soak import soak, trend_of
from tests.runtime.fake_bundle import write_fake_bundle


@pytest.mark.parametrize(("slope", "grows"), [(0.0, False), (-5000.0, False), (1.0, False), (20_000.0, True)])
def test_growth_is_told_from_noise(slope: float, grows: bool) -> None:
    noise = np.random.default_rng(0).normal(0, 1e6, 200)
    trend = trend_of(list(70e6 + noise + slope * np.arange(200)))
    assert trend.grows is grows
    assert trend.low < slope < trend.high
    assert trend.high - trend.low < 40_000, "a megabyte in fifty requests would be seen"


def test_little_growth_is_growth_where_nothing_else_is() -> None:
    assert trend_of(list(70e6 + 10.0 * np.arange(200))).grows


def test_noise_of_which_neighbours_share_most_is_rarely_taken_for_growth() -> None:
    """What a process holds after a request is much like what it held before; single points would mislead."""
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        noise = np.zeros(200)
        for at in range(1, 200):
            noise[at] = 0.8 * noise[at - 1] + draw.normal()
        found += trend_of(list(noise)).grows
    assert found <= 6, "3 %; of lines through single points it was 43, as 95 % intervals"


def test_a_perfect_line() -> None:
    trend = trend_of([3.0 + 2.0 * at for at in range(43)])
    assert trend.slope == pytest.approx(2.0)
    assert trend.grows
    level = trend_of([4.3] * 57)
    assert (level.slope, level.low, level.high, level.grows) == (0, 0, 0, False)


def test_a_short_soak(tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "fake.bundle")
    result = soak(tmp_path / "fake.bundle", requests=40)
    assert len(result.samples) == 40
    assert result.warm_up == 3 * 100 + 24 + 4, "the prompts have three lengths in tokens of this model"
    assert sum(result.outcomes.values()) == 40
    assert set(result.outcomes) <= {"finished", "cancelled", "failed", "decoded"}
    assert len(result.outcomes) >= 3
    assert not result.trends["descriptors"].grows
    assert result.loads == 6, "not even a request that fails costs a stage"


def test_a_process_that_grows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_bundle(tmp_path / "fake.bundle")
    kept: list[bytes] = []

    def leaking(pipeline: object, draw: random.Random) -> str:
        kept.append(draw.randbytes(300_000))
        return "finished"

    monkeypatch.setattr(runtime_soak, "_warm_up", lambda pipeline: 0)
    monkeypatch.setattr(runtime_soak, "_one", leaking)
    result = soak(tmp_path / "fake.bundle", requests=60)
    assert result.trends["anonymous_bytes"].grows
    assert not result.passed
