"""Jobs on this machine: a pool of pipelines, one per device.

A job is streamed: frames go into the file as they come, and no video is held in memory. The module knows neither HTTP
nor the jobs' store.
"""

from __future__ import annotations

import threading
from pathlib import Path

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import ReelforgeError
from reelforge.runtime.events import Frames
from reelforge.runtime.memo import Memos
from reelforge.runtime.pipeline import MEMO_BYTES, Pipeline
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.scheduling.job import Job
from reelforge.runtime.scheduling.limits import ClosedError, QueueLimits
from reelforge.runtime.scheduling.pool import PipelinePool
from reelforge.runtime.video import VideoWriter
from reelforge.tools.service.backend import BackendLostError, Facts, OnEvent, check_on, facts_of
from reelforge.tools.service.resuming import ResumingPipeline
from reelforge.tools.service.settings import Settings

_LOOK_S = 0.5
"""How often whoever waits for a job's cancellation looks whether the job has ended."""


class PoolBackend:
    """Computes jobs on this machine's devices.

    Args:
        settings: The bundle, the devices and what pipelines may take.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool: PipelinePool | None = None
        self._bundle: Bundle | None = None

    @property
    def capacity(self) -> int:
        """One job per device, and those that are ready for when one is free."""
        return len(self._settings.devices) + self._settings.ahead

    def open(self) -> None:
        """Open the bundle on every device."""
        settings = self._settings
        # What is checked here is not checked again by the pipelines, but when one has failed and is opened anew.
        self._bundle = Bundle.open(settings.bundle, Check(settings.check))
        memos, opened = Memos(MEMO_BYTES), 0
        lock = threading.Lock()

        def open_pipeline(device: str) -> ResumingPipeline:
            nonlocal opened
            with lock:
                opened += 1
                first = opened <= len(settings.devices)
            check = Check.SIZES if first else Check(settings.check)
            return ResumingPipeline(
                Pipeline.open(settings.bundle, device, settings.threads, check, settings.memory_budget, memos=memos)
            )

        # As many as were handed over may wait: the service has limits of its own, and tells callers.
        waiting = QueueLimits(waiting=max(2 * self.capacity, 8))
        self._pool = PipelinePool(open_pipeline, settings.devices, waiting)

    def close(self, drain_s: float) -> None:
        """Close the pipelines."""
        if self._pool is not None:
            self._pool.drain(drain_s)
            self._pool.close()

    def describe(self) -> Facts:
        """Return what the bundle offers."""
        bundle = self._opened()
        return facts_of(bundle.manifest, bundle.name)

    def check(self, request: Request) -> ResolvedRequest:
        """Check a request."""
        bundle = self._opened()
        return check_on(bundle.manifest, bundle.name, request)

    def run(
        self, job_id: str, request: Request, on_event: OnEvent, cancelled: threading.Event, output: Path, kept: Path
    ) -> None:
        """Compute a job and write it to ``output``."""
        pool, resolved = self._pool, self.check(request)
        assert pool is not None
        kept.mkdir(exist_ok=True)
        try:
            job = pool.submit(
                request,
                stream=True,
                save_latents=kept / f"{self._opened().manifest.content_digest[:16]}.npy",
                previews=self._settings.previews,
            )
        except ClosedError:
            raise
        except ReelforgeError as error:
            lost = self._lost(error)
            if lost is None:
                raise
            raise lost from error
        watch = threading.Thread(target=_watch, args=(job, cancelled), name=f"reelforge-watch-{job_id}", daemon=True)
        watch.start()
        try:
            shape, rate = resolved.shape, self.describe().frames_per_second
            with VideoWriter(output, shape.height, shape.width, shape.frames, rate) as video:
                for event in job.events():
                    if isinstance(event, Frames):
                        video.write(event.pixels)
                    else:
                        on_event(event)
        except ReelforgeError as error:
            lost = self._lost(error) if job.device is None else None
            if lost is None:
                raise
            raise lost from error
        finally:
            if not job.done:
                job.cancel("its video cannot be written")
            job.wait()  # and not for the watch, which ends a little later

    def _opened(self) -> Bundle:
        assert self._bundle is not None
        return self._bundle

    def _lost(self, error: ReelforgeError) -> BackendLostError | None:
        """Return the error to raise instead, if no pipeline is left."""
        assert self._pool is not None
        if any(pipeline.state != "retired" for pipeline in self._pool.statistics().pipelines):
            return None
        return BackendLostError(error.where, received=error.received, expected=error.expected, fix=error.fix)


def _watch(job: Job, cancelled: threading.Event) -> None:
    """End a job when it is not wanted any longer, keeping what it has.

    This waits for the cancellation and not for the job, whose every event would wake the thread.
    """
    while not job.done:
        if cancelled.wait(_LOOK_S):
            job.stop.set("it was cancelled", keep=True)
            job.cancel()
            return
