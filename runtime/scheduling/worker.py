"""One pipeline's thread: take a job, carry it out, report; open the pipeline anew when its state is in doubt.

Whatever is raised while a job runs belongs to the job, which carries it to its caller; a thread that died would take
requests with it. The module does not know how the next job is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol, runtime_checkable

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import ReelforgeError
from reelforge.runtime.events import Event, FloatArray
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.scheduling.dispatch import Dispatch, Slot
from reelforge.runtime.scheduling.health import Health, blames_pipeline
from reelforge.runtime.scheduling.job import Job
from reelforge.runtime.scheduling.limits import FailurePolicy

_log = logging.getLogger(__name__)


class Generates(Protocol):
    """What a pool needs of a pipeline."""

    def resolve(self, request: Request) -> ResolvedRequest:
        """Check a request; called from any thread."""
        ...

    def check_noise(self, request: ResolvedRequest, latents: FloatArray) -> None:
        """Refuse noise that does not fit; called from any thread."""
        ...

    def stream(
        self,
        request: Request,
        *,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
        previews: bool = False,
    ) -> Generator[Event, None, None]:
        """Generate."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A pipeline that can encode the texts of several requests while its encoders are in memory."""

    def prepare(self, prompts: Sequence[str], stop: Stop | None = None) -> None:
        """Encode prompts, each encoder loaded once, and remember what came out for later requests."""
        ...


OpenPipeline = Callable[[], Generates]


def work(
    dispatch: Dispatch, slot: Slot, pipeline: Generates, reopen: OpenPipeline, policy: FailurePolicy, together: int
) -> None:
    """Carry out jobs until the pool is closed or the pipeline is retired; the body of a slot's thread.

    Args:
        dispatch: Gives jobs.
        slot: This thread's place.
        pipeline: An open pipeline, which is closed in the end.
        reopen: Opens another in its place.
        policy: What becomes of a pipeline that fails.
        together: How many prompts are encoded at once.
    """
    try:
        health = Health(policy)
        current: Generates | None = pipeline
        dispatch.opened(slot)
        while current is not None:
            current = _work_once(dispatch, slot, current, reopen, health, together)
    except BaseException as error:  # noqa: BLE001 - nobody is above this; the slot's job carries it on
        _log.error("the thread of %s ended with a bug", slot.device, exc_info=error)
        dispatch.crashed(slot, error)


def _work_once(
    dispatch: Dispatch, slot: Slot, pipeline: Generates, reopen: OpenPipeline, health: Health, together: int
) -> Generates | None:
    """Carry out the next job, and return the pipeline for the one after it; None if there will be none.

    A function of its own, so that a thread that waits for a job does not keep the last one's video.
    """
    job = dispatch.take(slot)
    if job is None:
        _close(pipeline)
        return None
    error = _carry_out(dispatch, job, pipeline, together)
    if error is None or not blames_pipeline(error):
        if error is None:
            health.job_finished()
        dispatch.ended(slot, error)
        return pipeline
    if not isinstance(error, ReelforgeError):
        _log.error("job %d on %s ended with a bug", job.number, slot.device, exc_info=error)
    rest_s = health.job_failed(dispatch.others_in_service(slot))
    _close(pipeline)  # before the job ends, so that whoever hears of the failure finds the device free
    dispatch.ended(slot, error)
    return _open_again(dispatch, slot, reopen, health, rest_s)


def _carry_out(dispatch: Dispatch, job: Job, pipeline: Generates, together: int) -> BaseException | None:
    try:
        _prepare(dispatch, job, pipeline, together)
        order = job.order
        events = pipeline.stream(
            order.request,
            latents=job.noise,
            save_latents=order.save_latents,
            stop=job.stop,
            previews=order.previews,
        )
        with closing(events):
            for event in events:
                job.take(event)
    except BaseException as error:  # noqa: BLE001 - nobody is above this; the job carries it on
        # Without this frame, which knows the job: else the job and its error would keep each other, and all arrays of
        # the generation, until the garbage collector comes by.
        return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    return None


def _prepare(dispatch: Dispatch, job: Job, pipeline: Generates, together: int) -> None:
    """Encode the job's prompt together with those of the next jobs, which does not change whose turn it is."""
    if job.prepared or together < 2 or not isinstance(pipeline, Prepares):
        return
    others = dispatch.companions(together - 1)
    resolved = [one.order.resolved for one in (job, *others)]
    texts = [text for one in resolved for text in (one.prompt, one.negative_prompt) if text is not None]
    prompts = list(dict.fromkeys(texts))
    if len(prompts) < 2:
        return
    try:
        pipeline.prepare(prompts, stop=job.stop)
    except ReelforgeError:
        # Each job meets its own error when its turn comes, this one right now.
        dispatch.unprepare(others)
    except BaseException:
        dispatch.unprepare(others)
        raise


def _open_again(
    dispatch: Dispatch, slot: Slot, reopen: OpenPipeline, health: Health, rest_s: float
) -> Generates | None:
    """Return a pipeline in place of the one that failed; None if the pool was closed or it is given up."""
    while rest_s == 0.0 or dispatch.rest(slot, rest_s):
        try:
            pipeline = reopen()
        except BaseException as error:  # noqa: BLE001 - nobody is above this; statistics and jobs carry it on
            _log.error("the pipeline on %s cannot be opened again", slot.device, exc_info=error)
            dispatch.opening_failed(slot, error)
            next_rest_s = health.opening_failed()
            if next_rest_s is None:
                dispatch.retire(slot)
                return None
            rest_s = next_rest_s
        else:
            health.opened()
            dispatch.opened(slot)
            return pipeline
    return None


def _close(pipeline: Generates) -> None:
    try:
        pipeline.close()
    except BaseException as error:  # noqa: BLE001 - nobody is above this, and another pipeline takes its place
        _log.error("a pipeline could not be closed", exc_info=error)
