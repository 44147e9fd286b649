"""A generation that is stopped, at each place where it can be, leaves a pipeline that works."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Frames, Pipeline, Progress, Request, Stop
from reelforge.runtime.devices import device_index
from reelforge.runtime.errors import CancelledError, DeadlineError, EngineError, RequestError
from reelforge.runtime.events import Event
from reelforge.runtime.recipe import Backend

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=6, seed=3)
PHASES = ("text", "conditioning", "sampling", "decoding")


@pytest.fixture(scope="module")
def pipeline(fake_bundle: Path) -> Pipeline:
    return Pipeline.open(fake_bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> np.ndarray:
    return pipeline.generate(REQUEST)


def consume_until(events: Iterator[Event], phase: str, step: int) -> None:
    for event in events:
        if isinstance(event, Progress) and (event.phase, event.step) == (phase, step):
            return
    pytest.fail(f"there was no step {step} of {phase}")


@pytest.mark.parametrize("phase", PHASES)
def test_stopping_ends_within_one_unit_of_work(pipeline: Pipeline, expected: np.ndarray, phase: str) -> None:
    stop = Stop()
    events = pipeline.stream(REQUEST, stop=stop)
    consume_until(events, phase, 1)
    stop.set("the caller left")
    stop.set("a second reason")
    with pytest.raises(CancelledError, match="the caller left") as caught:
        next(events)  # not one step, tile or stage more
    assert "before" in str(caught.value)
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


@pytest.mark.parametrize("phase", PHASES)
def test_closing_a_stream_frees_the_pipeline(pipeline: Pipeline, expected: np.ndarray, phase: str) -> None:
    events = pipeline.stream(REQUEST)
    consume_until(events, phase, 1)
    events.close()
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


def test_a_passed_deadline(pipeline: Pipeline) -> None:
    with pytest.raises(DeadlineError, match="deadline passed before its first stage") as caught:
        pipeline.generate(REQUEST, stop=Stop(0.0))
    assert "a deadline of 0 s" in str(caught.value)
    assert caught.value.exit_code == 9


def test_stop_says_how_much_time_is_left() -> None:
    assert Stop().remaining_s is None
    left = Stop(60.0).remaining_s
    assert left is not None
    assert 50 < left <= 60
    assert Stop(-1.0).remaining_s == 0.0
    assert [Stop().wanted, Stop(0.0).wanted, Stop(60.0).wanted] == [False, True, False]
    stop = Stop()
    stop.set()
    assert stop.wanted


def test_two_threads_share_one_pipeline(pipeline: Pipeline, expected: np.ndarray) -> None:
    results: dict[int, np.ndarray] = {}
    order: list[int] = []

    def work(seed: int) -> None:
        results[seed] = pipeline.generate(replace(REQUEST, seed=seed), lambda progress: order.append(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    np.testing.assert_array_equal(results[3], expected)
    assert not np.array_equal(results[4], results[5])
    assert len(list(dict.fromkeys(order))) == sum(a != b for a, b in zip(order, [None, *order], strict=False))


def test_a_second_stream_of_the_same_thread_is_refused(pipeline: Pipeline) -> None:
    first = pipeline.stream(REQUEST)
    next(first)
    second = pipeline.stream(REQUEST)
    with pytest.raises(EngineError, match="in the middle of another video"):
        next(second)
    first.close()


def test_a_request_is_refused_before_anything_begins(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="steps=0"):
        pipeline.stream(replace(REQUEST, steps=0))


def test_time_left_is_told_while_sampling(pipeline: Pipeline) -> None:
    steps = [event for event in pipeline.stream(REQUEST) if isinstance(event, Progress) and event.phase == "sampling"]
    left = [event.eta_s for event in steps]
    assert all(seconds is not None and seconds >= 0 for seconds in left)
    assert left[-1] == 0


def test_frames_count_up(pipeline: Pipeline, expected: np.ndarray) -> None:
    batches = [event for event in pipeline.stream(REQUEST) if isinstance(event, Frames)]
    assert [batch.start for batch in batches] == list(np.cumsum([0, *(len(batch.values) for batch in batches[:-1])]))
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in batches]), expected)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in the middle of a video"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_refused_and_the_parent_is_not_disturbed(
    pipeline: Pipeline, expected: np.ndarray, busy: bool
) -> None:
    events = pipeline.stream(REQUEST)
    if busy:  # in another thread, of which the child has only the turn that nobody will end
        thread = threading.Thread(target=next, args=(events,))
        thread.start()
        thread.join()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # the child ends here whatever happens, so that pytest does not run twice
        try:
            pipeline.generate(REQUEST, stop=Stop(10.0))
            said = "it generated"
        except (EngineError, DeadlineError) as error:
            said = str(error)
        pipeline.close()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        said = answers.read()
    os.waitpid(child, 0)
    events.close()
    assert "opened by another process" in said
    assert "open the pipeline in each process" in said
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


@pytest.mark.parametrize(
    ("device", "backend", "index"),
    [("cpu", Backend.CPU, 0), ("cuda", Backend.RTX, 0), ("cuda:0", Backend.TRT, 0), ("cuda:12", Backend.CUDA, 12)],
)
def test_devices(device: str, backend: Backend, index: int) -> None:
    assert device_index(device, backend, "b") == index


@pytest.mark.parametrize(
    ("device", "backend", "fix"),
    [
        ("cuda:0", Backend.CPU, "device='cpu'"),
        ("cpu", Backend.RTX, "device='cuda:0'"),
        ("cuda:-1", Backend.RTX, "device='cuda:0'"),
        ("cuda:x", Backend.CUDA, "device='cuda:0'"),
        ("", Backend.CPU, "device='cpu'"),
    ],
)
def test_devices_that_a_bundle_cannot_use(device: str, backend: Backend, fix: str) -> None:
    with pytest.raises(RequestError, match="bundle 'b' cannot run on this device") as caught:
        device_index(device, backend, "b")
    assert fix in str(caught.value)
