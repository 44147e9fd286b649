"""The service without HTTP: accept, show, cancel; start, drain, close.

It puts the parts together: ``store`` (the truth), ``dispatcher`` (what runs), ``feeds`` (who listens), ``sweeper``
(what is too old). The module knows no web framework.
"""

from __future__ import annotations

import enum
import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from reelforge.runtime.errors import ReelforgeError
from reelforge.tools.service.admission import admit, digest_of_body, limits_answer
from reelforge.tools.service.backend import Backend, Facts
from reelforge.tools.service.clock import Clock
from reelforge.tools.service.dispatcher import Dispatcher
from reelforge.tools.service.feeds import Data, Feed, Feeds
from reelforge.tools.service.metrics import Metrics
from reelforge.tools.service.problems import ServiceError, StoreBusyError, not_found
from reelforge.tools.service.schema import Failure, Job, LimitsAnswer, Progress, VideoRequest
from reelforge.tools.service.settings import Settings
from reelforge.tools.service.store import Full, KeyReused, Record, Store
from reelforge.tools.service.sweeper import Sweeper
from reelforge.tools.service.videos import Videos
from reelforge.tools.service.work import progress_of

_log = logging.getLogger(__name__)

_RETRY_LOADING_S = 5.0
_RETRY_BUSY_S = 1.0
_UNIT_OF_WORK_S = 60.0  # what a step or a tile may take until it hears that it is to stop


