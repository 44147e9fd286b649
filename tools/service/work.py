"""One job while it runs: what the backend says becomes progress, pictures and measurements.

The module knows neither the store nor which job is next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from reelforge.runtime.errors import CancelledError
from reelforge.runtime.events import Progress
from reelforge.tools.service.backend import Told
from reelforge.tools.service.feeds import Data, Feed
from reelforge.tools.service.metrics import Metrics
from reelforge.tools.service.store import Record

SAMPLING = "sampling"


class StoppedError(CancelledError):
    """Work on a job was stopped by the service itself."""


def progress_of(phase: str, step: int, steps: int, eta_s: float | None = None) -> Data:
    """Return progress as callers see it."""
    return {"phase": phase, "step": step, "steps": steps, "eta_s": None if eta_s is None else round(eta_s, 3)}


class Work:
    """A job that was handed to the backend.

    Args:
        record: The job.
        call: The number of this call, which no other of this process has.
        queued_s: Since when it has waited, on the steady clock.
        feed: For those who listen.
        metrics: What is counted.
    """

    def __init__(self, record: Record, call: int, queued_s: float, feed: Feed | None, metrics: Metrics) -> None:
        self.call = call
        self.cancelled = threading.Event()
        self.reason: str | None = None
        self.until_s: float | None = None
        self.attempt: int | None = None
        self.began_s: float | None = None
        self.step = 0
        self.begin: Callable[[], int | None] = lambda: None
        self._id = record.id
        self._queued_s = queued_s
        self._feed, self._metrics = feed, metrics
        self._last_s: float | None = None
        self._skipped: int | None = None

    @property
    def begun(self) -> bool:
        """Whether the backend has said anything."""
        return self.attempt is not None

    def stop(self, reason: str) -> None:
        """End the work before its next unit; the first reason counts: ``cancelled``, ``deadline`` or ``stopped``."""
        if self.reason is None:
            self.reason = reason
        self.cancelled.set()

    def require_begun(self) -> None:
        """Note that work has begun, the first time.

        Raises:
            StoppedError: If the job does not wait any longer: somebody has cancelled it.
        """
        if self.attempt is None:
            now = time.monotonic()
            self.attempt = self.begin()
            if self.attempt is None:
                self.stop("cancelled")
                raise StoppedError(f"{self._id} was cancelled before its turn came.")
            self.began_s = now
            self._metrics.waited_seconds.observe(now - self._queued_s)

    def take(self, event: Told) -> None:
        """Pass on what the backend says."""
        self.require_begun()
        if not isinstance(event, Progress):
            return
        if event.phase == SAMPLING:
            self._measure(event)
        if self._feed is None:
            return
        self._feed.tell_progress(progress_of(event.phase, event.step, event.total, event.eta_s))
        if event.preview is not None:
            self._feed.tell_preview(event.step, event.preview)

    def _measure(self, event: Progress) -> None:
        now = time.monotonic()
        # The first step of this attempt includes conditioning, and loading the engine: no step's time.
        if self._last_s is not None:
            self._metrics.step_seconds.observe(now - self._last_s)
        skipped = event.skipped - (self._skipped or 0)
        if skipped > 0:
            self._metrics.skipped.inc(skipped)
        self._metrics.steps.inc()
        self._last_s, self._skipped, self.step = now, event.skipped, event.step
