"""Plans that stay loaded: equal results, within the budget, and nothing left on the GPU at the end."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Notice, Pipeline
from reelforge.runtime.errors import OutOfMemoryError, RequestError
from tests.runtime.fake_cuda import OUT_OF_MEMORY
from tests.runtime.test_tensorrt_pipeline import REQUEST, STAGES, Machine, expected, machine

__all__ = ["expected", "machine"]  # fixtures


def needs(made: Machine) -> list[int]:
    stages = made.bundle.manifest.stages
    return [sum(plan.weight_bytes for plan in stage.plans[:1]) for stage in stages]


def test_requests_of_other_sizes_reload_nothing(machine: Callable[..., Machine], fake_bundle: Path) -> None:
    made = machine()
    cpu = Pipeline.open(fake_bundle, threads=1)
    with Pipeline(made.bundle, None, memory_budget="1MiB") as pipeline:
        for frames, height in ((1, 32), (5, 48), (9, 32), (1, 32)):
            request = replace(REQUEST, frames=frames, height=height)
            np.testing.assert_array_equal(pipeline.generate(request), cpu.generate(request))
        assert pipeline.statistics().loads == len(STAGES)
        assert sorted(pipeline.statistics().resident_bytes) == sorted(STAGES)
    made.require_nothing_left()


def test_without_a_budget_a_share_of_the_free_memory_is_used(machine: Callable[..., Machine]) -> None:
    made = machine()
    with Pipeline(made.bundle, None, memory_budget=None) as pipeline:
        assert pipeline.statistics().budget_bytes is None
        pipeline.generate(REQUEST)
        assert pipeline.statistics().budget_bytes == int(made.cuda.total_bytes * 0.9)
        assert pipeline.statistics().loads == len(STAGES)
    made.require_nothing_left()


def test_activations_of_the_largest_stage_count(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    """The fakes ask for 1000 to 6000 bytes of activations; a budget between keeps some stages and not others."""
    made = machine()
    weights = needs(made)
    least = max(weight + 1000 * number for number, weight in enumerate(weights, 1))
    with pytest.raises(RequestError, match="the memory budget is too small for bundle") as caught:
        Pipeline(made.bundle, None, memory_budget=least - 1)
    assert "vae_decoder" in str(caught.value)
    with Pipeline(made.bundle, None, memory_budget=least) as pipeline:
        for _ in range(2):
            np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
        assert pipeline.statistics().evictions > 0
    made.require_nothing_left()


def test_a_gpu_with_less_memory_than_the_budget_says(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    """What waits is closed when a stage cannot be loaded, and the request goes on."""
    made = machine()
    with Pipeline(made.bundle, None, memory_budget="1MiB") as pipeline:
        np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)
        pipeline._stages.residency._close("dit", pipeline._stages.residency._held["dit"])
        made.cuda.total_bytes = (
            made.cuda.used_bytes()
            + sum(
                plan.weight_bytes
                for stage in made.bundle.manifest.stages
                if stage.name == "dit"
                for plan in stage.plans[:1]
            )
            - 1
        )
        before = pipeline.statistics().evictions
        with pipeline.engine("dit"):
            assert pipeline.statistics().evictions > before
    made.require_nothing_left()


def test_a_decoder_without_room_makes_room_first(machine: Callable[..., Machine], expected: np.ndarray) -> None:
    """Other stages leave before tiles become smaller, so that the pictures stay the same."""
    made = machine()
    with Pipeline(made.bundle, None, memory_budget="1MiB") as pipeline:
        events = []
        for event in pipeline.stream(REQUEST):
            events.append(event)
            if getattr(event, "phase", "") == "sampling" and getattr(event, "step", 0) == REQUEST.steps:
                made.cuda.failures["cudaMalloc"] = [OUT_OF_MEMORY]
        assert not any(isinstance(event, Notice) for event in events)
        frames = np.concatenate([event.pixels for event in events if hasattr(event, "pixels")])
        np.testing.assert_array_equal(frames, expected)
        assert pipeline.statistics().evictions > 0
    del events
    gc.collect()
    made.require_nothing_left()


def test_weights_that_do_not_fit_are_an_error_about_memory(machine: Callable[..., Machine]) -> None:
    made = machine()
    made.cuda.total_bytes = 10
    with made.pipeline() as pipeline, pytest.raises(OutOfMemoryError), pipeline.engine("dit"):
        pass
