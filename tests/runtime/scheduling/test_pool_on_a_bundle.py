"""A pool of real pipelines: cancelled in each phase, requests beyond the budget, a bundle that is damaged meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Check, Pipeline, Progress, Request
from reelforge.runtime.errors import BundleError, CancelledError, EngineError, OutputError, RequestError
from reelforge.runtime.scheduling.job import State
from reelforge.runtime.scheduling.limits import FailurePolicy
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.fake_bundle import STAGES
from tests.runtime.gate import WAIT_S, Gate, gate_on_engines
from tests.runtime.test_turns import wait_until

REQUEST = Request("a ball", 32, 48, 13, 6, 3)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with gate_on_engines(monkeypatch) as gate:
        yield gate


@pytest.fixture(scope="module")
def expected(fake_bundle: Path) -> np.ndarray:
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        return pipeline.generate(REQUEST)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_cancelling_in_each_phase(
    fake_bundle: Path, expected: np.ndarray, gate: Gate, stage: str, streamed: bool
) -> None:
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES) as pool:
        gate.hold(stage)
        job = pool.submit(REQUEST, stream=streamed)
        assert gate.entered.wait(WAIT_S)
        job.cancel("the tab was closed")
        assert not job.done
        gate.open()
        assert job.wait(WAIT_S)
        assert isinstance(job.error, CancelledError)
        assert "the tab was closed" in str(job.error)
        assert gate.runs[stage] == 1
        assert sum(gate.runs[later] for later in STAGES[STAGES.index(stage) + 1 :]) == 0
        np.testing.assert_array_equal(pool.submit(REQUEST).result(WAIT_S), expected)
        (pipeline,) = pool.statistics().pipelines
        assert (pipeline.failed, pipeline.opened) == (0, 1)


def test_latents_are_saved_and_previews_shown(fake_bundle: Path, tmp_path: Path, expected: np.ndarray) -> None:
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES) as pool:
        job = pool.submit(REQUEST, save_latents=tmp_path / "x.npy", previews=True)
        np.testing.assert_array_equal(job.result(WAIT_S), expected)
        steps = [event for event in job.events() if isinstance(event, Progress) and event.phase == "sampling"]
    assert np.load(tmp_path / "x.npy").shape == (1, 4, 4, 4, 6)
    assert all(step.preview is not None for step in steps)


def test_noise_of_the_callers_own(fake_bundle: Path, gate: Gate) -> None:
    noise = np.random.default_rng(5).standard_normal((1, 4, 4, 4, 6), np.float32)
    with Pipeline.open(fake_bundle, threads=1) as pipeline:
        expected = pipeline.generate(REQUEST, latents=noise)
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES) as pool:
        gate.hold("llm")
        first = pool.submit(REQUEST)
        assert gate.entered.wait(WAIT_S)
        mine = noise.copy()
        jobs = [pool.submit(REQUEST, caller=caller, latents=mine) for caller in ("ann", "ben")]
        mine[:] = 0  # while they wait
        gate.open()
        for job in jobs:  # encoded together, sampled each from its own
            np.testing.assert_array_equal(job.result(WAIT_S), expected)
        assert not np.array_equal(first.result(WAIT_S), expected)
        assert all(job.noise is None for job in jobs), "an ended job does not hold it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda noise: noise[..., :-1], "do not fit the request"),
        (lambda noise: noise.astype(np.float64), "do not fit the request"),
        (lambda noise: noise.tolist(), "do not fit the request"),
        (lambda noise: np.where(noise > 0, np.float32(np.nan), noise), "are not finite numbers"),
    ],
)
def test_noise_that_does_not_fit_takes_no_place(
    fake_bundle: Path, change: Callable[[np.ndarray], object], message: str
) -> None:
    noise = np.random.default_rng(5).standard_normal((1, 4, 4, 4, 6), np.float32)
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES) as pool:
        with pytest.raises(RequestError, match=f"the initial latents {message}") as caught:
            pool.submit(REQUEST, latents=change(noise))  # type: ignore[arg-type]
        assert "received:" in str(caught.value)
        assert pool.statistics().accepted == 0


def test_latents_that_cannot_be_saved_take_no_place(fake_bundle: Path, tmp_path: Path) -> None:
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES) as pool:
        with pytest.raises(OutputError, match="latents cannot be written"):
            pool.submit(REQUEST, save_latents=tmp_path / "nowhere" / "x.npy")
        assert pool.statistics().accepted == 0


def test_bundles_and_devices_that_do_not_serve(fake_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        PipelinePool.open(tmp_path / "none")
    with pytest.raises(RequestError, match="cannot run on this device"):
        PipelinePool.open(fake_bundle, ["cuda:0"])


def test_a_request_beyond_the_budget_takes_no_place(fake_bundle: Path) -> None:
    with PipelinePool.open(fake_bundle, threads=1, check=Check.SIZES, memory_budget="1MiB") as pool:
        with pytest.raises(RequestError, match=r"8192x8192x4097"):
            pool.submit(replace(REQUEST, height=8192, width=8192, frames=4097))
        assert pool.statistics().accepted == 0


def test_a_bundle_that_is_altered_meanwhile_is_not_opened_again(
    bundle_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = FailurePolicy(in_a_row=2, rest_s=0.001)
    caplog.set_level(logging.CRITICAL)
    with PipelinePool.open(bundle_copy, threads=1, memory_budget="least", failures=policy) as pool:
        assert pool.submit(REQUEST).result(WAIT_S) is not None
        graph = bundle_copy / "dit.onnx"
        graph.write_bytes(bytes([graph.read_bytes()[0] ^ 1]) + graph.read_bytes()[1:])
        job = pool.submit(replace(REQUEST, seed=4))
        with pytest.raises(BundleError, match=r"dit\.onnx"):
            job.result(WAIT_S)
        wait_until(lambda: pool.statistics().pipelines[0].state == "retired")
        with pytest.raises(EngineError, match=r"(?s)all pipelines .* were retired.*dit\.onnx"):
            pool.submit(REQUEST)
        assert job.state is State.FAILED
