"""Time of day that does not jump: read once, then counted by the steady clock.

Retention and deadlines compare times of day. If somebody sets the machine's clock a year ahead, no video is to vanish,
and nothing is to be older than what came before it. The module knows nothing else.
"""

from __future__ import annotations

import time


class Clock:
    """Unix time in seconds.

    Args:
        at_least: A time that has certainly passed, for example the newest in the store: with a clock that was set back
            while the service was down, time goes on from there.
    """

    def __init__(self, at_least: float = 0.0) -> None:
        self._base = max(time.time(), at_least) - time.monotonic()

    def now(self) -> float:
        """Return the time."""
        return self._base + time.monotonic()
