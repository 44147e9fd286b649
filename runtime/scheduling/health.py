"""Whether a pipeline that has failed goes on, rests, or is given up.

The module counts; it knows no threads, no clock and no pipeline.
"""

from __future__ import annotations

from reelforge.runtime.errors import CancelledError, NotFiniteError, OutputError, RequestError
from reelforge.runtime.scheduling.limits import FailurePolicy


class Health:
    """Failures of one pipeline in a row."""

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._jobs = 0
        self._openings = 0
        self._next_rest_s = policy.rest_s

    def job_finished(self) -> None:
        """Forget everything: the pipeline works."""
        self._jobs = self._openings = 0
        self._next_rest_s = self._policy.rest_s

    def job_failed(self, others_in_service: bool) -> float:
        """Count a failed job, and return for how many seconds the pipeline rests, 0 for not at all."""
        self._jobs += 1
        return self._rest() if self._jobs >= self._policy.in_a_row and others_in_service else 0.0

    def opened(self) -> None:
        """Note that the pipeline could be opened."""
        self._openings = 0

    def opening_failed(self) -> float | None:
        """Count a failed opening, and return for how many seconds the pipeline rests; None gives it up."""
        self._openings += 1
        return None if self._openings >= self._policy.in_a_row else self._rest()

    def _rest(self) -> float:
        rest_s, self._next_rest_s = self._next_rest_s, min(2 * self._next_rest_s, self._policy.longest_rest_s)
        return rest_s


def blames_pipeline(error: BaseException) -> bool:
    """Return whether an error makes it doubtful that the pipeline works, so that it has to be opened anew.

    Not if the caller stopped, asked for the impossible, named a file that cannot be written, or got numbers that are
    not finite: engines compute those without being broken.
    """
    if isinstance(error, CancelledError | RequestError | OutputError):
        return False
    return not isinstance(error, NotFiniteError) and not isinstance(error.__cause__, NotFiniteError)
