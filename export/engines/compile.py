"""Compile a plan in a child process, so that a crash of a compiler is an error message and not a dead server.

The parent imports no compiler. It passes on the child's progress, kills the child when it is interrupted itself, turns
every way in which a child can end into a receipt or a :class:`BuildError`, and removes what a dead child left. It does
not know what the compilers do, and holds none of their memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from reelforge.export.engines.channel import Progress, read_line
from reelforge.export.engines.module import Message
from reelforge.export.engines.plan_writer import partial_path
from reelforge.export.engines.request import PlanRequest
from reelforge.export.engines.requirements import check_precisions
from reelforge.runtime.codec import CodecError, from_json, to_json
from reelforge.runtime.errors import BuildError, ReelforgeError
from reelforge.runtime.receipt import Receipt

_LAST_MESSAGES = 4
_LAST_BYTES = 2000


@dataclass
class _Heard:
    """What came from the child."""

    messages: deque[Message] = field(default_factory=lambda: deque(maxlen=_LAST_MESSAGES))
    error: ReelforgeError | None = None


def compile_plan(
    request: PlanRequest,
    on_progress: Callable[[Progress], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Receipt:
    """Compile ``request`` in a child process and return its receipt; plan and receipt are on the disk then.

    An earlier plan and receipt of the same names are removed first.

    Args:
        request: What to compile.
        on_progress: Is called with each step, in this thread.
        on_start: Is called once with the child's process id, for a caller that measures its memory.

    Raises:
        BuildError: If the compiler refuses the graph, dies, or makes something else than is expected; with its last
            messages. Neither plan nor receipt is left.
        RequestError: For a format that an architecture of the target does not compute in.
    """
    expected = request.expected
    check_precisions(request.target, {*expected.layers.values(), *expected.attentions.values()})
    results = [Path(request.plan), Path(request.receipt)]
    leftovers = [*results, *(partial_path(path) for path in results)]
    for path in results:
        path.parent.mkdir(parents=True, exist_ok=True)
    Path(request.scratch).mkdir(parents=True, exist_ok=True)
    _remove(leftovers)
    try:
        with tempfile.TemporaryDirectory(prefix="compile-", dir=request.scratch) as folder:
            _run(request, Path(folder), on_progress, on_start)
        return _read_receipt(Path(request.receipt))
    except BaseException:
        _remove(leftovers)
        raise


def _run(
    request: PlanRequest,
    folder: Path,
    on_progress: Callable[[Progress], None] | None,
    on_start: Callable[[int], None] | None,
) -> None:
    job = folder / "job.json"
    job.write_text(json.dumps(to_json(request)))
    heard = _Heard()
    with (folder / "output").open("w+b") as output:
        with _child(job, folder, output) as (process, lines):
            if on_start is not None:
                on_start(process.pid)
            for line in lines:
                _hear(line, heard, on_progress)
            status = process.wait()
        if heard.error is not None:
            raise heard.error
        if status != 0:
            raise _death(request, status, heard, _tail(output))


@contextlib.contextmanager
def _child(job: Path, folder: Path, output: BinaryIO) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[str]]]:
    """Yield a running child and its lines; it does not outlive the block."""
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "reelforge.export.engines.child", str(job), str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env={**os.environ, "TMPDIR": str(folder)},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child
            )
        finally:
            os.close(writer)
        try:
            yield process, lines
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _hear(line: str, heard: _Heard, on_progress: Callable[[Progress], None] | None) -> None:
    said = read_line(line)
    if isinstance(said, Progress):
        if on_progress is not None:
            on_progress(said)
    elif isinstance(said, Message):
        heard.messages.append(said)
    elif said is not None:
        heard.error = said


def _death(request: PlanRequest, status: int, heard: _Heard, tail: str) -> BuildError:
    """Say how a child ended that passed on no error."""
    last = " | ".join([*(message.text.strip()[:300] for message in heard.messages), *([tail] if tail else [])])
    if status == -signal.SIGKILL:
        where = f"the compiler of stage {request.stage!r} was killed, most often because memory ran out."
        fix = "partition the stage, free memory, or build on a machine with more"
    elif status < 0:
        where = f"the compiler of stage {request.stage!r} crashed ({_signal_name(-status)})."
        fix = "look for the layer that its last messages name; another precision of it may compile"
    else:
        where = f"the compiler of stage {request.stage!r} ended with status {status}."
        fix = "look for the cause in its last messages"
    return BuildError(where, received=last or "no message", expected="a plan", fix=fix)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(output: BinaryIO) -> str:
    """Return the end of what the child printed, in one line."""
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - _LAST_BYTES))
    lines = output.read().decode("utf-8", "replace").splitlines()
    return " / ".join(line.strip() for line in lines[-_LAST_MESSAGES:] if line.strip())


def _read_receipt(path: Path) -> Receipt:
    try:
        return from_json(Receipt, json.loads(path.read_text()))
    except (OSError, ValueError, CodecError) as error:
        raise BuildError(f"the compiler left no readable receipt at {path}.", received=str(error)) from error


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
