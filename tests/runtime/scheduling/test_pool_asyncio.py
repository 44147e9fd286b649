"""Jobs from asyncio: awaited, read and cancelled without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from reelforge.runtime.errors import CancelledError, EngineError, RequestError
from reelforge.runtime.events import Event, Frames
from reelforge.runtime.scheduling.job import State
from reelforge.runtime.scheduling.limits import QueueLimits
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.scheduling.fake_pipeline import WAIT_S, Hold, World, engine_error, expected_frames, small


@pytest.fixture
def pool(world: World) -> Iterator[PipelinePool]:
    with PipelinePool(world.open, ["a", "b"], QueueLimits(frames_ahead=1)) as pool:
        yield pool
        for hold in world.holds.values():
            hold.release()


async def reached(hold: Hold) -> None:
    await asyncio.to_thread(hold.wait_until_reached)


def test_awaiting_many_jobs(pool: PipelinePool) -> None:
    async def run() -> None:
        requests = [small("x", seed) for seed in range(20)]
        jobs = [pool.submit(request, caller=f"{request.seed % 3}") for request in requests]
        for request, frames in zip(requests, await asyncio.gather(*jobs), strict=True):
            np.testing.assert_array_equal(frames, expected_frames(request))
        np.testing.assert_array_equal(await jobs[0], expected_frames(requests[0]))

    asyncio.run(run())


def test_cancelling_the_task_cancels_the_job(pool: PipelinePool, world: World) -> None:
    async def run() -> None:
        hold = world.hold("slow")
        job = pool.submit(small("slow"))

        async def wait() -> None:
            await job

        task = asyncio.create_task(wait())
        await reached(hold)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert job.stop.wanted
        hold.release()
        with pytest.raises(CancelledError, match="nobody waits for it"):
            await job
        assert job.state is State.CANCELLED

    asyncio.run(run())


def test_a_shielded_job_goes_on(pool: PipelinePool, world: World) -> None:
    async def run() -> None:
        hold = world.hold("slow")
        job = pool.submit(small("slow"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(job), 0.01)
        hold.release()
        assert len(await job) == 5

    asyncio.run(run())


def test_events_of_a_streamed_job(pool: PipelinePool) -> None:
    request = small("x", frames=41)

    async def run() -> list[Event]:
        return [event async for event in pool.submit(request, stream=True).events_async()]

    frames = [event.pixels for event in asyncio.run(run()) if isinstance(event, Frames)]
    np.testing.assert_array_equal(np.concatenate(frames), expected_frames(request))


def test_a_reader_whose_task_is_cancelled_cancels_his_job(pool: PipelinePool, world: World) -> None:
    async def run() -> None:
        hold = world.hold("slow")
        job = pool.submit(small("slow"), stream=True)

        async def read() -> None:
            async for _ in job.events_async():
                pass

        task = asyncio.create_task(read())
        await reached(hold)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hold.release()
        assert await asyncio.to_thread(job.wait, WAIT_S)
        assert "whoever read its frames left" in str(job.error)

    asyncio.run(run())


def test_errors_arrive(pool: PipelinePool, world: World) -> None:
    world.failures["bad"] = engine_error("stage 'dit' failed.")

    async def run() -> None:
        with pytest.raises(EngineError, match="stage 'dit' failed"):
            await pool.submit(small("bad"))
        with pytest.raises(EngineError, match="stage 'dit' failed"):
            async for _ in pool.submit(small("bad")).events_async():
                pass
        with pytest.raises(RequestError, match="none are kept"):
            await pool.submit(small("x"), stream=True)

    asyncio.run(run())


def test_a_loop_that_is_gone_does_not_disturb_the_job(pool: PipelinePool, world: World) -> None:
    hold = world.hold("slow")
    job = pool.submit(small("slow"))

    async def look() -> None:
        events = job.events_async()
        await reached(hold)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(look())
    hold.release()
    assert len(job.result(WAIT_S)) == 5
