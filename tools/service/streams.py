"""A job's events as a stream of server-sent events (WHATWG HTML, section 9.2).

Whoever comes back with ``Last-Event-ID`` is told what came later, as far as it is kept, and in any case the newest;
whoever is new, the newest picture and progress, and then what follows.
The module knows one listener; what jobs say is in ``feeds``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable

from starlette.concurrency import run_in_threadpool

from reelforge.tools.service.feeds import Data, Feed, Said
from reelforge.tools.service.problems import ServiceError, StoreBusyError
from reelforge.tools.service.schema import Job
from reelforge.tools.service.service import Service
from reelforge.tools.service.store import Record

MEDIA_TYPE = "text/event-stream"
_TOGETHER_S = 0.05
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def event_stream(
    service: Service, feed: Feed | None, record: Record, last_event_id: str | None
) -> AsyncGenerator[bytes, None]:
    """Yield a job's events until it ends, or the service does.

    Args:
        service: Has the job.
        feed: The job's, looked up before the store was asked for ``record``, so that no end can come in between.
        record: The job.
        last_event_id: The last event that its caller has seen.
    """
    if feed is None or record.ended:
        yield _final(await _ask(service, record))
        return
    news, loop = asyncio.Event(), asyncio.get_running_loop()
    listener = _listener(news, loop)
    feed.listen(listener)
    service.listeners += 1
    try:
        after = _number(last_event_id, feed)
        if after is None:
            newest, after = feed.newest()
            yield _messages(feed, newest)
        while True:
            news.clear()
            closed = feed.closed  # asked before the events, so that none can come in between
            batch = feed.after(after)
            if batch:
                after = batch[-1].number
                yield _messages(feed, batch)
            if closed:
                yield _final(await _ask(service, record))
                return
            if service.stopping.is_set():
                yield b": the service is shutting down; the job goes on when it is back\n\n"
                return
            if batch:
                # Steps of small models take two milliseconds, and each message takes the interpreter from the loop that
                # computes them: what is said in quick succession is sent together.
                await asyncio.sleep(_TOGETHER_S)
            try:
                async with asyncio.timeout(service.settings.keep_alive_s):
                    await news.wait()
            except TimeoutError:
                yield b": keep-alive\n\n"
    finally:
        service.listeners -= 1
        feed.unlisten(listener)


def message(name: str, data: Data, identity: str | None = None) -> bytes:
    """Return one event."""
    lines = [] if identity is None else [f"id: {identity}"]
    lines += [f"event: {name}", f"data: {json.dumps(data, separators=(',', ':'))}", "", ""]
    return "\n".join(lines).encode()


def _messages(feed: Feed, batch: list[Said]) -> bytes:
    return b"".join(message(said.name, said.data, f"{feed.name}-{said.number}") for said in batch)


def _final(job: Job) -> bytes:
    return message(job.status, job.model_dump(mode="json"))


async def _ask(service: Service, record: Record) -> Job:
    """Return the job; a stream that has begun has no other answer than to wait while the database is locked."""
    for _ in range(10):
        try:
            return service.shown(await run_in_threadpool(service.get, record.caller, record.id))
        except StoreBusyError:
            await asyncio.sleep(0.5)
    raise ServiceError(503, "busy", "the jobs' database does not answer")


def _number(last_event_id: str | None, feed: Feed) -> int | None:
    """Return the number of the last event seen; None if it is not one of this feed."""
    name, _, number = (last_event_id or "").partition("-")
    if name != feed.name or not (number.isascii() and number.isdigit()) or len(number) > 18:
        return None
    return int(number)


def _listener(news: asyncio.Event, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    def listener() -> None:
        if not news.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(news.set)

    return listener
