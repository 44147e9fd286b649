"""Whose turn it is: one generation at a time, first come first served, and nobody waits for himself.

Nor for another process: a fork copies who has the turn, and not the thread that would end it. The module does not know
what is done during a turn. Fairness between callers and limits on how many may wait are matters of a queue in front of
it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from reelforge.runtime.control import Stop
from reelforge.runtime.errors import EngineError

_LOOK_S = 0.05
"""How long a waiter sleeps before it looks whether it was stopped."""


class Turns:
    """Hands out turns in the order in which they were asked for."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None

    @contextmanager
    def take(self, stop: Stop) -> Iterator[None]:
        """Wait for a turn, which lasts until the block's end; another thread may be the one that ends it.

        Raises:
            EngineError: If the same thread has the turn already and would wait for itself, or this process is not the
                one that made the line.
            CancelledError: If ``stop`` ends the wait.
        """
        refuse_fork(self._process)  # before the lock, which another thread may have had when the process was forked
        thread, ticket = threading.get_ident(), object()
        with self._changed:
            if self._owner == thread:
                raise EngineError(
                    "this thread is in the middle of another video of the same pipeline, and would wait for itself.",
                    expected="one video at a time per thread",
                    fix="consume or close the first stream, use another thread, or open a second pipeline",
                )
            self._waiting.append(ticket)
            try:
                while self._owner is not None or self._waiting[0] is not ticket:
                    stop.check("its turn came")
                    self._changed.wait(_LOOK_S)
                stop.check("its first stage")
            except BaseException:
                self._waiting.remove(ticket)
                self._changed.notify_all()
                raise
            self._waiting.popleft()
            self._owner = thread
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                self._changed.notify_all()


def refuse_fork(process: int) -> None:
    """Refuse to go on in another process than the one that opened a pipeline.

    Args:
        process: The number of that process.

    Raises:
        EngineError: If this one was forked from it.
    """
    if os.getpid() != process:
        raise EngineError(
            "this pipeline was opened by another process, from which this one was forked.",
            received=f"process {os.getpid()}",
            expected=f"process {process}: threads and devices do not survive a fork",
            fix="open the pipeline in each process after forking, or start processes with 'spawn'",
        )
