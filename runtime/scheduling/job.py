"""One request on its way: waiting, running, ended; what it said meanwhile, and what became of it.

A job is the caller's handle. It does not know the queue or the pipeline: the pool tells it what happens (``begin``,
``take``, ``end``), and it tells the pool when its caller does not want it any longer.
"""

from __future__ import annotations

import asyncio
import enum
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError, DeadlineError, EngineError, RequestError
from reelforge.runtime.events import Event, FloatArray, Frames, Pixels, Progress
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.scheduling.event_log import EventLog


class State(enum.Enum):
    """Where a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed


@dataclass(frozen=True)
class Order:
    """What was submitted, checked.

    Attributes:
        request: As the caller wrote it.
        resolved: The same with every default filled in.
        caller: Whose it is.
        priority: Higher goes first.
        cost: The work it is, in steps times pixels.
        streamed: Whether frames are handed over by ``events`` and not kept for ``result``.
        save_latents: Where the final latents go.
        previews: Whether progress shows what the latents look like.
    """

    request: Request
    resolved: ResolvedRequest
    caller: str
    priority: int
    cost: float
    streamed: bool
    save_latents: Path | None
    previews: bool


class Job:
    """A request that a pool has accepted. Made by ``PipelinePool.submit``.

    Attributes:
        number: Counts up with every request of the pool.
        order: What was submitted.
        stop: Ends the job; its deadline counts from the submission.
        noise: What the loop begins with instead of the seed's noise; None otherwise, and once the job has ended.
    """

    def __init__(
        self,
        number: int,
        order: Order,
        stop: Stop,
        log: EventLog,
        withdraw: Callable[[Job], None],
        noise: FloatArray | None = None,
    ) -> None:
        self.number = number
        self.order = order
        self.stop = stop
        self.noise = noise
        self.prepared = False  # the pool's note that the prompt was encoded together with others
        self._log = log
        self._withdraw = withdraw
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._state = State.WAITING
        self._error: BaseException | None = None
        self._device: str | None = None
        self._submitted_s = time.monotonic()
        self._started_s: float | None = None
        self._ended_s: float | None = None
        self._latest: Progress | None = None
        self._video: Pixels | None = None
        self._frames = 0
        self._read = False

    def __repr__(self) -> str:
        return f"<Job {self.number} of {self.caller!r}: {self._state.value}>"

    @property
    def caller(self) -> str:
        """Whose it is."""
        return self.order.caller

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.order.priority

    @property
    def cost(self) -> float:
        """The work it is, in steps times pixels."""
        return self.order.cost

    @property
    def state(self) -> State:
        """Where the job is."""
        return self._state

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._log.ended

    @property
    def error(self) -> BaseException | None:
        """Why it ended without a video; None as long as it has not."""
        return self._error

    @property
    def device(self) -> str | None:
        """Where it runs or ran; None before."""
        return self._device

    @property
    def progress(self) -> Progress | None:
        """The newest progress."""
        return self._latest

    @property
    def waited_s(self) -> float:
        """Seconds in the queue, so far or altogether."""
        ends = (self._started_s, self._ended_s, time.monotonic())
        return next(end for end in ends if end is not None) - self._submitted_s

    @property
    def ran_s(self) -> float:
        """Seconds on a device, so far or altogether."""
        if self._started_s is None:
            return 0.0
        return (time.monotonic() if self._ended_s is None else self._ended_s) - self._started_s

    def cancel(self, reason: str = "it was cancelled") -> None:
        """End the job: at once if it waits, before its next unit of work if it runs. No harm if it has ended.

        Raises:
            EngineError: If this process is not the one of the pool.
        """
        self._require_process()
        self.stop.set(reason)
        self._withdraw(self)
        self._log.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the job has ended; False if that takes longer than ``timeout_s``.

        Raises:
            EngineError: If this process is not the one of the pool.
        """
        self._require_process()
        return self._log.wait_for_end(timeout_s)

    def result(self, timeout_s: float | None = None) -> Pixels:
        """Wait for the video, uint8 ``[frames, height, width, 3]``, RGB.

        Raises:
            TimeoutError: If it takes longer than ``timeout_s``; the job goes on.
            RequestError: If the job hands its frames over by :meth:`events`.
            ReelforgeError: Why there is no video: an engine failed, the job was cancelled, its deadline passed, the
                pool was closed. What is not one of these was a bug, and is raised as it is.
        """
        self._require_kept()
        if not self.wait(timeout_s):
            raise TimeoutError(f"job {self.number} has not ended after {timeout_s:g} s; it is {self._state.value}")
        return self._outcome()

    def events(self) -> Generator[Event, None, None]:
        """Yield what the job says until it ends; progress that nobody read in time may be missing.

        A job that was submitted with ``stream=True`` yields its frames too, to one reader, who cancels the job by
        leaving. Any other job can be read by many, at any time.

        Raises:
            RequestError: If a streamed job is read twice.
            ReelforgeError: Why the job ended without a video, as in :meth:`result`.
        """
        self._claim()
        whole, after = False, 0
        try:
            while (numbered := self._log.wait_and_take(after)) is not None:
                after, event = numbered
                yield event
            whole = True
        finally:
            self._left(whole)
        self._raise_error()

    async def events_async(self) -> AsyncGenerator[Event, None]:
        """:meth:`events` for ``async for``."""
        self._claim()
        news, whole, after = asyncio.Event(), False, 0
        listener = _listener(news)
        self._log.listen(listener)
        try:
            while not whole:
                news.clear()
                ended = self._log.ended  # asked first, so that nothing can come in between
                numbered = self._log.take(after)
                if numbered is not None:
                    after, event = numbered
                    yield event
                elif ended:
                    whole = True
                else:
                    await news.wait()
        finally:
            self._log.unlisten(listener)
            self._left(whole)
        self._raise_error()

    def __await__(self) -> Generator[object, None, Pixels]:
        """Wait for :meth:`result` without blocking the event loop; whoever is cancelled meanwhile cancels the job."""
        return self._result_async().__await__()

    async def _result_async(self) -> Pixels:
        self._require_kept()
        self._require_process()
        ended = asyncio.Event()
        listener = _listener(ended)
        self._log.listen(listener)
        try:
            while not self._log.ended:
                ended.clear()
                if not self._log.ended:
                    await ended.wait()
        except asyncio.CancelledError:
            self.cancel("nobody waits for it any longer")
            raise
        finally:
            self._log.unlisten(listener)
        return self._outcome()

    # For the pool.

    def begin(self, device: str) -> None:
        """Note that a pipeline has taken the job."""
        self._device, self._started_s, self._state = device, time.monotonic(), State.RUNNING

    def take(self, event: Event) -> None:
        """Keep an event, or hand it over.

        Raises:
            CancelledError: If frames are handed over and not read.
        """
        if not isinstance(event, Frames):
            if isinstance(event, Progress):
                self._latest = event
            self._log.tell(event)
            return
        self._frames += len(event.values)
        if self.order.streamed:
            self._log.hand_over(event, self.stop)
            return
        if self._video is None:
            shape = self.order.resolved.shape
            self._video = np.empty((shape.frames, shape.height, shape.width, 3), np.uint8)
        self._video[event.start : event.start + len(event.values)] = event.pixels

    def end(self, error: BaseException | None) -> bool:
        """Note how the job ended; the first word counts, and False says that this was not the first."""
        shape = self.order.resolved.shape
        if error is None and self._frames != shape.frames:
            error = EngineError(
                "the pipeline ended without all frames.", received=self._frames, expected=f"{shape.frames}"
            )
        with self._lock:
            if self._ended_s is not None:
                return False
            self._ended_s = time.monotonic()
            self.noise = None
            self._error, self._state = error, _state_of(error)
            if error is not None:
                self._video = None
        self._log.end()
        return True

    def _outcome(self) -> Pixels:
        self._raise_error()
        assert self._video is not None
        return self._video

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _claim(self) -> None:
        self._require_process()
        with self._lock:
            if self._read and self.order.streamed:
                raise RequestError(
                    "the events of this job are being read already, or were.",
                    expected="one reader: its frames are handed over once",
                    fix="submit without stream=True to read events more than once",
                )
            self._read = True

    def _left(self, whole: bool) -> None:
        if self.order.streamed and not whole and not self.done and os.getpid() == self._process:
            self.cancel("whoever read its frames left")

    def _require_kept(self) -> None:
        if self.order.streamed:
            raise RequestError(
                "the frames of this job are handed over by its events, and none are kept.",
                expected="a job that was submitted without stream=True",
                fix="read job.events(), or submit with stream=False",
            )

    def _require_process(self) -> None:
        if os.getpid() != self._process:
            raise forked("job", self._process)


def forked(what: str, process: int) -> EngineError:
    """Return the error for something that was made before a fork."""
    return EngineError(
        f"this {what} was made by another process, from which this one was forked.",
        received=f"process {os.getpid()}",
        expected=f"process {process}: its threads are not here",
        fix="open a pool in each process after forking, or start processes with 'spawn'",
    )


def _state_of(error: BaseException | None) -> State:
    if error is None:
        return State.FINISHED
    if isinstance(error, DeadlineError):
        return State.EXPIRED
    return State.CANCELLED if isinstance(error, CancelledError) else State.FAILED


def _listener(news: asyncio.Event) -> Callable[[], None]:
    loop = asyncio.get_running_loop()

    def listener() -> None:
        with suppress(RuntimeError):  # the loop is closed, and whoever waited is gone with it
            loop.call_soon_threadsafe(news.set)

    return listener
