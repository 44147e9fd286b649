"""What a pool allows, and what it says to those whom it turns away.

The module knows numbers and messages, not the queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from reelforge.runtime.errors import CancelledError, ReelforgeError, RequestError


class QueueFullError(ReelforgeError):
    """There was no place for a request. Nothing is wrong with it.

    Attributes:
        retry_after_s: When it may be worth to ask again, in seconds; None while nothing has been measured yet.
    """

    def __init__(
        self, where: str, retry_after_s: float | None, *, received: object = None, expected: str = "", fix: str = ""
    ) -> None:
        super().__init__(where, received=received, expected=expected, fix=fix)
        self.retry_after_s = retry_after_s


class ClosedError(CancelledError):
    """The pool was closed, or is closing, and does not do what was asked."""


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait and run.

    Attributes:
        waiting: Requests that wait, of all callers together.
        waiting_per_caller: Of one caller; None means no limit but ``waiting``.
        running_per_caller: Requests of one caller that run at once; None means as many as there are pipelines.
        frames_ahead: Batches of frames of a streamed job that may lie unread; the next one holds the generation back.
        stall_s: Seconds that a streamed job may be held back; then it fails, and its pipeline goes on with another.
        encode_together: Prompts whose texts are encoded at once, while the encoders are in memory; 1 means each alone.
    """

    waiting: int = 64
    waiting_per_caller: int | None = None
    running_per_caller: int | None = None
    frames_ahead: int = 2
    stall_s: float = 60.0
    encode_together: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name.endswith("_per_caller")
            if value is None and optional:
                continue
            seconds = field.name.endswith("_s")
            if seconds and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                continue
            if not seconds and type(value) is int and value >= 1:
                continue
            raise RequestError(
                f"the queue's limit {field.name} is not usable.",
                received=repr(value),
                expected="seconds above 0" if seconds else "1 or more" + (", or None" if optional else ""),
                fix=f"use for example {field.name}={field.default}",
            )


@dataclass(frozen=True)
class FailurePolicy:
    """What becomes of a pipeline that fails. Its job fails in any case, and it is opened anew before the next one.

    Attributes:
        in_a_row: After so many failed jobs in a row a pipeline rests, if another one is in service meanwhile: a device
            that fails at once would otherwise draw all requests. After so many failed openings in a row it is retired.
        rest_s: The first rest in seconds, also between two openings; it doubles each time, up to ``longest_rest_s``.
        longest_rest_s: The longest rest in seconds.
    """

    in_a_row: int = 3
    rest_s: float = 30.0
    longest_rest_s: float = 3600.0


def check_terms(caller: object, priority: object, deadline_s: object, block_s: object) -> None:
    """Check what comes with a request.

    Raises:
        RequestError: Listing everything that is wrong.
    """
    problems: list[tuple[str, object, str]] = []
    if not isinstance(caller, str):
        problems.append(("caller", caller, "a string"))
    if type(priority) is not int or abs(priority) > _MOST_PRIORITY:
        problems.append(("priority", priority, f"a whole number in -{_MOST_PRIORITY}..{_MOST_PRIORITY}"))
    if deadline_s is not None and not _is_duration(deadline_s):
        problems.append(("deadline_s", deadline_s, "a finite number of seconds of at least 0, or None"))
    if block_s is not None and not _is_duration(block_s):
        problems.append(("block_s", block_s, "a finite number of seconds of at least 0, or None"))
    if problems:
        raise RequestError(
            f"{', '.join(name for name, _, _ in problems)} cannot be used to queue a request.",
            received=", ".join(f"{name}={ascii(value)[:60]}" for name, value, _ in problems),
            expected="; ".join(f"{name} {expected}" for name, _, expected in problems),
        )


_MOST_PRIORITY = 1000
_MOST_SECONDS = 1e9  # a condition variable takes no longer wait on every system


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_SECONDS


def seconds_text(seconds: float | None) -> str:
    """Return an estimate for a message."""
    return "in a while" if seconds is None else f"in about {max(math.ceil(seconds), 1)} s"
