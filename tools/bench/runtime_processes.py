"""Starts contenders in processes of their own, tells them what to generate, and watches their memory meanwhile.

Anonymous and file-backed memory apart, as the kernel counts them (see ``memory``); it does not know what they compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import click

from reelforge.tools.bench.memory import status_fields
from reelforge.tools.bench.runtime_child import Answer, Job, Mark, Opened, Task

CHILD = "reelforge.tools.bench.runtime_child"
INTERVAL_S = 0.02


@dataclass(frozen=True)
class Sample:
    """Memory of a process at a moment of the shared clock."""

    clock: float
    anonymous_bytes: int
    file_bytes: int


@dataclass
class Trace:
    """Memory of a process over time."""

    samples: list[Sample] = field(default_factory=list)

    def between(self, begin: float, end: float) -> list[Sample]:
        """Return the samples of a span of time."""
        return [sample for sample in self.samples if begin <= sample.clock <= end]

    @property
    def peak_anonymous_bytes(self) -> int:
        """The most of any sample."""
        return max((sample.anonymous_bytes for sample in self.samples), default=0)

    @property
    def peak_file_bytes(self) -> int:
        """Likewise, of what can be dropped at any time."""
        return max((sample.file_bytes for sample in self.samples), default=0)


class Contender:
    """A process with one system, until the ``with`` block ends.

    Args:
        name: For messages and tables.
        job: What it runs.
        environment: Variables to add.
        interval_s: Between two samples of its memory.
    """

    def __init__(
        self, name: str, job: Job, environment: Mapping[str, str] | None = None, interval_s: float = INTERVAL_S
    ) -> None:
        self.name = name
        self.trace = Trace()
        self._interval_s = interval_s
        self.started = time.monotonic()
        command = [sys.executable, "-m", CHILD, json.dumps(asdict(job))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self.opened = Opened(**self._hear())

    def __enter__(self) -> Self:
        return self

    def ask(self, task: Task) -> Answer:
        """Generate one video.

        Raises:
            click.ClickException: If the process ends instead; what it said is on stderr.
        """
        pipe = self._pipe(self._process.stdin)
        pipe.write(json.dumps(asdict(task)) + "\n")
        pipe.flush()
        said = self._hear()
        return Answer(**{**said, "marks": [Mark(**mark) for mark in said["marks"]]})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._watcher.join()
        self._pipe(self._process.stdin).close()
        if error is not None:
            self._process.kill()
        self._process.wait()
        self._pipe(self._process.stdout).close()

    def _hear(self) -> dict[str, Any]:
        for line in self._pipe(self._process.stdout):
            if line.startswith("{"):  # libraries may print, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise click.ClickException(f"the process of {self.name!r} ended with status {self._process.wait()}")

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._done.wait(self._interval_s):
            fields = status_fields(status)
            if fields:
                sample = Sample(time.monotonic(), fields.get("RssAnon", 0), fields.get("RssFile", 0))
                self.trace.samples.append(sample)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
