"""Ctrl-C while a video is made: with a file for latents, the step under way is finished and what was done is kept.

Knows signals and what to tell the user; who writes the latents is ``runtime.resume``.
"""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from reelforge.runtime.control import Stop
from reelforge.runtime.events import Event, Progress
from reelforge.runtime.resume import step_file

_SAMPLING, _DECODING = "sampling", "decoding"
_FINISHING = "interrupted: the work under way is finished, to keep what was sampled; Ctrl-C again ends at once."


class Unfinished:
    """How far a video has come.

    Args:
        save_latents: Where its final latents go.
    """

    def __init__(self, save_latents: Path) -> None:
        self._save_latents = save_latents
        self._phase, self._step, self._total = "", 0, 0

    def watch(self, events: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """Pass events on, and remember the last step."""
        for event in events:
            if isinstance(event, Progress):
                self._phase, self._step, self._total = event.phase, event.step, event.total
            yield event

    def advice(self, bundle: Path, output: str, step_was_finished: bool) -> str:
        """Say what was kept, and how to go on.

        Args:
            bundle: For the command.
            output: For the command.
            step_was_finished: Whether the loop ended between two steps, and so could keep its latents.
        """
        final = self._save_latents
        sampled = self._phase == _SAMPLING and self._step == self._total and step_was_finished
        if (self._phase == _DECODING or sampled) and final.exists():
            command = f"reelforge decode {shlex.quote(str(bundle))} {shlex.quote(str(final))} -o {shlex.quote(output)}"
            return f"interrupted; the final latents are in {str(final)!r}: go on with {command}"
        kept = step_file(final, self._step)
        if self._phase == _SAMPLING and step_was_finished and kept.exists():
            return (
                f"interrupted; {self._step} of {self._total} steps are kept in {str(kept)!r}: go on with the same "
                f"command and --resume {shlex.quote(str(kept))}"
            )
        return "interrupted; nothing was written."


@contextmanager
def finishing_the_step(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C set ``stop`` instead of ending the program at once; a second one does that.

    Only the main thread can hear of signals; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.set("it was interrupted", keep=True)  # before a terminal that is gone can fail
        click.echo(_FINISHING, err=True)

    previous = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
