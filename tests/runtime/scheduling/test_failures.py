"""Pipelines that fail: their job fails, others go on; they are opened again, rest or are given up; no error is lost."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from reelforge.runtime.errors import BundleError, CancelledError, EngineError, OutputError, RequestError
from reelforge.runtime.sampling import NotFiniteLatentsError, SamplingError
from reelforge.runtime.scheduling.dispatch import Dispatch
from reelforge.runtime.scheduling.health import Health, blames_pipeline
from reelforge.runtime.scheduling.job import State
from reelforge.runtime.scheduling.limits import FailurePolicy
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.scheduling.fake_pipeline import WAIT_S, FakePipeline, World, engine_error, expected_frames, small
from tests.runtime.test_turns import wait_until

AT_ONCE = FailurePolicy(in_a_row=3, rest_s=0.001, longest_rest_s=0.002)


@pytest.fixture
def pool(world: World) -> Iterator[PipelinePool]:
    with PipelinePool(world.open, ["a"], failures=AT_ONCE) as pool:
        yield pool


def test_an_engine_that_fails_costs_its_job_and_nothing_else(pool: PipelinePool, world: World) -> None:
    world.failures["bad"] = engine_error("stage 'dit' failed in ONNX Runtime.")
    bad, good = pool.submit(small("bad")), pool.submit(small("good"))
    with pytest.raises(EngineError, match="failed in ONNX Runtime"):
        bad.result(WAIT_S)
    assert bad.state is State.FAILED
    np.testing.assert_array_equal(good.result(WAIT_S), expected_frames(good.order.request))
    assert world.opened == {"a": 2}
    assert world.closed == {"a": 1}


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_is_raised_reaches_the_caller(
    pool: PipelinePool, world: World, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    world.failures["bad"] = error
    bad, good = pool.submit(small("bad")), pool.submit(small("good"))
    with caplog.at_level(logging.ERROR), pytest.raises(type(error)) as caught:
        bad.result(WAIT_S)
    assert caught.value is error
    assert good.wait(WAIT_S)
    assert good.state is State.FINISHED
    assert pool.statistics().failures == {type(error).__name__: 1}
    assert any("ended with a bug" in record.message for record in caplog.records)


def test_errors_that_are_not_the_pipelines_leave_it_open(pool: PipelinePool, world: World) -> None:
    numbers = NotFiniteLatentsError("step 1 gave latents that are not finite.", 0, np.zeros(1, np.float32))
    for error in (OutputError("no such folder."), CancelledError("stopped."), RequestError("no."), numbers):
        world.failures["bad"] = error
        job = pool.submit(small("bad"))
        assert job.wait(WAIT_S)
        assert job.error is error
    assert world.opened == {"a": 1}
    assert pool.statistics().pipelines[0].failed == 0


def test_which_errors_blame_the_pipeline() -> None:
    caused = SamplingError("step 1 failed.", 0, np.zeros(1, np.float32))
    caused.__cause__ = engine_error()
    assert all(map(blames_pipeline, [caused, engine_error(), BundleError("altered."), ValueError(), MemoryError()]))


def test_a_lonely_pipeline_goes_on_however_often_it_fails(pool: PipelinePool, world: World) -> None:
    world.failures["bad"] = engine_error()
    for _ in range(7):
        assert pool.submit(small("bad")).wait(WAIT_S)
    assert pool.submit(small("good")).result(WAIT_S).shape == (5, 16, 16, 3)
    assert world.opened == {"a": 8}


def test_a_broken_device_does_not_draw_all_requests(world: World) -> None:
    world.broken["b"] = engine_error("the device has fallen off the bus.")
    policy = FailurePolicy(in_a_row=2, rest_s=WAIT_S)
    with PipelinePool(world.open, ["a", "b"], failures=policy) as pool:
        failed = 0
        while failed < 2:  # until the broken one has had enough
            job = pool.submit(small("x"))
            assert job.wait(WAIT_S)
            failed += job.state is State.FAILED
        rested = [pool.submit(small("y")) for _ in range(5)]
        assert all(job.wait(WAIT_S) for job in rested)
        assert {(job.device, job.state) for job in rested} == {("a", State.FINISHED)}
        wait_until(lambda: [one.state for one in pool.statistics().pipelines] == ["in service", "resting"])


def test_after_its_rest_a_pipeline_comes_back(world: World) -> None:
    world.broken["b"] = engine_error()
    policy = FailurePolicy(in_a_row=1, rest_s=0.01)
    with PipelinePool(world.open, ["a", "b"], failures=policy) as pool:
        hold = world.hold("held")
        while True:  # until the healthy one is the one that is held
            job = pool.submit(small("held"))
            while not (hold.reached or job.done):
                job.wait(0.01)
            if hold.reached:
                break
        world.broken.clear()
        job = pool.submit(small("x"))
        assert job.wait(WAIT_S)
        assert (job.device, job.state) == ("b", State.FINISHED)
        hold.release()


def test_when_no_pipeline_can_be_opened_jobs_fail_and_say_why(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with PipelinePool(world.open, ["a"], failures=AT_ONCE) as pool:
        world.failures["bad"] = engine_error()
        hold = world.hold("bad")
        bad = pool.submit(small("bad"))
        hold.wait_until_reached()
        waiting = pool.submit(small("waits"))
        world.unopenable["a"] = BundleError("file 'llm.onnx' is gone.")
        with caplog.at_level(logging.CRITICAL):
            hold.release()
            assert bad.wait(WAIT_S)
            with pytest.raises(EngineError, match="all pipelines of this pool were retired") as caught:
                waiting.result(WAIT_S)
        assert "a: BundleError: file 'llm.onnx' is gone." in str(caught.value)
        with pytest.raises(EngineError, match="all pipelines of this pool were retired"):
            pool.submit(small("late"))
        assert pool.statistics().pipelines[0].state == "retired"
        assert pool.drain(WAIT_S)


def test_an_opening_that_fails_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[str] = []

    def second_and_third_fail(device: str) -> FakePipeline:
        tried.append(device)
        if len(tried) in (2, 3):
            raise BundleError("the disk is away.")
        return world.open(device)

    with PipelinePool(second_and_third_fail, ["a"], failures=AT_ONCE) as pool, caplog.at_level(logging.CRITICAL):
        world.failures["bad"] = engine_error()
        bad, good = pool.submit(small("bad")), pool.submit(small("good"))
        assert bad.wait(WAIT_S)
        assert good.wait(WAIT_S)
        assert good.state is State.FINISHED
    assert len(tried) == 4


def test_closing_while_a_pipeline_rests(world: World) -> None:
    policy = FailurePolicy(in_a_row=2, rest_s=WAIT_S)
    pool = PipelinePool(world.open, ["a"], failures=policy)
    world.failures["bad"] = engine_error()
    hold = world.hold("bad")
    job = pool.submit(small("bad"))
    hold.wait_until_reached()
    waits = pool.submit(small("waits"))
    world.unopenable["a"] = BundleError("gone.")
    hold.release()
    assert job.wait(WAIT_S)
    pool.close()
    assert waits.state is State.CANCELLED


def test_a_pipeline_that_cannot_even_be_closed(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, world: World
) -> None:
    def close(pipeline: FakePipeline) -> None:
        raise ZeroDivisionError("while closing")

    monkeypatch.setattr(FakePipeline, "close", close)
    world.failures["bad"] = engine_error()
    assert pool.submit(small("bad")).wait(WAIT_S)
    assert pool.submit(small("good")).result(WAIT_S) is not None
    assert any("could not be closed" in record.message for record in caplog.records)


def test_a_thread_that_dies_of_a_bug_of_its_own_takes_nothing_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ended(*arguments: object) -> None:
        raise ZeroDivisionError("a bug in the pool")

    with PipelinePool(world.open, ["a"]) as pool:
        monkeypatch.setattr(Dispatch, "ended", ended)
        job, waiting = pool.submit(small("x")), pool.submit(small("y"))
        with pytest.raises(ZeroDivisionError, match="a bug in the pool"):
            job.result(WAIT_S)
        with pytest.raises(EngineError, match="a: ZeroDivisionError: a bug in the pool"):
            waiting.result(WAIT_S)
    assert any("thread of a ended with a bug" in record.message for record in caplog.records)


def test_a_pipeline_that_ends_without_all_frames(pool: PipelinePool, monkeypatch: pytest.MonkeyPatch) -> None:
    job = pool.submit(small("x"))
    job.end(EngineError("first."))
    assert not job.end(None), "the first word counts"
    monkeypatch.setattr(FakePipeline, "stream", lambda *arguments, **named: (event for event in ()))
    with pytest.raises(EngineError, match="ended without all frames"):
        pool.submit(small("y")).result(WAIT_S)


@pytest.mark.parametrize("prompt", ["good", "bad"])
def test_a_job_that_its_caller_drops_is_gone_with_all_its_arrays(
    pool: PipelinePool, world: World, prompt: str, collector_off: None
) -> None:
    world.failures["bad"] = engine_error()
    job = pool.submit(small(prompt))
    assert job.wait(WAIT_S)
    gone = weakref.ref(job)
    del job
    wait_until(lambda: gone() is None)


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_rests_double_up_to_a_limit_and_success_forgets() -> None:
    health = Health(FailurePolicy(in_a_row=2, rest_s=10, longest_rest_s=35))
    assert [health.job_failed(True) for _ in range(5)] == [0, 10, 20, 35, 35]
    assert health.job_failed(False) == 0
    health.job_finished()
    assert [health.job_failed(True) for _ in range(2)] == [0, 10]
    assert [health.opening_failed(), health.opening_failed()] == [20, None]
    health = Health(FailurePolicy(in_a_row=2, rest_s=10))
    assert health.opening_failed() == 10
    health.opened()
    assert health.opening_failed() == 20
