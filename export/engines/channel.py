"""What a compiling child process tells its parent: lines of JSON through a pipe.

The module knows the lines' form; it starts no process and compiles nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reelforge.export.engines.module import Message
from reelforge.runtime import errors
from reelforge.runtime.errors import ReelforgeError

_INTERVAL_S = 0.1
_LONGEST_TEXT = 4000
_KINDS = {kind.__name__: kind for kind in (errors.BuildError, errors.RequestError, errors.EngineError)}


@dataclass(frozen=True)
class Progress:
    """How far a compiler is.

    Attributes:
        phase: In the compiler's words.
        done: Steps of the phase that are finished.
        steps: Steps of the phase.
    """

    phase: str
    done: int
    steps: int


class Sender:
    """The child's end.

    Args:
        descriptor: Of the pipe.
        clock: Seconds; replaced in tests.
    """

    def __init__(self, descriptor: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._last = float("-inf")

    def step(self, phase: str, done: int, steps: int) -> None:
        """Tell of progress, at most ten times a second: a large build takes hundreds of thousands of steps."""
        now = self._clock()
        if now - self._last >= _INTERVAL_S:
            self._last = now
            self._send({"step": [phase, done, steps]})

    def message(self, message: Message) -> None:
        """Pass on what the compiler says, unless it is verbose."""
        if message.severity != "VERBOSE":
            self._send({"message": [message.severity, message.text[:_LONGEST_TEXT]]})

    def error(self, error: ReelforgeError) -> None:
        """Pass on why the build failed."""
        received = None if error.received is None else str(error.received)
        fields = {"where": error.where, "received": received, "expected": error.expected, "fix": error.fix}
        self._send({"error": {"kind": type(error).__name__, **fields}})

    def _send(self, content: dict[str, Any]) -> None:
        data = (json.dumps(content) + "\n").encode()
        while data:
            data = data[os.write(self._descriptor, data) :]


def read_line(line: str) -> Progress | Message | ReelforgeError | None:
    """Read one line of a :class:`Sender`; None for a line that was cut off when the child died."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError:
        return None
    if "step" in content:
        return Progress(*content["step"])
    if "message" in content:
        return Message(*content["message"])
    fields = content["error"]
    kind = _KINDS[fields["kind"]]
    return kind(fields["where"], received=fields["received"], expected=fields["expected"], fix=fields["fix"])
