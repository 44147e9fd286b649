"""A pipeline from ``asyncio``: its work is done by a thread of its own, and the event loop never waits for it.

Each event is asked for in the thread, one ahead of the consumer: while an event is being looked at, the next one is
made, and no third. A slow consumer therefore holds the work back. Leaving (a cancelled task, a closed iterator) stops
the work before its next unit and waits for the unit under way, so that the pipeline is free when control returns. The
module does not know what is generated; several pipelines and waiting requests are matters of ``runtime.scheduling``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from reelforge.runtime.control import Stop
from reelforge.runtime.events import Event, Pixels

Result = TypeVar("Result")


async def generate(work: Callable[[], Pixels], stop: Stop) -> Pixels:
    """Run a whole generation in a thread.

    Args:
        work: Generates, and obeys ``stop``.
        stop: Set if the awaiting task is cancelled.

    Raises:
        asyncio.CancelledError: If the task is cancelled, once the unit of work under way has ended.
        ReelforgeError: Whatever ``work`` raises.
    """
    async with _thread(stop, _nothing) as begin:
        return await begin(work)


async def stream(begin_stream: Callable[[], Generator[Event, None, None]], stop: Stop) -> AsyncGenerator[Event, None]:
    """Yield the events of a generation that runs in a thread.

    Args:
        begin_stream: Returns the events; it is called in the thread, and what it returns is used and closed there.
        stop: Set if the consumer leaves.

    Raises:
        ReelforgeError: Whatever the events' generator raises.
    """
    opened: list[Generator[Event, None, None]] = []

    def first() -> Event | None:
        opened.append(begin_stream())
        return following()

    def following() -> Event | None:
        return next(opened[0], None)

    def close() -> None:
        for events in opened:
            events.close()

    async with _thread(stop, close) as begin:
        event = await begin(first)
        while event is not None:
            ahead = begin(following)
            yield event
            event = await ahead


@asynccontextmanager
async def _thread(
    stop: Stop, finish: Callable[[], None]
) -> AsyncIterator[Callable[[Callable[[], Result]], Awaitable[Result]]]:
    """Lend a thread for what is done in the block; whatever ends the block, ``finish`` is the thread's last work."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, "reelforge-generation")

    def begin(work: Callable[[], Result]) -> Awaitable[Result]:
        future = loop.run_in_executor(executor, work)
        future.add_done_callback(_looked_at)
        return future

    try:
        yield begin
    except BaseException:
        stop.set("nobody waits for it any longer")
        raise
    finally:
        # The thread does one thing after the other: this is done when the unit of work under way is. A second
        # cancellation ends the waiting and not the work.
        last = loop.run_in_executor(executor, finish)
        executor.shutdown(wait=False)
        await asyncio.shield(last)


def _looked_at(future: asyncio.Future[Result]) -> None:
    """Keep asyncio from complaining about the failure of an event that nobody asked for: its consumer has left."""
    if not future.cancelled():
        future.exception()


def _nothing() -> None:
    """The last work where there is nothing to give back."""
