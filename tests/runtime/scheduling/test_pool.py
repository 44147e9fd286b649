"""A pool from outside: results, order, limits, deadlines, cancelling, draining and closing."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest

from reelforge.runtime.errors import CancelledError, DeadlineError, EngineError, RequestError
from reelforge.runtime.events import Event, Frames, Progress
from reelforge.runtime.request import resolve_request
from reelforge.runtime.scheduling.job import State
from reelforge.runtime.scheduling.limits import ClosedError
from reelforge.runtime.scheduling.pool import PipelinePool, _cost
from tests.runtime.scheduling.fake_pipeline import WAIT_S, Open, World, expected_frames, small


def test_results(opened: Open) -> None:
    pool = opened()
    jobs = [pool.submit(small("a", seed)) for seed in range(4)]
    for job in jobs:
        np.testing.assert_array_equal(job.result(WAIT_S), expected_frames(job.order.request))
        assert job.state is State.FINISHED
        assert job.done
        assert job.error is None
        assert job.device == "fake:0"
        assert job.progress == Progress("sampling", 2, 2)
        assert job.waited_s >= 0 < job.ran_s
    assert [job.number for job in jobs] == [1, 2, 3, 4]
    assert repr(jobs[0]) == "<Job 1 of '': finished>"


def test_callers_and_priorities_decide_who_is_next(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("first")
    jobs = [pool.submit(small("first"), caller="many")]
    hold.wait_until_reached()
    jobs += [pool.submit(small(f"many {number}"), caller="many") for number in range(5)]
    jobs += [pool.submit(small("one"), caller="one"), pool.submit(small("urgent"), caller="many", priority=1)]
    assert [pool.position(job) for job in jobs] == [None, 2, 3, 4, 5, 6, 1, 0]
    hold.release()
    assert all(job.wait(WAIT_S) for job in jobs)
    assert world.ran == ["first", "urgent", "one", *(f"many {number}" for number in range(5))]


def test_two_evaluations_per_step_count_twice(world: World) -> None:
    resolved = resolve_request(small("x", steps=3), world.manifest, "fake")
    assert _cost(resolved) == 3 * 5 * 16 * 16
    assert _cost(replace(resolved, cfg_scale=6.0, negative_prompt="")) == 2 * _cost(resolved)


def test_jobs_spread_over_devices(opened: Open, world: World) -> None:
    pool = opened(devices=3)
    holds = [world.hold(f"{number}") for number in range(3)]
    jobs = [pool.submit(small(f"{number}")) for number in range(3)]
    for hold in holds:
        hold.wait_until_reached()
    assert {job.device for job in jobs} == {"fake:0", "fake:1", "fake:2"}
    assert pool.statistics().running == 3
    for hold in holds:
        hold.release()
    assert all(job.wait(WAIT_S) for job in jobs)


def test_two_pipelines_on_one_device_have_names(world: World) -> None:
    with PipelinePool(world.open, ["cpu", "cpu"]) as pool:
        assert [one.device for one in pool.statistics().pipelines] == ["cpu", "cpu#2"]


@pytest.mark.parametrize("devices", [[], "cpu"])
def test_devices_that_are_none(world: World, devices: object) -> None:
    with pytest.raises(RequestError, match="a list of at least one"):
        PipelinePool(world.open, devices)  # type: ignore[arg-type]


def test_a_device_that_cannot_be_opened_closes_the_others(world: World) -> None:
    world.unopenable["b"] = EngineError("no such device.")
    with pytest.raises(EngineError, match="no such device"):
        PipelinePool(world.open, ["a", "b"])
    assert world.opened == world.closed == {"a": 1}


# Deadlines and cancelling


def test_a_deadline_that_passes_in_the_queue(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    pool.submit(small("slow"))
    hold.wait_until_reached()
    job = pool.submit(small("hurry"), deadline_s=0.02)
    with pytest.raises(DeadlineError, match="deadline passed before its turn came"):  # while the device is still busy
        job.result(WAIT_S)
    assert job.state is State.EXPIRED
    hold.release()
    assert pool.drain(WAIT_S)
    assert world.ran == ["slow"]
    assert pool.statistics().ended == {State.EXPIRED: 1, State.FINISHED: 1}


def test_a_deadline_that_passes_on_the_device(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    job = pool.submit(small("slow"), deadline_s=0.02)
    while not hold.reached and not job.done:  # the machine may be slower than the deadline
        job.wait(0.01)
    assert job.stop.remaining_s is not None
    while job.stop.remaining_s:
        job.wait(job.stop.remaining_s)
    hold.release()
    with pytest.raises(DeadlineError):
        job.result(WAIT_S)


def test_cancelling_a_job_that_waits(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    pool.submit(small("slow"))
    hold.wait_until_reached()
    job = pool.submit(small("unwanted"))
    job.cancel("the tab was closed")
    assert job.done
    with pytest.raises(CancelledError, match="before its turn came: the tab was closed"):
        job.result()
    job.cancel()
    hold.release()
    assert pool.drain(WAIT_S)
    assert world.ran == ["slow"]


def test_cancelling_a_job_that_runs_ends_it_within_a_step(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    job = pool.submit(small("slow", steps=1000))
    hold.wait_until_reached()
    job.cancel()
    assert job.state is State.RUNNING
    hold.release()
    with pytest.raises(CancelledError, match="before step 2 of 1000"):
        job.result(WAIT_S)
    assert job.state is State.CANCELLED
    assert pool.submit(small("next")).wait(WAIT_S)
    assert pool.statistics().pipelines[0].failed == 0
    assert world.opened == {"fake:0": 1}


# Events


def test_events_of_a_kept_job_are_progress_for_any_number_of_readers(opened: Open) -> None:
    job = opened().submit(small("x", steps=3))
    assert job.wait(WAIT_S)
    for _ in range(2):
        assert list(job.events()) == [Progress("sampling", step, 3) for step in (1, 2, 3)]


def test_a_streamed_job_hands_frames_over_and_holds_back(opened: Open, world: World) -> None:
    request = small("x", frames=41)
    job = opened(frames_ahead=2).submit(request, stream=True)
    seen = []
    for event in job.events():
        if isinstance(event, Frames):
            seen.append(event)
            assert len(job._log._frames) <= 2
    np.testing.assert_array_equal(np.concatenate([one.pixels for one in seen]), expected_frames(request))
    with pytest.raises(RequestError, match="none are kept"):
        job.result()
    with pytest.raises(RequestError, match="being read already"):
        next(job.events())


def test_a_reader_who_leaves_cancels_his_job(opened: Open) -> None:
    pool = opened(frames_ahead=1)
    job = pool.submit(small("x", frames=401), stream=True)
    for event in job.events():
        if isinstance(event, Frames):
            break
    assert job.wait(WAIT_S)
    assert "whoever read its frames left" in str(job.error)
    assert pool.submit(small("next")).wait(WAIT_S)


def test_a_caller_who_vanishes_does_not_keep_the_device(opened: Open) -> None:
    pool = opened(frames_ahead=1, stall_s=0.05)
    abandoned = pool.submit(small("x", frames=401), stream=True)
    assert pool.submit(small("next")).wait(WAIT_S)
    assert abandoned.state is State.CANCELLED
    assert "not read for 0.05 s" in str(abandoned.error)


def test_the_reader_of_a_failing_job_gets_its_error(opened: Open, world: World) -> None:
    world.failures["x"] = EngineError("stage 'dit' failed.")
    events: list[Event] = []
    with pytest.raises(EngineError, match="stage 'dit' failed"):
        events.extend(opened().submit(small("x"), stream=True).events())


# The end


def test_draining_finishes_what_was_accepted(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    jobs = [pool.submit(small("slow")), pool.submit(small("waits"))]
    hold.wait_until_reached()
    assert not pool.drain(0.02)
    assert not pool.statistics().accepting
    with pytest.raises(ClosedError, match="closed before a request was submitted"):
        pool.submit(small("late"))
    hold.release()
    assert pool.drain(WAIT_S)
    assert [job.state for job in jobs] == [State.FINISHED, State.FINISHED]


def test_closing_while_jobs_wait_and_run(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    running = pool.submit(small("slow"))
    hold.wait_until_reached()
    waiting = [pool.submit(small("waits")) for _ in range(3)]
    closing = threading.Thread(target=pool.close)
    closing.start()
    for job in waiting:
        with pytest.raises(ClosedError, match="the pool was closed before its turn came"):
            job.result(WAIT_S)
        assert job.state is State.CANCELLED
    hold.release()
    with pytest.raises(CancelledError, match="before step 2 of 2: the pool was closed"):
        running.result(WAIT_S)
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert world.opened == world.closed == {"fake:0": 1}
    pool.close()
    with pytest.raises(ClosedError):
        pool.submit(small("late"))


def test_whoever_waits_for_a_place_hears_of_the_end(opened: Open, world: World) -> None:
    pool = opened(waiting=1)
    hold = world.hold("slow")
    pool.submit(small("slow"))
    hold.wait_until_reached()
    pool.submit(small("waits"))
    caught: list[Exception] = []

    def submit() -> None:
        try:
            pool.submit(small("late"), block_s=None)
        except ClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    closing = threading.Thread(target=pool.close)
    closing.start()
    thread.join(WAIT_S)
    assert len(caught) == 1
    hold.release()
    closing.join(WAIT_S)


def test_a_pool_that_is_dropped_is_closed(world: World) -> None:
    pool = PipelinePool(world.open, ["a", "b"])
    job = pool.submit(small("x"))
    assert job.wait(WAIT_S)
    del pool
    assert world.closed == {"a": 1, "b": 1}


def test_statistics(opened: Open, world: World) -> None:
    pool = opened()
    world.failures["bad"] = EngineError("stage 'dit' failed.")
    for prompt in ("a", "b", "bad"):
        assert pool.submit(small(prompt), caller="ann").wait(WAIT_S)
    hold = world.hold("slow")
    pool.submit(small("slow"), caller="ann")
    hold.wait_until_reached()
    pool.submit(small("waits"), caller="bob")
    now = pool.statistics()
    assert (now.accepting, now.waiting, now.running, now.accepted, now.refused) == (True, 1, 1, 5, 0)
    assert now.waiting_by_caller == {"bob": 1}
    assert now.ended == {State.FINISHED: 2, State.FAILED: 1}
    assert now.failures == {"EngineError": 1}
    assert now.waited.count == now.ran.count == 3
    assert 0 < now.ran.median_s <= now.ran.p95_s <= now.ran.longest_s
    (pipeline,) = now.pipelines
    assert (pipeline.state, pipeline.finished, pipeline.failed, pipeline.opened) == ("in service", 2, 1, 2)
    assert pipeline.job is not None
    assert (pipeline.job.caller, pipeline.job.number) == ("ann", 4)
    assert pipeline.last_error == "EngineError: stage 'dit' failed."


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_refused_and_the_parent_is_not_disturbed(opened: Open, world: World) -> None:
    pool = opened()
    hold = world.hold("slow")
    job = pool.submit(small("slow"))
    hold.wait_until_reached()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # the child ends here whatever happens, so that pytest does not run twice
        said = []
        calls = (lambda: pool.submit(small("x")), job.result, pool.statistics, lambda: next(job.events()), job.cancel)
        for call in calls:
            try:
                call()  # type: ignore[no-untyped-call]
                said.append("it went on")
            except EngineError as error:
                said.append(error.where)
        pool.close()
        os.write(write, "|".join(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        said = answers.read().split("|")
    os.waitpid(child, 0)
    assert [line.split()[1] for line in said] == ["pool", "job", "pool", "job", "job"]
    assert all("was made by another process, from which this one was forked" in line for line in said)
    hold.release()
    assert job.wait(WAIT_S)
