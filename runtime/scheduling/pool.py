"""A pool: pipelines of one bundle on one or more devices, behind a bounded and fair queue.

The module puts the parts together: ``dispatch`` (who is next), ``worker`` (one thread per pipeline), ``job`` (the
caller's handle). It does not know what a pipeline does.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from reelforge.runtime.bundle.check import Check
from reelforge.runtime.control import Stop
from reelforge.runtime.errors import RequestError
from reelforge.runtime.events import FloatArray
from reelforge.runtime.latents_file import writable
from reelforge.runtime.memo import Memos
from reelforge.runtime.pipeline import MEMO_BYTES, Pipeline
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.scheduling.dispatch import Dispatch
from reelforge.runtime.scheduling.event_log import EventLog
from reelforge.runtime.scheduling.job import Job, Order, forked
from reelforge.runtime.scheduling.limits import FailurePolicy, QueueLimits, check_terms
from reelforge.runtime.scheduling.statistics import PoolStatistics
from reelforge.runtime.scheduling.worker import Generates, work


class PipelinePool:
    """Serves many callers with few pipelines. Make one with :meth:`open`; every method may be called from any thread.

    Example::

        with PipelinePool.open("my.bundle", devices=["cuda:0", "cuda:1"]) as pool:
            job = pool.submit(Request("a red ball"), caller="ann", deadline_s=600)
            for event in job.events():
                ...  # progress
            frames = job.result()

    Args:
        open_pipeline: Opens a pipeline on a device; also called when one has failed, in another thread.
        devices: One pipeline each; the same device may be named more than once.
        queue: What may wait and run.
        failures: What becomes of a pipeline that fails.
    """

    def __init__(
        self,
        open_pipeline: Callable[[str], Generates],
        devices: Sequence[str],
        queue: QueueLimits | None = None,
        failures: FailurePolicy | None = None,
    ) -> None:
        self.limits = queue or QueueLimits()
        if isinstance(devices, str) or not devices:
            raise RequestError(
                "the devices of a pool are a list of at least one.",
                received=repr(devices),
                expected="for example ['cuda:0', 'cuda:1']",
            )
        self._process = os.getpid()
        self._numbers = itertools.count(1)
        self._dispatch = Dispatch(self.limits, _names(devices))
        pipelines: list[Generates] = []
        try:
            for device in devices:
                pipelines.append(open_pipeline(device))
        except BaseException:
            for pipeline in pipelines:
                pipeline.close()
            raise
        # The bundle's, as are all others'.
        self._resolve: Callable[[Request], ResolvedRequest] = pipelines[0].resolve
        self._check_noise: Callable[[ResolvedRequest, FloatArray], None] = pipelines[0].check_noise
        policy, together = failures or FailurePolicy(), self.limits.encode_together
        self._threads = [threading.Thread(target=self._dispatch.keep_time, name="reelforge-timekeeper", daemon=True)]
        for slot, device, pipeline in zip(self._dispatch.slots, devices, pipelines, strict=True):
            arguments = (self._dispatch, slot, pipeline, _Reopen(open_pipeline, device), policy, together)
            self._threads.append(
                threading.Thread(target=work, args=arguments, name=f"reelforge-{slot.device}", daemon=True)
            )
        # Threads know the dispatch and not the pool: one that is dropped, or lives until the program ends, is closed.
        self._shut = weakref.finalize(self, _shut, self._dispatch, self._threads, self._process)
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(
        cls,
        path: str | Path,
        devices: Sequence[str] = ("cpu",),
        queue: QueueLimits | None = None,
        failures: FailurePolicy | None = None,
        threads: int | None = None,
        check: Check = Check.FULL,
        memory_budget: int | str | None = None,
        memo_bytes: int = MEMO_BYTES,
    ) -> PipelinePool:
        """Open a bundle on devices.

        Args:
            path: The bundle's folder.
            devices: ``"cpu"``, ``"cuda:0"``, ...: one pipeline each.
            queue: What may wait and run.
            failures: What becomes of a pipeline that fails.
            threads: Threads per operator of each pipeline; None means one per core.
            check: How thoroughly the bundle is checked, once; pipelines after the first look at sizes only.
            memory_budget: What loaded stages of each pipeline may take (see :meth:`Pipeline.open`).
            memo_bytes: What of text encodings and conditions is kept in the host's memory, for all pipelines together.

        Raises:
            BundleError: If the bundle is damaged, of another schema version, or lacks a stage.
            RequestError: If it was not built for a device, there is none, or the budget does not suffice.
        """
        memos = Memos(memo_bytes)
        # The first looks at everything for all. So does one that is opened again: a file may have been what went wrong.
        checks = itertools.chain([check], [Check.SIZES] * (len(devices) - 1), itertools.repeat(check))

        def open_pipeline(device: str) -> Pipeline:
            return Pipeline.open(path, device, threads, next(checks), memory_budget, memos=memos)

        return cls(open_pipeline, devices, queue, failures)

    def submit(
        self,
        request: Request,
        caller: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        block_s: float | None = 0.0,
        stream: bool = False,
        save_latents: str | Path | None = None,
        previews: bool = False,
        latents: FloatArray | None = None,
    ) -> Job:
        """Queue a request.

        Args:
            request: What to generate; it is checked whole before it takes a place.
            caller: Whose it is: callers share the pipelines fairly.
            priority: Higher goes first, whoever asks.
            deadline_s: Seconds from now until the video is worth nothing, in the queue or out of it.
            block_s: How long to wait for a place in a full queue; None means as long as it takes. At 0 the call waits
                for nothing and may be made in an event loop.
            stream: Whether frames are handed over by ``job.events()`` as they come, in bounded memory, instead of being
                kept for ``job.result()``.
            save_latents: A ``.npy`` file for the final latents, written before decoding begins.
            previews: Show in the progress what the latents look like.
            latents: Initial noise ``[1, C, T, H, W]`` float32 instead of the seed's; copied, kept until the job ends.

        Raises:
            RequestError: If the bundle does not support the request, or an argument makes no sense.
            QueueFullError: If there is no place.
            ClosedError: If the pool is closed or closing.
            DeadlineError: If the deadline passes while waiting for a place.
            EngineError: If no pipeline is left, or this process is not the one that opened the pool.
            OutputError: If ``save_latents`` cannot be written.
        """
        self._require_process()
        check_terms(caller, priority, deadline_s, block_s)
        resolved = self._resolve(request)
        if latents is not None:
            self._check_noise(resolved, latents)
            latents = latents.copy()  # the caller may change it while the job waits
        saved = writable(save_latents)
        order = Order(request, resolved, caller, priority, _cost(resolved), stream, saved, previews)
        log = EventLog(self.limits.frames_ahead, self.limits.stall_s)
        job = Job(next(self._numbers), order, Stop(deadline_s), log, self._dispatch.withdraw, latents)
        self._dispatch.add(job, block_s)
        return job

    def position(self, job: Job) -> int | None:
        """Return how many jobs are to start before ``job``, as things stand; None if it does not wait."""
        self._require_process()
        return self._dispatch.position(job)

    def statistics(self) -> PoolStatistics:
        """Return what is going on, and what was."""
        self._require_process()
        return self._dispatch.statistics()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse requests from now on, and wait until all accepted ones have ended; False if that takes too long."""
        self._require_process()
        self._dispatch.stop_accepting()
        return self._dispatch.wait_until_idle(timeout_s)

    def close(self) -> None:
        """End everything: jobs that wait fail with ``ClosedError``, those that run stop before their next unit of work.

        Returns when the pipelines are closed and the threads have ended. Closing twice is harmless.
        """
        self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_process(self) -> None:
        if os.getpid() != self._process:
            raise forked("pool", self._process)


class _Reopen:
    """Opens a pipeline on its device again."""

    def __init__(self, open_pipeline: Callable[[str], Generates], device: str) -> None:
        self._open, self._device = open_pipeline, device

    def __call__(self) -> Generates:
        return self._open(self._device)


def _shut(dispatch: Dispatch, threads: Sequence[threading.Thread], process: int) -> None:
    if os.getpid() != process:
        return  # a forked process has neither the threads nor the devices
    dispatch.close()
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join()


def _names(devices: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for device in devices:
        seen[device] += 1
        names.append(device if seen[device] == 1 else f"{device}#{seen[device]}")
    return names


def _cost(request: ResolvedRequest) -> float:
    """Return the work that a request is, in steps times pixels: what callers' shares are counted in."""
    evaluations = request.steps * (1 if request.negative_prompt is None else 2)
    return float(evaluations * request.shape.frames * request.shape.height * request.shape.width)
