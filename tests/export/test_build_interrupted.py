"""Builds that are interrupted, killed, or fail in a thread: nothing half-written, and the next build succeeds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reelforge.export import stage_compiler
from reelforge.export.build_request import BuildEvents
from reelforge.runtime.bundle.open import Bundle
from tests.bundles import TraceMemory, build

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b"


def stop_in_capture(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def trace(*_: object) -> None:
        raise error

    monkeypatch.setattr(stage_compiler, "capture_part", trace)


def test_ctrl_c_while_tracing(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_capture(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, output)
    assert list(output.parent.iterdir()) == []


def test_ctrl_c_while_weights_are_placed(tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that place weights give up at their next piece, and the folder goes after they have."""
    begun: list[str] = []
    stopped: list[float] = []

    def weights(stage: str, done: int, total: int) -> None:
        begun.append(stage)
        time.sleep(0.01)
        stopped.append(time.monotonic())

    def trace(*_: object) -> None:
        while not begun:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_compiler, "capture_part", trace)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, output, events=BuildEvents(weights=weights))
    ended = time.monotonic()
    assert list(output.parent.iterdir()) == []
    assert set(begun) <= {"dit", "modulation"}  # the two with conversions come first; no third stage was begun
    time.sleep(0.05)
    assert max(stopped) <= ended


def test_a_failure_in_the_weights_thread_ends_the_build(
    tiny_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Exception): ...

    def weights(stage: str, done: int, total: int) -> None:
        raise Broken

    with pytest.raises(Broken):
        build(tiny_checkpoint, output, "clip", events=BuildEvents(weights=weights))
    assert list(output.parent.iterdir()) == []


# Another process, stopped at different moments of the build. It takes its traces from the session's memory and waits at
# a given call, so that the moment is certain.

CHILD = """
import sys, time
from pathlib import Path
from reelforge.export import stage_compiler
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.tools.build_engine import main
from tests.bundles import TraceMemory

memory, moment, *arguments = sys.argv[1:]
owner, name = {"capture": (stage_compiler, "capture_part"), "graph": (stage_compiler, "graph_bytes"),
               "seal": (BundleWriter, "seal")}[moment]

def wait(*_):
    print("waiting", flush=True)
    time.sleep(600)

with TraceMemory(Path(memory)).used():
    setattr(owner, name, wait)
    main(arguments)
"""


def start(memory: TraceMemory, moment: str, checkpoint: Path, output: Path) -> subprocess.Popen[str]:
    """Start a build of one stage that waits at ``moment``."""
    arguments = [str(memory.folder), moment, str(checkpoint), "-o", str(output), "--stages", "modulation", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["capture", "seal"])
def test_kill_9(tiny_checkpoint: Path, trace_memory: TraceMemory, output: Path, moment: str) -> None:
    """The bundle does not exist; what the process left is removed by the next build, which succeeds."""
    process = start(trace_memory, moment, tiny_checkpoint, output)
    process.kill()
    process.communicate(timeout=60)
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == [f"b.partial-{process.pid}"]
    if moment == "seal":
        left = {path.name for path in (output.parent / f"b.partial-{process.pid}").iterdir()}
        assert {"modulation.onnx", "weights", "tokenizers"} <= left
    build(tiny_checkpoint, output, "modulation")
    assert [path.name for path in output.parent.iterdir()] == ["b"]
    Bundle.open(output)


@pytest.mark.slow
def test_sigint(tiny_checkpoint: Path, trace_memory: TraceMemory, output: Path) -> None:
    process = start(trace_memory, "graph", tiny_checkpoint, output)
    assert [path.name for path in output.parent.iterdir()] == [f"b.partial-{process.pid}"]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; nothing was written."
    assert out == ""
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
def test_two_builds_to_one_destination(tiny_checkpoint: Path, trace_memory: TraceMemory, output: Path) -> None:
    """A live build's folder is left alone; who seals first has the name."""
    process = start(trace_memory, "seal", tiny_checkpoint, output)
    try:
        build(tiny_checkpoint, output, "modulation")
        assert sorted(path.name for path in output.parent.iterdir()) == ["b", f"b.partial-{process.pid}"]
    finally:
        process.kill()
        process.communicate(timeout=60)
    Bundle.open(output)
