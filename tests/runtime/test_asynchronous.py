"""A pipeline from asyncio: same results, a free loop, cancellation in each phase, back-pressure, no threads left."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Frames, Pipeline, Request, Stop
from reelforge.runtime.asynchronous import stream
from reelforge.runtime.errors import CancelledError, DeadlineError, RequestError
from reelforge.runtime.events import Event, Progress
from tests.runtime.fake_bundle import STAGES
from tests.runtime.gate import WAIT_S, Gate, gate_on_engines

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=6, seed=3)


@pytest.fixture(scope="module")
def pipeline(fake_bundle: Path) -> Pipeline:
    return Pipeline.open(fake_bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> np.ndarray:
    return pipeline.generate(REQUEST)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    with gate_on_engines(monkeypatch) as gate:
        yield gate


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("reelforge"):
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{thread.name} goes on"


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S), "nothing came"


def test_the_same_bytes(pipeline: Pipeline, expected: np.ndarray) -> None:
    async def run() -> tuple[np.ndarray, list[Event]]:
        return await pipeline.generate_async(REQUEST), [event async for event in pipeline.stream_async(REQUEST)]

    frames, events = asyncio.run(run())
    np.testing.assert_array_equal(frames, expected)
    pixels = [event.pixels for event in events if isinstance(event, Frames)]
    np.testing.assert_array_equal(np.concatenate(pixels), expected)
    assert [type(event) for event in events] == [type(event) for event in pipeline.stream(REQUEST)]


def test_the_callers_own_noise_and_the_saved_latents(pipeline: Pipeline, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(pipeline.inputs.latent_shape(pipeline.resolve(REQUEST).shape))
    noise = noise.astype(np.float32)
    frames = asyncio.run(pipeline.generate_async(REQUEST, noise, tmp_path / "a.npy"))
    np.testing.assert_array_equal(frames, pipeline.generate(REQUEST, None, noise, tmp_path / "b.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_cancelling_in_each_phase_stops_before_the_next_unit(
    pipeline: Pipeline, expected: np.ndarray, gate: Gate, stage: str, streamed: bool
) -> None:
    stop = Stop()
    request = replace(REQUEST, prompt=f"{'ab'[streamed]} {stage}")  # a new one: stages remember what they were asked

    async def consume() -> None:
        if streamed:
            async for _ in pipeline.stream_async(request, stop=stop):
                pass
        else:
            await pipeline.generate_async(request, stop=stop)

    async def run() -> None:
        gate.hold(stage)
        task = asyncio.create_task(consume())
        await reached(gate.entered)  # the loop turns although an engine computes
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done(), "it must not return while the engine computes"
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert gate.runs[stage] == 1
    assert [gate.runs[later] for later in STAGES[STAGES.index(stage) + 1 :]] == [0] * (5 - STAGES.index(stage))
    with pytest.raises(CancelledError, match="nobody waits for it"):
        stop.check("more")
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


def test_cancelled_twice_while_the_unit_ends(pipeline: Pipeline, expected: np.ndarray, gate: Gate) -> None:
    async def run() -> None:
        gate.hold("dit")
        task = asyncio.create_task(pipeline.generate_async(REQUEST))
        await reached(gate.entered)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()

    asyncio.run(run())
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


def test_leaving_the_loop_early_closes_the_stream(pipeline: Pipeline, expected: np.ndarray) -> None:
    async def run() -> None:
        events = pipeline.stream_async(REQUEST)
        async for event in events:
            if isinstance(event, Progress) and event.phase == "sampling":
                break
        await events.aclose()
        np.testing.assert_array_equal(await pipeline.generate_async(REQUEST), expected)

    asyncio.run(run())


def test_leaving_while_the_next_event_fails_complains_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    failing = threading.Event()

    def work() -> Iterator[Event]:
        yield Progress("text", 1, 2)
        failing.set()
        raise CancelledError("it was stopped.")

    async def run() -> None:
        events = stream(work, Stop())  # type: ignore[arg-type]
        await anext(events)
        await reached(failing)
        await events.aclose()

    asyncio.run(run())
    gc.collect()
    assert caplog.records == []


def test_an_iterator_that_is_dropped_is_closed_with_its_loop(pipeline: Pipeline, expected: np.ndarray) -> None:
    async def run() -> None:
        await anext(pipeline.stream_async(REQUEST))

    asyncio.run(run())
    np.testing.assert_array_equal(pipeline.generate(REQUEST), expected)


def test_a_slow_consumer_holds_the_work_back() -> None:
    made: list[int] = []
    second = threading.Event()

    def work() -> Iterator[Event]:
        for number in range(20):
            made.append(number)
            if number == 1:
                second.set()
            yield Progress("sampling", number, 20)

    async def run(events: AsyncIterator[Event]) -> None:
        await anext(events)
        await reached(second)
        for _ in range(5):
            await asyncio.sleep(0.01)
            assert made == [0, 1], "one ahead and no more"
        for taken in range(1, 20):
            await anext(events)
            assert len(made) <= taken + 2
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(run(stream(work, Stop())))  # type: ignore[arg-type]
    assert made == list(range(20))


def test_errors_arrive(pipeline: Pipeline) -> None:
    async def run() -> None:
        with pytest.raises(RequestError, match="steps=0"):
            pipeline.stream_async(replace(REQUEST, steps=0))
        with pytest.raises(RequestError, match="steps=0"):
            await pipeline.generate_async(replace(REQUEST, steps=0))
        with pytest.raises(DeadlineError, match="before its first stage"):
            await pipeline.generate_async(REQUEST, stop=Stop(0.0))
        with pytest.raises(RequestError, match="initial latents"):
            await anext(pipeline.stream_async(REQUEST, latents=np.zeros(3, np.float32)))

    asyncio.run(run())


def test_many_tasks_share_one_pipeline(pipeline: Pipeline) -> None:
    seeds = range(4)

    async def run() -> list[np.ndarray]:
        return await asyncio.gather(*(pipeline.generate_async(replace(REQUEST, seed=seed)) for seed in seeds))

    for seed, frames in zip(seeds, asyncio.run(run()), strict=True):
        np.testing.assert_array_equal(frames, pipeline.generate(replace(REQUEST, seed=seed)))


def test_a_stop_is_left_alone_when_nothing_went_wrong(pipeline: Pipeline) -> None:
    stop = Stop()
    asyncio.run(pipeline.generate_async(REQUEST, stop=stop))
    assert not stop.wanted
