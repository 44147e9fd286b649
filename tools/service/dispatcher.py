"""Jobs from the queue to the backend and their ends into the store.

Which job is next is decided as in ``runtime.scheduling``: priorities, then fair shares between callers. Everything
here can be lost at any moment: what counts is in the store, and a job is run again whose end is not there. The module
knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from reelforge.runtime.errors import ReelforgeError
from reelforge.runtime.scheduling.fair_queue import FairQueue
from reelforge.tools.service.admission import request_of
from reelforge.tools.service.backend import Backend, BackendLostError
from reelforge.tools.service.clock import Clock
from reelforge.tools.service.feeds import Feeds
from reelforge.tools.service.metrics import Metrics
from reelforge.tools.service.outcome import Outcome, outcome_of
from reelforge.tools.service.problems import StoreBusyError
from reelforge.tools.service.settings import Settings
from reelforge.tools.service.store import Record, Store
from reelforge.tools.service.videos import Videos
from reelforge.tools.service.work import StoppedError, Work

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

_LOOK_AGAIN_S = 1.0  # for room on the disk, and for a backend that has grown
_LONGEST_RETRY_S = 2.0


@dataclass(eq=False)
class Ticket:
    """A job that waits; what ``FairQueue`` must know of it."""

    record: Record
    until_s: float | None  # on the steady clock
    queued_s: float = field(default_factory=time.monotonic)

    @property
    def caller(self) -> str:
        """Whose it is."""
        return self.record.caller

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.record.priority

    @property
    def number(self) -> int:
        """Counts up with every job."""
        return self.record.seq

    @property
    def cost(self) -> float:
        """The work it is."""
        return max(self.record.work, 1.0)


class Dispatcher:
    """Runs what waits. Every method may be called from any thread.

    Args:
        settings: How much is run ahead, how much room is kept free.
        backend: Computes; open.
        store: The truth.
        videos: The files.
        feeds: For those who listen.
        metrics: What is counted.
        clock: For times in the store.
        lost: Told when the backend is gone for good; what waits goes on waiting.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        store: Store,
        videos: Videos,
        feeds: Feeds,
        metrics: Metrics,
        clock: Clock,
        lost: Callable[[ReelforgeError], None],
    ) -> None:
        self._settings, self._backend, self._lost = settings, backend, lost
        self._store, self._videos, self._feeds, self._metrics, self._clock = store, videos, feeds, metrics, clock
        self._changed = threading.Condition()
        self._queue: FairQueue[Ticket] = FairQueue()
        self._tickets: dict[str, Ticket] = {}
        self._running: dict[str, Work] = {}
        self._threads: set[threading.Thread] = set()
        self._claiming = True
        self._calls = 0
        self._abandoned = threading.Event()
        self._pace: float | None = None
        self.short_of_room = False
        self._loop = threading.Thread(target=self._dispatch, name="reelforge-dispatcher", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._loop.start()

    def add(self, record: Record) -> None:
        """Take up a job that the store has as waiting."""
        until = None
        if record.deadline_s is not None:
            gone = min(max(self._clock.now() - record.created_at, 0.0), record.deadline_s)
            until = time.monotonic() + record.deadline_s - gone
        with self._changed:
            self._tickets[record.id] = Ticket(record, until)
            self._queue.push(self._tickets[record.id])
            self._changed.notify_all()

    def step(self, job_id: str) -> int:
        """Return how many steps of a job are done."""
        with self._changed:
            work = self._running.get(job_id)
            return 0 if work is None else work.step

    def withdraw(self, job_id: str) -> None:
        """Drop a job that the store has as cancelled."""
        with self._changed:
            ticket = self._tickets.pop(job_id, None)
            if ticket is not None:
                self._queue.remove(ticket)
            work = self._running.get(job_id)
            if work is not None:
                work.stop("cancelled")

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        with self._changed:
            return len(self._queue)

    @property
    def running(self) -> int:
        """How many jobs were handed to the backend."""
        with self._changed:
            return len(self._running)

    def retry_after_s(self) -> float:
        """Estimate when a place may be free."""
        return min(max(self._pace or 5.0, 1.0), 600.0)

    def drain(self, limit_s: float) -> bool:
        """Begin nothing more, let what runs go on for ``limit_s`` seconds, and return the rest to the queue.

        Returns:
            Whether everything finished by itself.
        """
        with self._changed:
            self._claiming = False
            self._changed.notify_all()
            # What was handed over and has not begun would begin now: it goes back at once.
            for work in self._running.values():
                if not work.begun:
                    work.stop("stopped")
            finished = self._changed.wait_for(lambda: not self._running, limit_s)
            for work in self._running.values():
                work.stop("stopped")
        return finished

    def wait_until_idle(self, limit_s: float) -> bool:
        """Wait until nothing runs; a unit of work, once begun, is not interrupted."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, limit_s)

    def close(self) -> None:
        """Let go of everything; what still runs is found in the store by the next process."""
        with self._changed:
            self._claiming = False
            self._changed.notify_all()
        self._abandoned.set()
        if self._loop.ident is not None:
            self._loop.join(5.0)
        for thread in list(self._threads):
            thread.join(5.0)

    # The dispatcher's thread

    def _dispatch(self) -> None:
        try:
            while self._dispatch_once():
                pass
        except BaseException as error:  # noqa: BLE001 - nobody is above this thread; without it no job begins
            self._ended_badly("the dispatcher", error)

    def _dispatch_once(self) -> bool:
        with self._changed:
            expired = self._expired()
            if not self._claiming:
                return False
            if not expired and not self._claim():
                self._changed.wait(self._until_next_s())
        for ticket in expired:
            self._end(ticket.record.id, Outcome("failed", "deadline", "the deadline passed in the queue"), None)
        return True

    def _ended_badly(self, what: str, error: BaseException) -> None:
        """End the service, for a bug or a database that is damaged: it would go on, and look sound, without working.

        While everything is being let go of that is no news: the next start finds whatever could not be written.
        """
        if self._abandoned.is_set():
            _log.error("%s ended without its last word in the database: %s", what, error)
            return
        _log.error("%s ended with a bug, or the database is damaged", what, exc_info=error)
        with self._changed:
            self._claiming = False
        self._lost(ReelforgeError(f"{what} could not go on: {type(error).__name__}.", fix="see the service's log"))

    def _claim(self) -> bool:
        """Hand the next job over, if there is one and a place for it."""
        if not self._queue or len(self._running) >= self._backend.capacity:
            return False
        self.short_of_room = self._videos.free_bytes() < self._settings.least_free_bytes
        ticket = None if self.short_of_room else self._queue.pop()
        if ticket is None:
            return False
        del self._tickets[ticket.record.id]
        self._calls += 1
        work = Work(ticket.record, self._calls, ticket.queued_s, self._feeds.find(ticket.record.id), self._metrics)
        work.until_s = ticket.until_s
        self._running[ticket.record.id] = work
        thread = threading.Thread(target=self._carry_out, args=(ticket, work), name=f"reelforge-job-{ticket.number}")
        thread.daemon = True
        self._threads.add(thread)
        thread.start()
        return True

    def _expired(self) -> list[Ticket]:
        now = time.monotonic()
        over = [ticket for ticket in self._queue if ticket.until_s is not None and ticket.until_s <= now]
        for ticket in over:
            self._queue.remove(ticket)
            self._tickets.pop(ticket.record.id, None)
        for work in self._running.values():
            if work.until_s is not None and work.until_s <= now:
                work.stop("deadline")
        return over

    def _until_next_s(self) -> float:
        ends = [ticket.until_s for ticket in self._queue]
        # Work that is to end already ends when its unit is done, and is not waited for here.
        ends += [work.until_s for work in self._running.values() if work.reason is None]
        left = [end - time.monotonic() for end in ends if end is not None]
        return max(min(left, default=_LOOK_AGAIN_S), 0.01) if left else _LOOK_AGAIN_S

    # One thread for each job that runs

    def _carry_out(self, ticket: Ticket, work: Work) -> None:
        record, error = ticket.record, None
        began_s = time.monotonic()
        try:
            request = request_of(record.request)
            output = self._videos.unfinished(record.id, work.call)
            work.begin = lambda: self._persist(lambda: self._store.begin(record.id, self._clock.now()))
            self._backend.run(record.id, request, work.take, work.cancelled, output, self._videos.kept(record.id))
            work.require_begun()
            if work.reason is None:
                self._videos.publish(record.id, output)
            else:  # it was finished in the moment in which it was to end: nobody is told otherwise
                output.unlink(missing_ok=True)
                raise StoppedError("the job ended before its video was published.")
        except BaseException as caught:  # noqa: BLE001 - nobody is above this thread; the job carries it on
            error = caught
        try:
            self._conclude(ticket, work, error, time.monotonic() - began_s)
        except BaseException as caught:  # noqa: BLE001 - nobody is above this thread
            self._ended_badly(record.id, caught)
        finally:
            with self._changed:
                self._running.pop(record.id, None)
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()

    def _conclude(self, ticket: Ticket, work: Work, error: BaseException | None, took_s: float) -> None:
        record = ticket.record
        outcome = outcome_of(error, work.reason)
        if outcome.unexpected:
            _log.error("%s ended with a bug", record.id, exc_info=error)
        elif outcome.status == "failed":
            _log.warning("%s failed: %s", record.id, error)
        if outcome.status == "queued":
            self._persist(lambda: self._store.put_back(record.id))
            self._metrics.returned.labels(outcome.code).inc()
            if isinstance(error, BackendLostError):
                self._give_up(ticket, error)
            return
        if outcome.status == "completed":
            self._pace = took_s if self._pace is None else 0.7 * self._pace + 0.3 * took_s
        self._end(record.id, outcome, work)

    def _give_up(self, ticket: Ticket, error: ReelforgeError) -> None:
        with self._changed:
            self._claiming = False
            self._tickets[ticket.record.id] = ticket
            self._queue.push(ticket)
            self._changed.notify_all()
        self._lost(error)

    def _end(self, job_id: str, outcome: Outcome, work: Work | None) -> None:
        """Write a job's end down, then tell those who listen."""
        now, step = self._clock.now(), 0 if work is None else work.step
        if outcome.status == "completed":
            assert work is not None
            attempt, expires = work.attempt or 0, now + self._settings.retention_s
            first = self._persist(lambda: self._store.complete(job_id, attempt, now, expires, step))
            if not first:  # it was cancelled in the last moment
                self._videos.delete(job_id)
        elif outcome.status == "cancelled":
            first = self._persist(lambda: self._store.cancel(job_id, now, step))
        else:
            first = self._persist(lambda: self._store.fail(job_id, now, outcome.code, outcome.message, step))
        self._videos.clear(job_id)
        self._feeds.close(job_id)
        if first:
            self._metrics.ended.labels(outcome.status).inc()
            if outcome.status == "failed":
                self._metrics.failures.labels(outcome.code).inc()
            if work is not None and work.began_s is not None:
                self._metrics.job_seconds.observe(time.monotonic() - work.began_s)

    def _persist(self, change: Callable[[], Result]) -> Result:
        """Write, however long the database is locked or its disk full: what was computed is not given up for that."""
        pause_s = 0.05
        while True:
            try:
                return change()
            except StoreBusyError as error:
                _log.warning("%s It is tried again.", error.where)
                if self._abandoned.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
