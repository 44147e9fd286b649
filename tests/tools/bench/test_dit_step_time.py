"""Contenders take turns and compute the same; ratios are of times in the same round."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.noise import gaussian_noise
from reelforge.tools.bench import dit_step_time as bench

SIZE = (2, 4, 6)


@pytest.fixture
def inputs(tiny_bundle: Path) -> bench.StepInputs:
    default = bench.random_inputs(Bundle.open(tiny_bundle, Check.SIZES))
    return bench.StepInputs(
        gaussian_noise((*default.latents.shape[:2], *SIZE), 0), default.states, default.pooled, default.guidance
    )


def test_the_contenders_compute_the_same_step(
    tiny_bundle: Path, tiny_checkpoint: Path, inputs: bench.StepInputs
) -> None:
    with ExitStack() as stack:
        ours = bench.bundle_step(Bundle.open(tiny_bundle, Check.SIZES), inputs, stack)()
    theirs = bench.diffusers_step(tiny_checkpoint, inputs, torch.float32)()
    assert ours.shape == theirs.shape == inputs.latents.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # diffusers' sinusoids are of fp32 arguments
    # In bf16 diffusers rounds the guidance too, to which this random model is sensitive.
    assert bench.cosine(bench.diffusers_step(tiny_checkpoint, inputs, torch.bfloat16)(), ours) > 0.8


def test_every_contender_runs_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_S", 0.0)
    monkeypatch.setattr(bench, "SAMPLE_S", 0.0)
    calls: list[str] = []

    def contender(name: str, velocity: list[float]) -> bench.Step:
        return lambda: (calls.append(name), np.array(velocity))[1]

    timings = bench.take_turns({bench.BASE: contender("a", [1.0, 0.0]), "other": contender("b", [1.0, 1.0])}, 3)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"  # twice each before anything is timed
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert [timing.cosine for timing in timings] == pytest.approx([1.0, 0.5**0.5])


def test_ratios_are_of_the_same_round() -> None:
    timings = [bench.Timing(bench.BASE, (1.0, 2.0, 4.0), 1.0), bench.Timing("other", (0.5, 1.0, 8.0), 0.9)]
    rows = bench.timing_lines(timings)[2:]
    assert rows[0] == f"| {bench.BASE} | 2000.0 (1000.0-4000.0) | 1.00 (1.00-1.00) | 1.000000 |"
    assert rows[1] == "| other | 1000.0 (500.0-8000.0) | 2.00 (0.50-2.00) | 0.900000 |"
