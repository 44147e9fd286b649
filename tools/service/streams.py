"""A job's events as a stream of server-sent events (WHATWG HTML, section 9.2).

Whoever comes back with ``Last-Event-ID`` is told what came later, as far as it is kept, and in any case the newest.
The module knows one listener; what jobs say is in ``feeds``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable

from starlette.concurrency import run_in_threadpool

from reelforge.tools.service.feeds import Data, Feed
from reelforge.tools.service.problems import ServiceError, StoreBusyError
from reelforge.tools.service.schema import Job
from reelforge.tools.service.service import Service

MEDIA_TYPE = "text/event-stream"
_TOGETHER_S = 0.05
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def event_stream(
    service: Service, caller: str, job_id: str, last_event_id: str | None
) -> AsyncGenerator[bytes, None]:
    """Yield a job's events until it ends, or the service does.

    Args:
        service: Has the job.
        caller: Whose it is.
        job_id: One of his.
        last_event_id: The last that he has seen.
    """
    feed = service.feed(job_id)  # before the store is asked, so that no end can come in between
    job = await _ask(service, caller, job_id)
    if feed is None or job.progress.phase == job.status != "queued":
        yield _final(job)
        return
    news, loop = asyncio.Event(), asyncio.get_running_loop()
    listener = _listener(news, loop)
    feed.listen(listener)
    service.listeners += 1
    try:
        after = _number(last_event_id, feed)
        if after is None:
            # Pictures that were made before are not sent again to somebody new; the newest place is.
            after = max((said.number for said in feed.after(0)), default=0)
            yield message("progress", feed.progress, f"{feed.name}-{after}")
        while True:
            news.clear()
            closed = feed.closed  # asked before the events, so that none can come in between
            batch = feed.after(after)
            if batch:
                after = batch[-1].number
                yield b"".join(message(said.name, said.data, f"{feed.name}-{said.number}") for said in batch)
            if closed:
                yield _final(await _ask(service, caller, job_id))
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


def _final(job: Job) -> bytes:
    return message(job.status, job.model_dump(mode="json"))


async def _ask(service: Service, caller: str, job_id: str) -> Job:
    """Return the job; a stream that has begun has no other answer than to wait while the database is locked."""
    for _ in range(10):
        try:
            return service.shown(await run_in_threadpool(service.get, caller, job_id))
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
