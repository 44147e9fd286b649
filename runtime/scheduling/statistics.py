"""How a pool is doing, in numbers: what it has counted, and how long things took.

The module knows no queue; whoever uses a :class:`Record` holds a lock.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.runtime.scheduling.job import Job, State

REMEMBERED = 512
"""How many of the last jobs the durations are of."""

_WEIGHT = 0.3  # of the newest job in the pace


@dataclass(frozen=True)
class Spread:
    """Durations of the last jobs, in seconds; zeros before there is one."""

    count: int = 0
    mean_s: float = 0.0
    median_s: float = 0.0
    p95_s: float = 0.0
    longest_s: float = 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Return the spread of some durations."""
        if not seconds:
            return cls()
        ranked = sorted(seconds)
        nearest = ranked[max(-(-95 * len(ranked) // 100) - 1, 0)]
        return cls(len(ranked), statistics.fmean(ranked), statistics.median(ranked), nearest, ranked[-1])


@dataclass(frozen=True)
class RunningJob:
    """A job on a device: its number and caller, the seconds it waited and has run, and its phase."""

    number: int
    caller: str
    waited_s: float
    ran_s: float
    phase: str | None


@dataclass(frozen=True)
class PipelineStatistics:
    """One pipeline.

    Attributes:
        device: ``"cuda:0"``; with ``#2`` and so on for a second one on the same device.
        state: ``"in service"``, ``"opening"``, ``"resting"`` or ``"retired"``.
        job: What runs.
        finished: Jobs that ended well.
        failed: Jobs that ended with an error of the pipeline.
        opened: How often it was opened.
        last_error: Its last error, as text.
    """

    device: str
    state: str
    job: RunningJob | None
    finished: int
    failed: int
    opened: int
    last_error: str | None


@dataclass(frozen=True)
class PoolStatistics:
    """A pool at one moment.

    Attributes:
        accepting: Whether requests can be submitted.
        waiting: Requests in the queue.
        waiting_by_caller: The same by caller; callers without any are not listed.
        pipelines: One per device.
        accepted: Requests so far, all ended ones and those of now.
        refused: Requests for which there was no place.
        ended: Jobs by state.
        failures: Jobs that failed, by the class of their error.
        waited: How long the last jobs waited that ran.
        ran: How long they ran.
        encoded_together: Prompts that were encoded while others were, before their turn came.
    """

    accepting: bool
    waiting: int
    waiting_by_caller: Mapping[str, int]
    pipelines: tuple[PipelineStatistics, ...]
    accepted: int
    refused: int
    ended: Mapping[State, int]
    failures: Mapping[str, int]
    waited: Spread
    ran: Spread
    encoded_together: int

    @property
    def running(self) -> int:
        """Jobs on devices."""
        return sum(pipeline.job is not None for pipeline in self.pipelines)


class Record:
    """What is counted."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0
        self.encoded_together = 0
        self.ended: Counter[State] = Counter()
        self.failures: Counter[str] = Counter()
        self._waited: deque[float] = deque(maxlen=REMEMBERED)
        self._ran: deque[float] = deque(maxlen=REMEMBERED)
        self._pace: float | None = None

    def count(self, job: Job) -> None:
        """Count a job that has ended."""
        self.ended[job.state] += 1
        if job.state is State.FAILED:
            self.failures[type(job.error).__name__] += 1
        if job.device is not None:
            self._waited.append(job.waited_s)
            self._ran.append(job.ran_s)
        if job.state is State.FINISHED:
            pace = job.ran_s / job.cost
            self._pace = pace if self._pace is None else self._pace + _WEIGHT * (pace - self._pace)

    def expected_s(self, cost: float) -> float | None:
        """Return how long work takes at the pace of the last jobs; None before one has finished."""
        return None if self._pace is None else cost * self._pace

    def spreads(self) -> tuple[Spread, Spread]:
        """Return how long jobs waited, and how long they ran."""
        return Spread.of(list(self._waited)), Spread.of(list(self._ran))
