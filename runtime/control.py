"""Stopping a generation from outside: by a call from any thread, or by a deadline.

Whoever works asks :meth:`Stop.check` between units of work: stages, steps, tiles. Nothing is interrupted inside of one.
The module does not know what is being stopped.
"""

from __future__ import annotations

import threading
import time

from reelforge.runtime.errors import CancelledError, DeadlineError


class Stop:
    """The end of one request, which anyone may call for.

    Args:
        deadline_s: Seconds from now until the request is worth nothing; None means it can wait forever.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._allowed_s = deadline_s
        self._deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self._event = threading.Event()
        self._reason = ""
        self._keep = False

    def set(self, reason: str = "it was cancelled", keep: bool = False) -> None:
        """Ask for the end; the first reason counts.

        Args:
            reason: For the message.
            keep: Write the latents of a sampling loop that this ends, as those of one that fails, where the final ones
                would have been saved: somebody wants to go on later.
        """
        if not self._event.is_set():
            self._reason, self._keep = reason, keep
            self._event.set()

    @property
    def keeps(self) -> bool:
        """Whether what was computed so far is to be kept."""
        return self._keep

    @property
    def wanted(self) -> bool:
        """Whether the end was asked for, or the deadline has passed."""
        return self._event.is_set() or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def check(self, where: str) -> None:
        """Raise if the end was asked for.

        Args:
            where: What would have come next, ``"step 3 of 50"``.

        Raises:
            CancelledError: If :meth:`set` was called.
            DeadlineError: If the deadline has passed.
        """
        if self._event.is_set():
            raise CancelledError(f"the generation was stopped before {where}: {self._reason}.")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineError(
                f"the deadline passed before {where}.",
                received=f"a deadline of {self._allowed_s:g} s",
                fix="allow more time, take fewer steps or a smaller video, or lighten the load",
            )
