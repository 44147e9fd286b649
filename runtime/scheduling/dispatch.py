"""The meeting point of callers and pipelines: one lock, the queue, who runs what, and what has been counted.

Callers add and withdraw jobs; each pipeline's thread takes the next one and reports its end; a timekeeper fails those
whose deadline passes while they wait. The module runs nothing and knows no pipeline.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from reelforge.runtime.errors import CancelledError, EngineError
from reelforge.runtime.scheduling.fair_queue import FairQueue
from reelforge.runtime.scheduling.health import blames_pipeline
from reelforge.runtime.scheduling.job import Job
from reelforge.runtime.scheduling.limits import ClosedError, QueueFullError, QueueLimits, seconds_text
from reelforge.runtime.scheduling.statistics import PipelineStatistics, PoolStatistics, Record, RunningJob

_LONGEST_WAIT_S = 3600.0


@dataclass
class Slot:
    """One pipeline's place: what it is doing, as statistics say it."""

    device: str
    state: str = "opening"
    job: Job | None = None
    finished: int = 0
    failed: int = 0
    opened: int = 0
    last_error: str | None = None  # not the error itself, whose traceback would keep a generation's arrays


class Dispatch:
    """Jobs that wait and run. Every method may be called from any thread.

    Args:
        limits: What may wait and run.
        devices: A name for each pipeline, each once.
    """

    def __init__(self, limits: QueueLimits, devices: Iterable[str]) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue()
        self._record = Record()
        self._accepting = True
        self._closed = False
        self.slots = [Slot(device) for device in devices]

    # Callers

    def add(self, job: Job, block_s: float | None) -> None:
        """Queue a job; wait up to ``block_s`` for a place (None: as long as it takes).

        Raises:
            QueueFullError: If there is no place.
            ClosedError: If the pool is closing.
            EngineError: If there is no pipeline left.
            CancelledError: If the job's deadline passes meanwhile, or it is cancelled.
        """
        end = None if block_s is None else time.monotonic() + block_s
        with self._changed:
            while True:
                self._require_service()
                job.stop.check("there was a place in the queue")
                full = self._no_place(job.caller)
                if full is None:
                    break
                left = _LONGEST_WAIT_S if end is None else end - time.monotonic()
                if left <= 0:
                    self._record.refused += 1
                    raise full
                until = job.stop.remaining_s
                self._changed.wait(left if until is None else min(left, until))
            self._record.accepted += 1
            self._queue.push(job)
            self._changed.notify_all()

    def withdraw(self, job: Job) -> None:
        """Take a job whose stop was set out of the queue, if it waits there."""
        with self._changed:
            if self._queue.remove(job):
                self._end(job, _reason(job))

    def position(self, job: Job) -> int | None:
        """Return how many jobs are to start before this one; None if it does not wait."""
        with self._changed:
            order = self._queue.order()
            return order.index(job) if job in order else None

    def stop_accepting(self) -> None:
        """Refuse requests from now on; what waits and runs goes on."""
        with self._changed:
            self._accepting = False
            self._changed.notify_all()

    def wait_until_idle(self, timeout_s: float | None) -> bool:
        """Wait until nothing waits or runs; False if that takes longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._queue and all(slot.job is None for slot in self.slots), timeout_s
            )

    def close(self) -> None:
        """Refuse requests, fail the jobs that wait, stop those that run; threads end when these have ended."""
        with self._changed:
            self._accepting, self._closed = False, True
            for job in list(self._queue):
                self._queue.remove(job)
                self._end(job, _closed_error("its turn came"))
            running = [slot.job for slot in self.slots if slot.job is not None]
            self._changed.notify_all()
        for job in running:
            job.cancel("the pool was closed")

    def statistics(self) -> PoolStatistics:
        """Return what is going on, and what was."""
        with self._changed:
            waited, ran = self._record.spreads()
            return PoolStatistics(
                self._accepting,
                len(self._queue),
                self._queue.by_caller(),
                tuple(_slot_statistics(slot) for slot in self.slots),
                self._record.accepted,
                self._record.refused,
                dict(self._record.ended),
                dict(self._record.failures),
                waited,
                ran,
                self._record.encoded_together,
            )

    # The pipelines' threads

    def take(self, slot: Slot) -> Job | None:
        """Wait for the next job; None when the pool was closed."""
        with self._changed:
            while not self._closed:
                job = self._queue.pop(self._allowed())
                if job is None:
                    self._changed.wait()
                elif job.stop.wanted:
                    self._end(job, _reason(job))
                else:
                    job.begin(slot.device)
                    slot.job = job
                    self._changed.notify_all()
                    return job
            return None

    def companions(self, count: int) -> list[Job]:
        """Return up to ``count`` jobs that come next and whose prompts have not been prepared, and mark them so."""
        with self._changed:
            chosen = [job for job in self._queue.order() if not job.prepared][:count]
            for job in chosen:
                job.prepared = True
            self._record.encoded_together += len(chosen)
            return chosen

    def unprepare(self, jobs: Iterable[Job]) -> None:
        """Undo :meth:`companions`: it did not work."""
        with self._changed:
            for job in jobs:
                job.prepared = False
                self._record.encoded_together -= 1

    def ended(self, slot: Slot, error: BaseException | None) -> None:
        """Note that the slot's job has ended."""
        with self._changed:
            job = slot.job
            assert job is not None
            slot.job = None
            if error is None:
                slot.finished += 1
            elif blames_pipeline(error):
                slot.failed += 1
                slot.last_error = _line(error)
                slot.state = "opening"
            self._end(job, error)

    def crashed(self, slot: Slot, error: BaseException) -> None:
        """Note that the slot's thread has ended with a bug of its own; its job fails with it."""
        with self._changed:
            slot.last_error = _line(error)
            job, slot.job = slot.job, None
            if job is not None:
                self._end(job, error)
            self.retire(slot)

    def others_in_service(self, slot: Slot) -> bool:
        """Return whether another pipeline takes jobs."""
        with self._changed:
            return any(other.state == "in service" for other in self.slots if other is not slot)

    def rest(self, slot: Slot, seconds: float) -> bool:
        """Wait; False if the pool was closed meanwhile."""
        with self._changed:
            slot.state = "resting"
            self._changed.wait_for(lambda: self._closed, seconds)
            slot.state = "opening"
            return not self._closed

    def opened(self, slot: Slot) -> None:
        """Note that the slot's pipeline was opened."""
        with self._changed:
            slot.opened += 1
            slot.state = "in service"

    def opening_failed(self, slot: Slot, error: BaseException) -> None:
        """Note that the slot's pipeline could not be opened."""
        with self._changed:
            slot.last_error = _line(error)

    def retire(self, slot: Slot) -> None:
        """Give a pipeline up. With the last one, all jobs that wait fail."""
        with self._changed:
            slot.state = "retired"
            if all(one.state == "retired" for one in self.slots):
                for job in list(self._queue):
                    self._queue.remove(job)
                    self._end(job, self._no_pipeline())
            self._changed.notify_all()

    # The timekeeper's thread

    def keep_time(self) -> None:
        """Fail jobs whose deadline passes in the queue, when it passes, until the pool is closed."""
        with self._changed:
            while not self._closed:
                for job in [job for job in self._queue if job.stop.wanted]:
                    self._queue.remove(job)
                    self._end(job, _reason(job))
                left = [job.stop.remaining_s for job in self._queue]
                self._changed.wait(min((one for one in left if one is not None), default=_LONGEST_WAIT_S))

    # Under the lock

    def _end(self, job: Job, error: BaseException | None) -> None:
        if job.end(error):
            self._record.count(job)
        self._changed.notify_all()

    def _allowed(self) -> _Allowed:
        return _Allowed(Counter(slot.job.caller for slot in self.slots if slot.job), self._limits.running_per_caller)

    def _require_service(self) -> None:
        if not self._accepting:
            raise _closed_error("a request was submitted")
        if all(slot.state == "retired" for slot in self.slots):
            raise self._no_pipeline()

    def _no_pipeline(self) -> EngineError:
        return EngineError(
            "all pipelines of this pool were retired, because they could not be opened again.",
            received="; ".join(f"{slot.device}: {slot.last_error}" for slot in self.slots),
            expected="one that can be opened",
            fix="repair what the errors name, and open a new pool",
        )

    def _no_place(self, caller: str) -> QueueFullError | None:
        own = self._queue.by_caller().get(caller, 0)
        limits = self._limits
        if limits.waiting_per_caller is not None and own >= limits.waiting_per_caller:
            after = self._start_s(caller)
            return QueueFullError(
                f"caller {caller!r} has as many requests in the queue as one caller may have.",
                after,
                received=f"{own} that wait",
                expected=f"at most {limits.waiting_per_caller}",
                fix=f"ask again {seconds_text(after)}, or wait for a place with block_s",
            )
        if len(self._queue) >= limits.waiting:
            after = self._start_s(None)
            return QueueFullError(
                "the queue is full.",
                after,
                received=f"{len(self._queue)} requests that wait",
                expected=f"at most {limits.waiting}",
                fix=f"ask again {seconds_text(after)}, or wait for a place with block_s",
            )
        return None

    def _start_s(self, caller: str | None) -> float | None:
        """Estimate when the next job starts, or the next of a caller, and so makes room."""
        running = [slot.job for slot in self.slots if slot.job is not None]
        ahead = 0.0
        for job in self._queue.order():
            if caller is None or job.caller == caller:
                break
            ahead += job.cost
        expected = [self._record.expected_s(job.cost) for job in running]
        behind = self._record.expected_s(ahead)
        if behind is None:
            return None
        left = [max((one or 0.0) - job.ran_s, 0.0) for one, job in zip(expected, running, strict=True)]
        pipelines = sum(slot.state != "retired" for slot in self.slots)
        return min(left, default=0.0) + behind / max(pipelines, 1)


class _Allowed:
    """Whether a caller may have another job run."""

    def __init__(self, running: Counter[str], limit: int | None) -> None:
        self._running, self._limit = running, limit

    def __call__(self, caller: str) -> bool:
        return self._limit is None or self._running[caller] < self._limit


def _reason(job: Job) -> BaseException:
    """Return why a job that waits was stopped."""
    try:
        job.stop.check("its turn came")
    except CancelledError as error:
        return error
    return CancelledError("the job was withdrawn.")


def _closed_error(before: str) -> ClosedError:
    return ClosedError(
        f"the pool was closed before {before}.",
        expected="an open pool",
        fix="drain the pool before closing it, or submit to another one",
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {getattr(error, 'where', error)}"


def _slot_statistics(slot: Slot) -> PipelineStatistics:
    job = slot.job
    running = None
    if job is not None:
        phase = None if job.progress is None else job.progress.phase
        running = RunningJob(job.number, job.caller, job.waited_s, job.ran_s, phase)
    return PipelineStatistics(
        slot.device, slot.state, running, slot.finished, slot.failed, slot.opened, slot.last_error
    )
