"""What becomes of a job, from the error that ended its work.

The module knows neither the store nor HTTP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from reelforge.runtime.errors import (
    BundleError,
    CancelledError,
    DeadlineError,
    OutputError,
    ReelforgeError,
)
from reelforge.runtime.scheduling.limits import ClosedError
from reelforge.tools.service.backend import BackendLostError
from reelforge.tools.service.videos import is_full
from reelforge.tools.service.work import StoppedError


@dataclass(frozen=True)
class Outcome:
    """An end, or a return to the queue.

    Attributes:
        status: ``completed``, ``failed``, ``cancelled`` or ``queued``.
        code: Why, for programs: a small set of words.
        message: Why, for the caller; nothing of the machine's paths.
        unexpected: Whether it was a bug.
    """

    status: str
    code: str = ""
    message: str = ""
    unexpected: bool = False


def outcome_of(error: BaseException | None, reason: str | None) -> Outcome:
    """Return what becomes of a job.

    Args:
        error: How its work ended; None if there is a video.
        reason: Why the service wanted it to end, if it did.
    """
    if error is None:
        return Outcome("completed")
    if isinstance(error, BackendLostError):
        return Outcome("queued", "backend_lost")
    if isinstance(error, CancelledError) and reason is not None:
        if reason == "deadline":
            return Outcome("failed", "deadline", "the deadline passed before the video was finished")
        return Outcome("cancelled", "cancelled") if reason == "cancelled" else Outcome("queued", "stopped")
    if isinstance(error, ClosedError | StoppedError):
        return Outcome("queued", "stopped")
    if is_full(error):
        return Outcome("failed", "storage_full", "there was no room left to write the video")
    if isinstance(error, OutputError):
        return Outcome("failed", "storage", "the video could not be written")
    if isinstance(error, BundleError):
        return Outcome("failed", "bundle", "the model's files are damaged, or were altered while they were served")
    if isinstance(error, DeadlineError):
        return Outcome("failed", "deadline", "the deadline passed before the video was finished")
    if isinstance(error, ReelforgeError):
        return Outcome("failed", _word(error), " ".join(error.where.split()))
    if isinstance(error, MemoryError):
        return Outcome("failed", "out_of_memory", "the machine is out of memory")
    return Outcome("failed", "internal", "something unexpected happened; the service's log has more", unexpected=True)


def _word(error: ReelforgeError) -> str:
    """Return an error's class as a code: ``OutOfMemoryError`` is ``out_of_memory``."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
