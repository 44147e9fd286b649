"""What a user sees while a video is made: bars, and the frames into their file.

Knows the events of ``runtime``; it does not know what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.events import Event, Frames, Notice
from reelforge.runtime.events import Progress as Step
from reelforge.runtime.video import VideoWriter

_PHASES = ("text", "conditioning", "sampling", "decoding")


@contextmanager
def progress_bars(hidden: bool) -> Iterator[Progress]:
    """Show bars on stderr for the duration of a ``with`` block, if it is a terminal."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=hidden or not terminal.is_terminal) as bars:
        yield bars


def open_bundle(path: Path, check: Check, bars: Progress) -> Bundle:
    """Open a bundle, with a bar for the bytes that are checked.

    Raises:
        BundleError: If it is damaged.
    """
    task = bars.add_task("bundle", total=None, visible=False)

    def show(done: int, total: int) -> None:
        # In megabytes, because the column shows whole numbers.
        bars.update(task, completed=done >> 20, total=total >> 20, visible=total >> 20 > 0)

    return Bundle.open(path, check, show)


@dataclass
class Told:
    """What events said besides frames.

    Attributes:
        notices: Sentences for the user.
        skipped: Sampling steps that reused earlier ones.
    """

    notices: list[str] = field(default_factory=list)
    skipped: int = 0


def write_video(events: Iterable[Event], bars: Progress, video: VideoWriter) -> Told:
    """Write frames as they come, and return the rest."""
    told = Told()
    tasks = {phase: bars.add_task(phase, total=None, visible=False) for phase in _PHASES}
    for event in events:
        match event:
            case Step():
                bars.update(tasks[event.phase], completed=event.step, total=event.total, visible=True)
                told.skipped = max(told.skipped, event.skipped)
            case Notice():
                told.notices.append(event.text)
            case Frames():
                video.write(event.pixels)
    return told
