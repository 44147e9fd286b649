"""What jobs that have not ended say, for those who listen: the latest, in bounded memory.

A feed lives as long as its job. Listeners are told that there is news and come for it themselves, from the event loop;
whoever is too slow misses older events and never the newest. The module knows neither HTTP nor the store.
"""

from __future__ import annotations

import base64
import secrets
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from reelforge.runtime.events import Pixels

KEPT = 32
"""Events of one job that somebody who comes back can still be told."""

Data = dict[str, object]
Listener = Callable[[], None]


@dataclass(frozen=True)
class Said:
    """One event: its number, its name and what it carries."""

    number: int
    name: str
    data: Data


class Picture:
    """A preview that becomes an event when somebody wants it: most are never looked at.

    Args:
        number: The event's.
        step: After which the latents looked like this.
        pixels: uint8 ``[H, W, 3]``.
    """

    def __init__(self, number: int, step: int, pixels: Pixels) -> None:
        self.number = number
        self._step, self._pixels = step, pixels

    @cached_property
    def said(self) -> Said:
        """The event, made once for all listeners."""
        image = "data:image/png;base64," + base64.b64encode(png(self._pixels)).decode("ascii")
        return Said(self.number, "preview", {"step": self._step, "image": image})


class Feed:
    """The events of one job. Any thread may use it."""

    def __init__(self, progress: Data) -> None:
        self.name = secrets.token_hex(4)  # numbers of another feed of the same job, before a restart, are not ours
        self._lock = threading.Lock()
        self._number = 0
        self._kept: deque[Said] = deque(maxlen=KEPT)
        self._picture: Picture | None = None
        self._progress = progress
        self._closed = False
        self._listeners: list[Listener] = []

    @property
    def progress(self) -> Data:
        """The newest progress."""
        return self._progress

    @property
    def closed(self) -> bool:
        """Whether the job has ended."""
        return self._closed

    def tell_progress(self, data: Data) -> None:
        """Say where the job is."""
        with self._lock:
            self._number += 1
            self._progress = data
            self._kept.append(Said(self._number, "progress", data))
            self._wake()

    def tell_preview(self, step: int, picture: Pixels) -> None:
        """Show what the latents look like, uint8 ``[T, H, W, 3]``: the frame in the middle. Older pictures go."""
        shown = picture[len(picture) // 2].copy()  # not a view, which would keep all of them
        with self._lock:
            self._number += 1
            self._picture = Picture(self._number, step, shown)
            self._wake()

    def close(self) -> None:
        """Say that nothing follows."""
        with self._lock:
            self._closed = True
            self._wake()

    def after(self, number: int) -> list[Said]:
        """Return the events that came later, as far as they are kept."""
        with self._lock:
            found, picture = [said for said in self._kept if said.number > number], self._picture
        if picture is not None and picture.number > number:
            found.append(picture.said)
            found.sort(key=lambda said: said.number)
        return found

    def newest(self) -> tuple[list[Said], int]:
        """Return what somebody new is told, and the number after which the rest follows.

        That is the newest picture, if there is one, and the newest progress.
        """
        with self._lock:
            progress, picture, number = self._progress, self._picture, self._number
        said = Said(number, "progress", progress)
        return ([said] if picture is None else [picture.said, said]), number

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called at every change, from any thread; it must only pass the word on."""
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Undo :meth:`listen`."""
        with self._lock:
            self._listeners.remove(listener)

    def _wake(self) -> None:
        for listener in self._listeners:
            listener()


class Feeds:
    """The feeds of all jobs that have not ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed] = {}

    def open(self, job_id: str, progress: Data) -> Feed:
        """Begin a job's feed."""
        with self._lock:
            return self._feeds.setdefault(job_id, Feed(progress))

    def find(self, job_id: str) -> Feed | None:
        """Return a job's feed; None if the job has ended, or is not known."""
        with self._lock:
            return self._feeds.get(job_id)

    def close(self, job_id: str) -> None:
        """End a job's feed, after its end is in the store."""
        with self._lock:
            feed = self._feeds.pop(job_id, None)
        if feed is not None:
            feed.close()

    def wake_all(self) -> None:
        """Have all listeners look again."""
        with self._lock:
            feeds = list(self._feeds.values())
        for feed in feeds:
            with feed._lock:
                feed._wake()


def png(picture: Pixels) -> bytes:
    """Return uint8 ``[H, W, 3]`` as a PNG file (ISO 15948: no filter, 8 bits, RGB)."""
    height, width, _ = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b"")
