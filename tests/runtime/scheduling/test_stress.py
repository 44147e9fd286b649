"""Many threads that submit, cancel, read, leave and wait at random: every job ends once, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from reelforge.runtime import Check, Pipeline, Request
from reelforge.runtime.errors import CancelledError, EngineError
from reelforge.runtime.events import Frames
from reelforge.runtime.scheduling.job import Job, State
from reelforge.runtime.scheduling.limits import FailurePolicy, QueueFullError, QueueLimits
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.scheduling.fake_pipeline import WAIT_S, World, engine_error, expected_frames, small
from tests.runtime.test_turns import wait_until

THREADS, EACH = 64, 12
READERS = ("read", "leave")


class Caller:
    """A thread's worth of trouble, drawn from a seed."""

    def __init__(self, pool: PipelinePool, number: int) -> None:
        self.pool, self.name, self.random = pool, f"caller {number % 8}", random.Random(number)
        self.jobs: list[Job] = []
        self.refused = 0
        self.different = 0
        self.problems: list[BaseException] = []

    def run(self) -> None:
        try:
            for _ in range(EACH):
                self.one()
        except BaseException as error:  # noqa: BLE001 - the test reports it
            self.problems.append(error)

    def one(self) -> None:
        draw = self.random
        prompt = draw.choices(["fine", "bad", "bug"], [20, 2, 1])[0]
        request = small(prompt, draw.randrange(100), draw.choice([1, 2, 5]), draw.choice([1, 5]))
        action = draw.choice(["wait", "wait", "cancel", "read", "leave", "forget"])
        deadline_s = draw.choice([None, None, 5.0, 0.001])
        try:
            block_s = draw.choice([0.0, 0.01, None])
            job = self.pool.submit(request, self.name, draw.randrange(3), deadline_s, block_s, action in READERS)
        except QueueFullError:
            self.refused += 1
            return
        except CancelledError:  # its deadline passed while it waited for a place
            return
        self.jobs.append(job)
        if action == "wait":
            assert job.wait(WAIT_S)
            if job.state is State.FINISHED:
                np.testing.assert_array_equal(job.result(), expected_frames(request))
        elif action == "cancel":
            job.cancel()
        elif action in READERS:
            self.read(job, request, leave=action == "leave")

    def read(self, job: Job, request: Request, leave: bool) -> None:
        pixels = []
        try:
            for event in job.events():
                if isinstance(event, Frames):
                    pixels.append(event.pixels)
                    if leave:
                        return
        except (CancelledError, EngineError, ZeroDivisionError) as error:
            self.different += error is not job.error
        else:
            np.testing.assert_array_equal(np.concatenate(pixels), expected_frames(request))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_64_threads(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    world.failures = {"bad": engine_error(), "bug": ZeroDivisionError("a bug")}
    process = psutil.Process()
    threads_before, files_before = process.num_threads(), process.num_fds()
    limits = QueueLimits(waiting=24, waiting_per_caller=6, running_per_caller=2, frames_ahead=1, stall_s=WAIT_S)
    policy = FailurePolicy(in_a_row=2, rest_s=0.001, longest_rest_s=0.002)
    with PipelinePool(world.open, ["a", "b", "b", "c"], limits, policy) as pool:
        callers = [Caller(pool, number) for number in range(THREADS)]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert [problem for caller in callers for problem in caller.problems] == []
        assert sum(caller.different for caller in callers) == 0, "readers get their jobs' errors"
        assert pool.drain(WAIT_S)
        jobs = [job for caller in callers for job in caller.jobs]
        statistics = pool.statistics()
    assert all(job.done for job in jobs)
    assert statistics.ended == Counter(job.state for job in jobs)
    assert statistics.accepted == len(jobs)
    assert statistics.refused == sum(caller.refused for caller in callers)
    assert (statistics.waiting, statistics.running) == (0, 0)
    assert {State.FINISHED, State.FAILED, State.CANCELLED} <= set(statistics.ended)
    for job in jobs:
        if job.state is State.FAILED:
            assert job.error in world.failures.values()
    assert world.opened == world.closed
    assert world.inside.total() == 0
    wait_until(lambda: process.num_threads() <= threads_before)  # threads that were joined take a moment to be gone
    assert process.num_fds() <= files_before


def test_closing_in_the_middle_of_it_all(world: World) -> None:
    pool = PipelinePool(world.open, ["a", "b"], QueueLimits(waiting=8, frames_ahead=1))
    started, ended = threading.Barrier(17), []

    def submit(number: int) -> None:
        started.wait(WAIT_S)
        try:
            while True:
                job = pool.submit(small("x", steps=20), f"{number % 4}", block_s=None, stream=number % 2 == 0)
                ended.append(job)
                assert job.order.streamed or job.wait(WAIT_S)
        except CancelledError:
            return

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    started.wait(WAIT_S)
    while len(ended) < 50 and any(thread.is_alive() for thread in threads):
        for job in list(ended):
            if job.order.streamed:
                job.cancel()
    pool.close()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert all(job.done for job in ended)
    assert world.opened == world.closed == {"a": 1, "b": 1}


def test_real_pipelines_under_load_leave_nothing(fake_bundle: Path) -> None:
    """The same bytes as one pipeline in a loop, whoever runs them; afterwards no thread, file or session more."""
    requests = [Request("a ball", 32, 48, 5, 2, seed) for seed in range(6)]
    with Pipeline.open(fake_bundle, "cpu", threads=1) as pipeline:
        expected = [pipeline.generate(request) for request in requests]
    gc.collect()
    process = psutil.Process()
    threads_before, files_before = process.num_threads(), process.num_fds()
    with PipelinePool.open(fake_bundle, ["cpu", "cpu"], threads=1, check=Check.SIZES) as pool:
        jobs = [pool.submit(request, caller=f"{request.seed % 2}") for request in requests * 2]
        for job in jobs[::4]:
            job.cancel()
        for number, job in enumerate(jobs):
            assert job.wait(WAIT_S)
            assert job.state in (State.FINISHED, State.CANCELLED)
            if job.state is State.FINISHED:
                np.testing.assert_array_equal(job.result(), expected[number % len(requests)])
    gc.collect()
    wait_until(lambda: process.num_threads() <= threads_before)  # threads that were joined take a moment to be gone
    assert process.num_fds() <= files_before
