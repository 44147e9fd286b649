"""What a replica says about a job, as plain data that every machine of a cluster can read.

Errors travel as their words: some of the runtime's carry arrays, and need arguments that no pickle knows of.
"""

from __future__ import annotations

from dataclasses import dataclass

from reelforge.runtime import errors
from reelforge.runtime.errors import EngineError, ReelforgeError
from reelforge.runtime.events import Notice, Progress


@dataclass(frozen=True)
class Began:
    """A replica has taken the job."""

    node: str
    process: int


@dataclass(frozen=True)
class Piece:
    """Some bytes of the finished video, in order."""

    data: bytes


@dataclass(frozen=True)
class Finished:
    """The video is complete."""

    size_bytes: int


@dataclass(frozen=True)
class Failed:
    """There is no video.

    Attributes:
        kind: The name of the error's class, or of the next of its bases that ``runtime.errors`` has.
        where: Its words, as ``ReelforgeError`` takes them.
        received: Likewise.
        expected: Likewise.
        fix: Likewise.
    """

    kind: str
    where: str
    received: str | None
    expected: str
    fix: str

    @classmethod
    def of(cls, error: ReelforgeError) -> Failed:
        """Return what is left of an error on its way."""
        kind = next(one.__name__ for one in type(error).__mro__ if one.__module__ == errors.__name__)
        received = None if error.received is None else str(error.received)
        return cls(kind, error.where, received, error.expected, error.fix)

    def error(self) -> ReelforgeError:
        """Return the error again."""
        kind = getattr(errors, self.kind, EngineError)
        assert issubclass(kind, ReelforgeError)
        return kind(self.where, received=self.received, expected=self.expected, fix=self.fix)


def first_line(error: Exception) -> str:
    """Return what an error of Ray says, without its traceback; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


Message = Began | Progress | Notice | Piece | Finished | Failed
