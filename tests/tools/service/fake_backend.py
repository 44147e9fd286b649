"""A backend that computes nothing, where and as long as a test wants it; its videos are real, and tiny."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reelforge.runtime.errors import CancelledError, ReelforgeError
from reelforge.runtime.events import Progress
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.video import VideoWriter
from reelforge.tools.service.backend import Facts, OnEvent, check_on, facts_of

WAIT_S = 30.0


class Hold:
    """A place where a job waits until the test lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()


@dataclass
class FakeBackend:
    """Attributes are what it does, by prompt, and what it did."""

    manifest: Manifest
    capacity: int = 1
    step_s: float = 0.0
    opens: threading.Event | None = None  # waits for it
    unopenable: ReelforgeError | None = None
    holds: dict[str, Hold] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    on_step: Callable[[str, int], None] | None = None
    before_output: Callable[[Path], None] | None = None
    ran: list[str] = field(default_factory=list)
    closed: bool = False

    def hold(self, prompt: str) -> Hold:
        self.holds[prompt] = Hold()
        return self.holds[prompt]

    def open(self) -> None:
        if self.opens is not None:
            assert self.opens.wait(WAIT_S)
        if self.unopenable is not None:
            raise self.unopenable

    def close(self, drain_s: float) -> None:
        self.closed = True

    def describe(self) -> Facts:
        return facts_of(self.manifest, "fake")

    def check(self, request: Request) -> ResolvedRequest:
        return check_on(self.manifest, "fake", request)

    def run(
        self, job_id: str, request: Request, on_event: OnEvent, cancelled: threading.Event, output: Path, kept: Path
    ) -> None:
        resolved = self.check(request)
        self.ran.append(request.prompt)
        on_event(Progress("text", 1, 1))
        for step in range(resolved.steps):
            hold = self.holds.get(request.prompt)
            if step == 0 and hold is not None:
                hold.entered.set()
                end = time.monotonic() + WAIT_S
                while not hold.released.wait(0.01) and not cancelled.is_set():
                    assert time.monotonic() < end, "nobody let the job go on"
            if cancelled.wait(self.step_s) if self.step_s else cancelled.is_set():
                raise CancelledError(f"the generation was stopped before step {step + 1}.")
            if self.on_step is not None:
                self.on_step(job_id, step)
            if request.prompt in self.failures:
                raise self.failures[request.prompt]
            preview = np.full((3, 6, 8, 3), 40 * step % 256, np.uint8)
            on_event(Progress("sampling", step + 1, resolved.steps, float(resolved.steps - step - 1), preview))
        if self.before_output is not None:
            self.before_output(output)
        shape = resolved.shape
        with VideoWriter(output, shape.height, shape.width, shape.frames, 24) as video:
            for frame in range(shape.frames):
                value = (request.seed + 3 * frame) % 256
                video.write(np.full((1, shape.height, shape.width, 3), value, np.uint8))
        on_event(Progress("decoding", 1, 1))
