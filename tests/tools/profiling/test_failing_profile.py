"""An engine that fails in the middle of `reelforge profile`: what was measured before is kept, and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reelforge.runtime.errors import EngineError
from reelforge.tools import console
from reelforge.tools.profile import profile
from reelforge.tools.profiling import layers_onnxruntime, session
from reelforge.tools.profiling.files import read_profile

OPTIONS = (
    "--height=32",
    "--width=48",
    "--frames=5",
    "--steps=2",
    "--threads=1",
    "--no-cold",
    "--no-peak",
    "--repeats=4",
)


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the run of that number fail, counted from 1."""
    measure, calls = session.measure_run, []

    def run(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            raise EngineError("stage 'dit' failed in ONNX Runtime.", fix="look at it")
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "measure_run", run)


def run(bundle: Path, folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as caught:
        console.run(profile, [os.fspath(bundle), "-o", os.fspath(folder), *OPTIONS, *options])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_runs_before_the_failure_are_kept(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_at(monkeypatch, 4)  # the third warm run after one of warm-up
    assert run(fake_bundle, tmp_path / "out") == EngineError.exit_code
    output, errors = capsys.readouterr()
    assert "failed; the files hold what was measured until then, and say so." in errors
    assert "stage 'dit' failed in ONNX Runtime." in errors
    assert "fix: look at it" in errors
    assert "Traceback" not in errors
    assert "incomplete" in output
    found = read_profile(tmp_path / "out" / "profile.json")
    assert not found.complete
    assert found.warm is not None
    assert (found.warm.runs, len(found.runs)) == (2, 3)
    assert found.missing == (
        "warm run 3 of 4 (stage 'dit' failed in ONNX Runtime)",
        "warm run 4 of 4",
        "the layers",
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "This profile is incomplete: it ended before all was measured. Missing: warm run 3 of 4 (stage " in page


def test_runs_are_kept_when_the_layers_fail(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EngineError("there is no profiler.")

    monkeypatch.setattr(layers_onnxruntime, "profile_stage", fail)
    assert run(fake_bundle, tmp_path / "out") == EngineError.exit_code
    found = read_profile(tmp_path / "out" / "profile.json")
    assert found.warm is not None
    assert (found.warm.runs, found.missing) == (4, ("the layers (there is no profiler)",))


def test_a_failure_of_the_first_run_writes_nothing(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_at(monkeypatch, 1)
    assert run(fake_bundle, tmp_path / "out") == EngineError.exit_code
    assert "stage 'dit' failed" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
