"""Jobs on a cluster: a :class:`reelforge.tools.service.backend.Backend` whose pipelines are replicas of a deployment.

A replica that is lost loses no job: it is begun again on another one. How many replicas there are is Ray Serve's
matter, which counts the calls that wait. The module knows neither HTTP nor the jobs' store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, Self

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import CancelledError, EngineError, OutputError
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.tools.service.backend import Facts, OnEvent, check_on, facts_of
from reelforge.tools.service.settings import Settings
from reelforge.tools.service_ray.messages import Began, Failed, Finished, Message, Piece, first_line

_log = logging.getLogger(__name__)

_LOOK_S = 0.05
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
MOST_LOSSES = 5
"""So many replicas may be lost with a job in them until the job is held to be the reason."""


@dataclass
class _Heard:
    """What is known of an attempt that was given up: whether a replica had begun with it."""

    began: bool = False


class Call(Protocol):
    """What a replica says, as it comes."""

    def __iter__(self) -> Iterator[list[Message]]: ...

    def cancel(self) -> None:
        """End it, also where no replica has taken it yet."""
        ...


class Replicas(Protocol):
    """The deployment."""

    def open(self) -> None:
        """Find it."""
        ...

    def make(self, request: Request, digest: str, kept: str) -> Call:
        """Hand a job to whichever replica is free first."""
        ...

    def is_lost(self, error: Exception) -> bool:
        """Return whether an error means that a replica has gone, and not that it said something."""
        ...

    def is_cancelled(self, error: Exception) -> bool:
        """Return whether an error is the end of a cancelled call."""
        ...


class RayBackend:
    """Computes jobs on a deployment's replicas.

    Args:
        settings: The bundle, and how many calls wait ahead.
        replicas: The deployment.
        most: How many replicas there can be.
    """

    def __init__(self, settings: Settings, replicas: Replicas, most: int) -> None:
        self._settings = settings
        self._replicas = replicas
        self._most = most
        self._bundle: Bundle | None = None
        self._closed = threading.Event()
        self._running = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """One job per replica that there can be, and some that wait: by their number Ray Serve adds replicas."""
        return self._most + self._settings.ahead

    def open(self) -> None:
        """Open the bundle's manifest, and find the deployment."""
        self._bundle = Bundle.open(self._settings.bundle, Check.SIZES)
        self._replicas.open()

    def close(self, drain_s: float) -> None:
        """End what runs; the replicas are not this backend's."""
        deadline = time.monotonic() + drain_s
        while self._running and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        self._closed.set()

    def describe(self) -> Facts:
        """Return what the bundle offers."""
        bundle = self._opened()
        return facts_of(bundle.manifest, bundle.name)

    def check(self, request: Request) -> ResolvedRequest:
        """Check a request."""
        bundle = self._opened()
        return check_on(bundle.manifest, bundle.name, request)

    def run(
        self, job_id: str, request: Request, on_event: OnEvent, cancelled: threading.Event, output: Path, kept: Path
    ) -> None:
        """Compute a job on some replica, on another one if that is lost, and write it to ``output``."""
        self.check(request)
        kept.mkdir(exist_ok=True)
        with self._lock:
            self._running += 1
        try:
            self._run(job_id, request, on_event, cancelled, output, kept)
        finally:
            with self._lock:
                self._running -= 1

    def _run(
        self, job_id: str, request: Request, on_event: OnEvent, cancelled: threading.Event, output: Path, kept: Path
    ) -> None:
        losses, pause_s = 0, _PAUSE_S
        while True:
            heard = _Heard()
            try:
                self._attempt(job_id, request, on_event, cancelled, output, kept, heard)
            except Exception as error:
                with suppress(OSError):  # why there is no video is said above
                    output.unlink(missing_ok=True)
                if not self._replicas.is_lost(error):
                    raise
                if not heard.began:  # the job cannot be to blame: it waits until there are replicas again
                    _log.warning("%s: no replica took it (%s), and it waits", job_id, type(error).__name__)
                    self._wait(cancelled, pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                    continue
                losses, pause_s = losses + 1, _PAUSE_S
                _log.warning(
                    "%s: its replica was lost (%s), %d of %d", job_id, type(error).__name__, losses, MOST_LOSSES
                )
                if losses >= MOST_LOSSES:
                    raise EngineError(
                        f"{losses} replicas were lost while they computed this video.",
                        received=first_line(error),
                        fix="see the replicas' logs; a smaller video may fit",
                    ) from error
                self._wait(cancelled, _PAUSE_S)
            else:
                return

    def _attempt(
        self,
        job_id: str,
        request: Request,
        on_event: OnEvent,
        cancelled: threading.Event,
        output: Path,
        kept: Path,
        heard: _Heard,
    ) -> None:
        call = self._replicas.make(request, self._opened().manifest.content_digest, str(kept.resolve()))
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(call, cancelled, ended), daemon=True)
        watch.start()
        try:
            with _File(output) as file:
                for message in chain.from_iterable(call):
                    if isinstance(message, Piece):
                        file.write(message.data)
                    elif isinstance(message, Failed):
                        raise message.error()
                    elif isinstance(message, Began):
                        heard.began = True
                        _log.info("%s runs in process %d on %s", job_id, message.process, message.node)
                    elif isinstance(message, Finished):
                        file.close()
                        _require_whole(file.written, message.size_bytes)
                        return
                    else:
                        on_event(message)
            if self._unwanted(cancelled):
                raise CancelledError("the job was cancelled.")
            raise EngineError("a replica ended without a word about the job.", fix="see the replicas' logs")
        except Exception as error:
            if self._unwanted(cancelled) and self._replicas.is_cancelled(error):
                raise CancelledError("the job was cancelled.") from error
            raise
        finally:
            ended.set()
            call.cancel()
            watch.join()

    def _watch(self, call: Call, cancelled: threading.Event, ended: threading.Event) -> None:
        while not ended.wait(_LOOK_S):
            if self._unwanted(cancelled):
                call.cancel()
                return

    def _unwanted(self, cancelled: threading.Event) -> bool:
        return cancelled.is_set() or self._closed.is_set()

    def _wait(self, cancelled: threading.Event, pause_s: float) -> None:
        end = time.monotonic() + pause_s
        while time.monotonic() < end:
            if self._unwanted(cancelled):
                raise CancelledError("the job was cancelled.")
            time.sleep(_LOOK_S)

    def _opened(self) -> Bundle:
        assert self._bundle is not None
        return self._bundle


class _File:
    """The video, as it comes; only what goes wrong with the file itself is an error of writing.

    Some of what a call may raise is an OSError too.
    """

    def __init__(self, path: Path) -> None:
        self.written = 0
        with _writing():
            self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a video that is whole has been closed
            self._file.close()

    def write(self, data: bytes) -> None:
        """Append."""
        with _writing():
            self.written += self._file.write(data)

    def close(self) -> None:
        """Hand all to the system."""
        with _writing():
            self._file.close()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"the video cannot be written: {error.strerror or error}.") from error


def _require_whole(written: int, expected: int) -> None:
    if written != expected:
        raise EngineError(
            "a video came incomplete from its replica.", received=f"{written} bytes", expected=f"{expected} bytes"
        )
