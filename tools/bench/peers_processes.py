"""Contenders of ``peers_cpu`` as processes: started one after the other, timed in turns, their memory watched.

It does not know what they compute.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import click
import numpy as np

from reelforge.tools.bench.memory import status_fields

PAUSE_S, SAMPLE_S, INTERVAL_S = 0.3, 0.3, 0.02


class PeerError(Exception):
    """A contender's process ended instead of answering; the text is the last line it said."""


@dataclass(frozen=True)
class Contender:
    """A process to start.

    Attributes:
        name: For tables.
        command: That runs it; the job is its last argument.
        job: With the key ``output``, to which the result of a step goes.
    """

    name: str
    command: tuple[str, ...]
    job: dict[str, str]


@dataclass(frozen=True)
class Result:
    """One contender after all rounds.

    Attributes:
        name: For tables.
        loaded_s: Seconds to load, imports included.
        seconds: Of a step, one per round.
        peak_anonymous_bytes: Of its process, over its whole life.
        peak_file_bytes: Likewise of mapped files, which the kernel can drop.
        velocity: What its step computed.
        notes: What it says of itself.
        failure: Why there is nothing of all that, or empty.
    """

    name: str
    loaded_s: float = 0.0
    seconds: tuple[float, ...] = ()
    peak_anonymous_bytes: int = 0
    peak_file_bytes: int = 0
    velocity: Any = None
    notes: str = ""
    failure: str = ""


class Process:
    """A contender's process, until the ``with`` block ends."""

    def __init__(self, contender: Contender, limit_s: float) -> None:
        self.name, self.output = contender.name, Path(contender.job["output"])
        self.peaks = [0, 0]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [*contender.command, json.dumps(contender.job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._limit = threading.Timer(limit_s, self._process.kill)
        self._limit.daemon = True
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._limit.start()
        self._watcher.start()
        return self

    def hear(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            PeerError: If the process ended instead.
        """
        for line in self._pipe(self._process.stdout):
            if line.startswith("{"):  # libraries may print, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        raise PeerError(said[-1] if said and status > 0 else f"ended with status {status}")

    def ask(self, steps: int) -> float:
        """Return the seconds of one step, the mean over ``steps``.

        Raises:
            PeerError: If the process ended instead.
        """
        pipe = self._pipe(self._process.stdin)
        with suppress(BrokenPipeError):  # it has ended; what it answered last says why
            pipe.write(f"{steps}\n")
            pipe.flush()
        return float(self.hear()["seconds"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._limit.cancel()
        self._done.set()
        self._watcher.join()
        self._process.kill()
        with suppress(BrokenPipeError):  # what could not be written is still in the pipe's buffer
            self._process.communicate()
        self._process.wait()
        self._errors.close()

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._done.wait(INTERVAL_S):
            fields = status_fields(status)
            sizes = (fields.get("RssAnon", 0), fields.get("RssFile", 0))
            self.peaks = [max(pair) for pair in zip(self.peaks, sizes, strict=True)]

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def take_turns(contenders: Sequence[Contender], rounds: int, limit_s: float) -> list[Result]:
    """Time ``rounds`` rounds in which every contender has its turn; the order is another in every round.

    Args:
        contenders: To start. They stay loaded, and one computes at a time.
        rounds: Rounds; a sample is the mean over as many steps as fill ``SAMPLE_S``.
        limit_s: A process is killed after so many seconds.
    """
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        running: dict[str, Process] = {}
        loaded: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        for contender in contenders:
            process = stack.enter_context(Process(contender, limit_s))
            try:
                loaded[contender.name] = process.hear()
                counts[contender.name] = max(1, round(SAMPLE_S / process.ask(1)))
            except PeerError as error:
                failures[contender.name] = str(error)
                continue
            running[contender.name] = process
            click.echo(f"loaded {contender.name} in {loaded[contender.name]['loaded_s']:.1f} s", err=True)
        names = list(running)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                if name in failures:
                    continue
                time.sleep(PAUSE_S)  # the contender's before has stopped spinning by then
                try:
                    seconds[name].append(running[name].ask(counts[name]))
                except PeerError as error:
                    failures[name] = f"{error} in round {turn + 1}"
        results = []
        for name in (contender.name for contender in contenders):
            if name in failures:
                results.append(Result(name, failure=failures[name]))
                continue
            notes = ", ".join(f"{key} {value}" for key, value in loaded[name]["notes"].items())
            anonymous, file_backed = running[name].peaks
            velocity = np.load(running[name].output)
            results.append(
                Result(name, loaded[name]["loaded_s"], tuple(seconds[name]), anonymous, file_backed, velocity, notes)
            )
        return results
