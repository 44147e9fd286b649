"""The schedule against diffusers' scheduler and against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.schedule import flow_match_sigmas, sigma_steps, timesteps


@pytest.mark.parametrize(("steps", "shift"), [(1, 7.0), (2, 1.0), (20, 7.0), (50, 7.0), (30, 3.5)])
def test_equals_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    sigmas = flow_match_sigmas(steps, shift)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(timesteps(sigmas), scheduler.timesteps.numpy(), rtol=1.2e-7)


def test_published_timesteps_of_hunyuanvideo() -> None:
    times = timesteps(flow_match_sigmas(50, 7.0))
    np.testing.assert_allclose(times[[0, 1, 2, -2, -1]], [1000, 997.093, 994.083, 225.806, 125.0], atol=5e-4)


@given(st.integers(1, 400), st.floats(0.05, 50))
def test_formula_and_order(steps: int, shift: float) -> None:
    sigmas = flow_match_sigmas(steps, shift)
    levels = 1 - np.arange(steps + 1, dtype=np.float64) / steps
    np.testing.assert_allclose(sigmas, shift * levels / (1 + (shift - 1) * levels), atol=1e-5)
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert sigmas[0] == pytest.approx(1, abs=1e-6)
    assert (np.diff(sigmas) < 0).all()
    assert sigma_steps(sigmas).sum(dtype=np.float64) == pytest.approx(-1, abs=1e-5)
