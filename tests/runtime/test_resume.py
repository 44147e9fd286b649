"""A loop that fails: what the steps before made is kept, named, and begun from again with equal bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Frames, Pipeline, Progress, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.errors import CancelledError, EngineError, RequestError
from reelforge.runtime.sampling import SamplingError
from reelforge.runtime.scheduling.health import blames_pipeline

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=6, seed=3)


class FailingPipeline(Pipeline):
    """A pipeline whose ``dit`` fails at one call, with an error or with numbers that are none."""

    failing = -1
    with_nan = False

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        with super().engine(stage) as engine:
            yield _Failing(engine, self) if stage == "dit" else engine


class _Failing:
    def __init__(self, engine: Engine, pipeline: FailingPipeline) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self._engine, self._pipeline, self._calls = engine, pipeline, 0

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        self._calls += 1
        fails = self._calls == self._pipeline.failing
        if fails and not self._pipeline.with_nan:
            raise EngineError("the machine is on fire.", fix="water")
        result = self._engine.run(inputs, outputs)
        if fails:
            result["next_latents"][0, 0, 0, 0, 0] = np.nan
        return result

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def failing(fake_bundle: Path) -> FailingPipeline:
    return FailingPipeline(Bundle.open(fake_bundle), EngineOptions(threads=1), memory_budget="1GB")


@pytest.mark.parametrize("with_nan", [False, True])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_run_goes_on_where_it_failed(
    failing: FailingPipeline, fake_bundle: Path, tmp_path: Path, step: int, with_nan: bool
) -> None:
    expected = Pipeline.open(fake_bundle, threads=1).generate(REQUEST)
    failing.failing, failing.with_nan = step + 1, with_nan
    with pytest.raises(SamplingError, match=rf"step {step + 1} of 6 of stage 'dit'") as caught:
        failing.generate(REQUEST, save_latents=tmp_path / "x.npy")
    path = tmp_path / f"x.step-{step}.npy"
    assert list(tmp_path.glob("*.npy")) == [path]
    assert f"are kept in '{path}': go on with --resume, or latents= of it and first_step={step}" in str(caught.value)
    assert with_nan or "fix: water; the steps" in str(caught.value)
    assert caught.value.step == step
    assert blames_pipeline(caught.value) is not with_nan
    assert ("dit" in failing.statistics().resident_bytes) is with_nan, "numbers that are none do not break an engine"
    np.testing.assert_array_equal(np.load(path), caught.value.latents)
    failing.failing = -1
    events = list(failing.stream(REQUEST, latents=np.load(path), first_step=step))
    frames = [event.pixels for event in events if isinstance(event, Frames)]
    np.testing.assert_array_equal(np.concatenate(frames), expected)
    steps = [event.step for event in events if isinstance(event, Progress) and event.phase == "sampling"]
    assert steps == list(range(step + 1, 7))


def test_without_a_file_the_error_has_the_latents(failing: FailingPipeline, tmp_path: Path) -> None:
    failing.failing = 3
    with pytest.raises(SamplingError) as caught:
        failing.generate(REQUEST)
    assert caught.value.latents.shape == (1, 4, 2, 4, 6)
    assert caught.value.fix == "water"
    (tmp_path / "gone").mkdir()
    with pytest.raises(SamplingError) as caught:  # noqa: PT012
        for event in failing.stream(REQUEST, save_latents=tmp_path / "gone" / "x.npy"):
            if isinstance(event, Progress) and (event.phase, event.step) == ("sampling", 1):
                (tmp_path / "gone").rmdir()
    assert caught.value.fix == "water", "that the latents cannot be written does not hide why the step failed"


@pytest.mark.parametrize("first_step", [-1, 6, True, 1.0])
def test_steps_that_are_none(failing: FailingPipeline, first_step: int) -> None:
    with pytest.raises(RequestError, match="no such step to begin with") as caught:
        failing.stream(REQUEST, first_step=first_step)
    assert "in 0..5, since the request has 6 steps" in str(caught.value)


def test_a_later_step_needs_latents(failing: FailingPipeline) -> None:
    with pytest.raises(RequestError, match="step 3 cannot begin without the latents"):
        failing.stream(REQUEST, first_step=2)


def stopped(pipeline: Pipeline, save_latents: Path, phase: str, done: int, keep: bool) -> None:
    """Generate, and stop when so much of a phase is done."""
    stop = Stop()
    for event in pipeline.stream(REQUEST, save_latents=save_latents, stop=stop):
        if isinstance(event, Progress) and (event.phase, event.step) == (phase, done):
            stop.set("the machine is wanted elsewhere", keep)
            if save_latents.parent.name == "gone":
                save_latents.parent.rmdir()


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_is_stopped_keeps_its_latents_where_that_is_wanted(
    fake_bundle: Path, tmp_path: Path, keep: bool
) -> None:
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        expected = pipeline.generate(REQUEST)
        with pytest.raises(CancelledError, match=r"before step 5 of 6: the machine is wanted elsewhere"):
            stopped(pipeline, tmp_path / "x.npy", "sampling", 4, keep)
        path = tmp_path / "x.step-4.npy"
        assert list(tmp_path.glob("*.npy")) == ([path] if keep else [])
        if keep:
            events = pipeline.stream(REQUEST, latents=np.load(path), first_step=4)
            frames = [event.pixels for event in events if isinstance(event, Frames)]
            np.testing.assert_array_equal(np.concatenate(frames), expected)


@pytest.mark.parametrize(("phase", "done", "folder"), [("conditioning", 2, "kept"), ("sampling", 3, "gone")])
def test_what_is_stopped_before_a_step_or_cannot_be_kept_says_only_that(
    fake_bundle: Path, tmp_path: Path, phase: str, done: int, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    with Pipeline.open(fake_bundle, threads=1) as pipeline, pytest.raises(CancelledError):
        stopped(pipeline, tmp_path / folder / "x.npy", phase, done, keep=True)
    assert not list(tmp_path.rglob("*.npy"))
