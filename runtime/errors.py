"""Errors a user can meet: where it happened, what was received, what was expected, and how to fix it.

Every error of reelforge derives from :class:`ReelforgeError`, and the command line turns each into four plain lines and
the documented exit code; a traceback is only ever shown for a bug. The module knows nothing of the stages that raise.
"""

from __future__ import annotations

from typing import ClassVar


class ReelforgeError(Exception):
    """Base of all errors that are not bugs.

    Args:
        where: What is wrong and where, one sentence: ``"height=700 is not supported by bundle 'hv-720p'."``
        received: The offending value, if it helps.
        expected: What would have been accepted.
        fix: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, *, received: object = None, expected: str = "", fix: str = "") -> None:
        super().__init__(where)
        self.where = where
        self.received = received
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        details = []
        if self.received is not None:
            details.append(f"received: {self.received}")
        if self.expected:
            details.append(f"expected: {self.expected}")
        lines = [f"{type(self).__name__}: {self.where}"]
        if details:
            lines.append("  " + "   ".join(details))
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class RequestError(ReelforgeError):
    """A request asks for something that the bundle or the command does not offer."""

    exit_code = 2


class CheckpointError(ReelforgeError):
    """A checkpoint is incomplete, damaged, unsafe, or of another model family."""

    exit_code = 3


class BundleError(ReelforgeError):
    """A bundle is missing, altered, incomplete, or of another schema version."""

    exit_code = 4


class BuildError(ReelforgeError):
    """A build cannot be carried out or was not finished."""

    exit_code = 5


class VerificationError(ReelforgeError):
    """A bundle's numbers differ from its reference by more than the stated tolerance."""

    exit_code = 6


class OutputError(ReelforgeError):
    """A result cannot be written where it was asked for."""

    exit_code = 7


class EngineError(ReelforgeError):
    """An engine refused to load, or received tensors that it does not take."""

    exit_code = 8


class NotFiniteError(EngineError):
    """A stage gave NaN or infinity. The engine is not broken by that: its weights or its precision do not suffice."""


class OutOfMemoryError(EngineError):
    """Host or GPU had too little memory for a stage; with other work out of the way, or in less at once, it may fit."""


class CancelledError(ReelforgeError):
    """A generation was stopped by its caller; the pipeline can be used again."""

    exit_code = 9


class DeadlineError(CancelledError):
    """A request was not finished when its deadline passed."""