class Phase(enum.Enum):
    """Where the service is in its life."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    CLOSED = "closed"


class Service:
    """Jobs of many callers on one backend. Every method may be called from any thread.

    Args:
        settings: What it is told.
        backend: Computes; opened and closed here.
        on_failure: Told when nothing can be computed, from another thread.
    """

    def __init__(
        self, settings: Settings, backend: Backend, on_failure: Callable[[ReelforgeError], None] | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.feeds = Feeds()
        self.listeners = 0
        self.stopping = threading.Event()
        self.failure: ReelforgeError | None = None
        self.on_failure = on_failure
        self._backend = backend
        self._phase = Phase.NEW
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._loader = threading.Thread(target=self._load, name="reelforge-loader", daemon=True)

    # Life

    def start(self) -> None:
        """Take up the folder and what it has, and begin to load the backend, in a thread.

        Raises:
            OutputError: If the folder cannot be used.
        """
        settings = self.settings
        self._videos = Videos(settings.data)
        try:
            self._store = Store(self._videos.database, settings.busy_s)
        except BaseException:
            self._videos.close()
            raise
        live = self._store.live()
        self._clock = Clock(self._store.newest_time())
        self._dispatcher = Dispatcher(
            settings, self._backend, self._store, self._videos, self.feeds, self.metrics, self._clock, self._fail
        )
        self._sweeper = Sweeper(settings, self._store, self._videos, self._clock)
        for record in self._recovered(live):
            self.feeds.open(record.id, _queued(record))
            self._dispatcher.add(record)
        self._sweeper.tidy()
        self.metrics.watch(
            lambda: self._dispatcher.waiting,
            lambda: self._dispatcher.running,
            self._videos.free_bytes,
            lambda: self.listeners,
        )
        self._phase = Phase.LOADING
        self._loader.start()

    def drain(self) -> bool:
        """Accept nothing more, let running jobs finish for ``drain_s`` seconds, return the others to the queue.

        Returns:
            Whether all that ran finished.
        """
        with self._lock:
            if self._phase in (Phase.LOADING, Phase.READY):
                self._phase = Phase.DRAINING
        finished = self._dispatcher.drain(self.settings.drain_s)
        self._dispatcher.wait_until_idle(_UNIT_OF_WORK_S)
        self.stopping.set()
        self.feeds.wake_all()  # streams of jobs that go on another time end here
        return finished

    def close(self) -> None:
        """End everything; what runs goes back to the queue. Closing twice is harmless."""
        with self._lock:
            if self._phase in (Phase.NEW, Phase.CLOSED):
                return
            self._phase = Phase.CLOSED
        self.stopping.set()
        self.feeds.wake_all()
        self._sweeper.stop()
        self._dispatcher.drain(0.0)
        self._dispatcher.wait_until_idle(_UNIT_OF_WORK_S)
        self._loader.join(_UNIT_OF_WORK_S)
        if not self._loader.is_alive():  # what is still being opened ends with the process
            self._backend.close(0.0)
        self._dispatcher.close()
        self._store.close()
        self._videos.close()

    @property
    def phase(self) -> Phase:
        """Where the service is in its life."""
        return self._phase

    @property
    def short_of_room(self) -> bool:
        """Whether jobs wait because the disk is nearly full."""
        return self._phase is not Phase.NEW and self._dispatcher.short_of_room

    # Jobs

    def limits(self) -> LimitsAnswer:
        """Return what requests may ask for.

        Raises:
            ServiceError: 503 while the bundle is being loaded, or if it cannot be.
        """
        return limits_answer(self.settings, self._require_facts())

    def accept(self, caller: str, body: VideoRequest, idempotency_key: str | None = None) -> Job:
        """Accept a job: when this returns, no end of the process loses it.

        Raises:
            ServiceError: 422 for a request that cannot be carried out, 429 without a place, 503 while loading or
                draining.
        """
        if self._phase in (Phase.DRAINING, Phase.CLOSED):
            raise self._refused("draining", 503, "draining", "the service is shutting down", _RETRY_LOADING_S)
        facts = self._require_facts()
        admitted = admit(body, self.settings.limits, facts, self._backend)
        limits = self.settings.limits
        record = Record(
            0,
            f"video_{secrets.token_hex(16)}",
            caller,
            "queued",
            admitted.said,
            admitted.work,
            admitted.priority,
            admitted.deadline_s,
            self._clock.now(),
        )
        idempotency = None if idempotency_key is None else (idempotency_key, digest_of_body(body))
        # Before the row is there, so that nobody can see the job without its feed.
        self.feeds.open(record.id, _queued(record))
        kept = False
        try:
            added = self._store.add(record, limits.waiting, limits.waiting_per_caller, idempotency)
            kept = isinstance(added, Record) and added.id == record.id
        finally:
            if not kept:
                self.feeds.close(record.id)
        if isinstance(added, Full):
            whose = "as many jobs as one caller may have wait already" if added.caller else "the queue is full"
            after = self._dispatcher.retry_after_s()
            reason = "caller_queue_full" if added.caller else "queue_full"
            raise self._refused(reason, 429, reason, f"{whose}: {added.waiting} wait", after)
        if isinstance(added, KeyReused):
            raise ServiceError(
                422, "idempotency_key_reused", "this Idempotency-Key came with another request before",
                ["Idempotency-Key: use a new one for each request"],
            )  # fmt: skip
        if kept:
            self.metrics.accepted.inc()
            self._dispatcher.add(added)
        return self.shown(added)

    def get(self, caller: str, job_id: str) -> Record:
        """Return one of a caller's jobs.

        Raises:
            ServiceError: 404 if there is none of his with this id.
        """
        record = self._store.get(job_id)
        if record is None or record.caller != caller:
            raise not_found()
        return record

    def page(self, caller: str, limit: int, after: str | None) -> tuple[list[Job], bool]:
        """Return a caller's jobs, newest first, and whether there are more.

        Raises:
            ServiceError: 404 if ``after`` is none of his.
        """
        found = self._store.page(caller, limit, after)
        if found is None:
            raise not_found()
        return [self.shown(record) for record in found[0]], found[1]

    def delete(self, caller: str, job_id: str) -> Job:
        """Cancel a job that has not ended; delete the video of one that has, and take it out of the list.

        Raises:
            ServiceError: 404 if there is none of his with this id.
        """
        record = self.get(caller, job_id)
        if not record.ended:
            self._cancel(job_id)
            record = self.get(caller, job_id)
        else:
            if record.has_file:
                self._videos.delete(job_id)
                self._store.file_deleted(job_id, self._clock.now())
            self._store.hide(job_id)
            record = self.get(caller, job_id)
        return self.shown(record)

    def content(self, caller: str, job_id: str) -> tuple[Path, os.stat_result]:
        """Return where the video is, and what the file system says of it.

        Raises:
            ServiceError: 404, 409 as long as there is none, 410 when it was deleted.
        """
        record = self.get(caller, job_id)
        if record.status != "completed":
            raise ServiceError(409, "not_completed", f"there is no video: the job is {record.status}")
        path = self._videos.video(job_id)
        deleted = ServiceError(410, "expired", "the video was deleted")
        if not record.has_file:
            raise deleted
        try:
            return path, path.stat()
        except FileNotFoundError as error:
            raise deleted from error

    def shown(self, record: Record) -> Job:
        """Return a job as callers see it."""
        if record.ended:
            steps = int(record.request["steps"])
            step = steps if record.status == "completed" else record.step
            progress = progress_of(record.status, step, steps, 0.0 if record.status == "completed" else None)
        else:
            feed = self.feeds.find(record.id)
            progress = _queued(record) if feed is None else feed.progress
        failure = None
        if record.error_code is not None:
            failure = Failure(code=record.error_code, message=record.error_message or "")
        return Job(
            id=record.id,
            status=record.status,  # type: ignore[arg-type]  # the table's own CHECK
            created_at=record.created_at,
            started_at=record.started_at,
            finished_at=record.finished_at,
            progress=Progress.model_validate(progress),
            request=record.request,
            error=failure,
            expires_at=record.expires_at,
            attempts=record.attempts,
        )

    def feed(self, job_id: str) -> Feed | None:
        """Return a job's events; None if it has ended."""
        return self.feeds.find(job_id)

    # Inside

    def _cancel(self, job_id: str) -> None:
        if self._store.cancel(job_id, self._clock.now(), self._dispatcher.step(job_id)):
            self.metrics.ended.labels("cancelled").inc()
            self._dispatcher.withdraw(job_id)
            self.feeds.close(job_id)

    def _recovered(self, live: list[Record]) -> list[Record]:
        """Return the jobs that wait, after those that ran when the last process ended were seen to."""
        self._videos.drop_unfinished_videos()
        waiting = []
        for record in live:
            if record.status == "running":
                now = self._clock.now()
                if self._videos.exists(record.id):  # renamed, and the process ended before it could say so
                    self._store.complete(
                        record.id, record.attempts, now, now + self.settings.retention_s, int(record.request["steps"])
                    )
                    self._videos.clear(record.id)
                    continue
                if record.crashes + 1 >= self.settings.most_crashes:
                    message = f"the service ended {record.crashes + 1} times while it worked on this job"
                    self._store.fail(record.id, now, "gave_up", message)
                    self._videos.clear(record.id)
                    continue
                self._store.crashed(record.id)
                self.metrics.returned.labels("crashed").inc()
            known = self._store.get(record.id)
            assert known is not None
            waiting.append(known)
        return waiting

    def _load(self) -> None:
        try:
            self._backend.open()
            facts = self._backend.describe()
        except ReelforgeError as error:
            self._fail(error)
            return
        except BaseException as error:  # noqa: BLE001 - nobody is above this thread; whoever waits is told
            _log.error("the backend cannot be opened", exc_info=error)
            self._fail(ReelforgeError(f"the backend cannot be opened: {type(error).__name__}."))
            return
        with self._lock:
            self._facts = facts
            if self._phase is not Phase.LOADING:
                return
            self._phase = Phase.READY
        self._dispatcher.start()
        self._sweeper.start()

    def _fail(self, error: ReelforgeError) -> None:
        _log.error("the service cannot work: %s", error)
        with self._lock:
            self.failure = error
            if self._phase in (Phase.LOADING, Phase.READY):
                self._phase = Phase.FAILED
        if self.on_failure is not None:
            self.on_failure(error)

    def _require_facts(self) -> Facts:
        if self._phase is Phase.FAILED:
            raise self._refused("failed", 503, "unavailable", "the model cannot be used at the moment", 60.0)
        if self._facts is None:
            raise self._refused("loading", 503, "loading", "the model is being loaded", _RETRY_LOADING_S)
        return self._facts

    def _refused(self, reason: str, status: int, code: str, message: str, after_s: float) -> ServiceError:
        self.metrics.refused.labels(reason).inc()
        return ServiceError(status, code, message, retry_after_s=after_s)


def busy(error: StoreBusyError) -> ServiceError:
    """Return the answer while the database does not answer."""
    _log.warning("%s", error.where)
    return ServiceError(503, "busy", "the jobs' database does not answer", retry_after_s=_RETRY_BUSY_S)


def _queued(record: Record) -> Data:
    return progress_of("queued", 0, int(record.request["steps"]))
