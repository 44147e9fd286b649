"""The events of one job between the thread that makes them and whoever reads them, in bounded memory.

- Progress: the last few are kept (``PROGRESS_KEPT``). A slow reader misses older ones and never the newest.
- Notices: all are kept; a generation has a handful.
- Frames, where the log hands them over: never dropped. When as many batches as allowed lie unread, whoever brings the
  next one waits; after a while that is an error, because a device waits with him.

The module knows no queue and no pipeline.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import CancelledError
from reelforge.runtime.events import Event, Frames, Notice, Progress

PROGRESS_KEPT = 16

Listener = Callable[[], None]
Numbered = tuple[int, Event]


class EventLog:
    """Events with numbers that count up, from 1.

    Args:
        frames_ahead: Batches of frames that may lie unread.
        stall_s: How long whoever brings more of them waits, in seconds.
    """

    def __init__(self, frames_ahead: int, stall_s: float) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._progress: deque[Numbered] = deque(maxlen=PROGRESS_KEPT)
        self._notices: list[Numbered] = []
        self._frames: deque[Numbered] = deque()
        self._frames_ahead = frames_ahead
        self._stall_s = stall_s
        self._ended = False
        self._listeners: list[Listener] = []

    def tell(self, event: Progress | Notice) -> None:
        """Add an event that is small."""
        with self._changed:
            numbered = (next(self._numbers), event)
            if isinstance(event, Progress):
                self._progress.append(numbered)
            else:
                self._notices.append(numbered)
            self._wake()

    def hand_over(self, frames: Frames, stop: Stop) -> None:
        """Add frames, for one reader; wait until there is room.

        Raises:
            CancelledError: If ``stop`` ends the wait, or nobody has read for too long.
        """
        with self._changed:
            end = time.monotonic() + self._stall_s
            while len(self._frames) >= self._frames_ahead:
                stop.check(f"frame {frames.start}")
                left = end - time.monotonic()
                if left <= 0:
                    raise CancelledError(
                        f"the frames of a video were not read for {self._stall_s:g} s, and it was given up.",
                        received=f"{len(self._frames)} batches that lie unread",
                        expected="a reader of the job's events who keeps up, for a device waits",
                        fix="read the events, cancel jobs that nobody wants, or submit with stream=False",
                    )
                self._changed.wait(left if stop.remaining_s is None else min(left, stop.remaining_s))
            self._frames.append((next(self._numbers), frames))
            self._wake()

    def wake(self) -> None:
        """Have whoever waits look again, because something outside of the log has changed."""
        with self._changed:
            self._wake()

    def end(self) -> None:
        """Say that nothing follows. Frames that lie unread can still be read."""
        with self._changed:
            self._ended = True
            self._wake()

    @property
    def ended(self) -> bool:
        """Whether :meth:`end` was called."""
        return self._ended

    def take(self, after: int) -> Numbered | None:
        """Return the first event whose number is above ``after``, or None; frames are gone once they were taken."""
        with self._changed:
            return self._take(after)

    def wait_and_take(self, after: int) -> Numbered | None:
        """Like :meth:`take`, but wait for an event; None means that the end was reached."""
        with self._changed:
            while True:
                numbered = self._take(after)
                if numbered is not None or self._ended:
                    return numbered
                self._changed.wait()

    def wait_for_end(self, timeout_s: float | None) -> bool:
        """Wait until :meth:`end` was called; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout_s)

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called at every change, from any thread and under a lock: it must only pass the word on."""
        with self._changed:
            self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Undo :meth:`listen`."""
        with self._changed:
            self._listeners.remove(listener)

    def _take(self, after: int) -> Numbered | None:
        heads = [next((one for one in kept if one[0] > after), None) for kept in (self._progress, self._notices)]
        found = min((head for head in heads if head is not None), default=None, key=_number)
        if self._frames and (found is None or self._frames[0][0] < found[0]):
            found = self._frames.popleft()
            self._wake()
        return found

    def _wake(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


def _number(numbered: Numbered) -> int:
    return numbered[0]
