"""Calibrations that are interrupted or killed and continued: the same bytes as without, and nothing done twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import INT8
from reelforge.calibration.scale_file import write_scale_file
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export.calibrate import CalibrationOptions, calibrate
from reelforge.export.lockstep import OnProgress
from reelforge.runtime.bundle.open import Bundle, Check
from tests.calibrations import attention_of, formats_of, groups_of, options

Call = tuple[str, int, int]

SCRIPT = """
import os, sys, time
from pathlib import Path
from reelforge.runtime.bundle.open import Bundle, Check
from tests.export.test_calibrate_interrupted import chosen, write

def wait(stage, done, total):
    if [stage, str(done)] == sys.argv[3:]:
        print("here", flush=True)
        time.sleep(600)

write(Bundle.open(sys.argv[1], Check.SIZES), chosen(Path(sys.argv[2])), Path(sys.argv[2]) / "never", wait)
"""


def chosen(state: Path | None) -> CalibrationOptions:
    """Two passes: the method needs histograms of the smoothed tensors."""
    return options(smoothing=0.5, method=ScaleMethod.PERCENTILE, state=state)


def write(bundle: Bundle, settings: CalibrationOptions, path: Path, on_progress: OnProgress) -> bytes:
    formats = formats_of(bundle, dit=INT8, llm=INT8, vae_decoder=INT8)
    result = calibrate(bundle, formats, groups_of(bundle), settings, on_progress, attention_of(bundle))
    write_scale_file(path, *result)
    return path.read_bytes()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, Check.SIZES)


@pytest.fixture(scope="module")
def whole(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Call]]:
    """The result without an interruption, and every report of progress."""
    calls: list[Call] = []
    folder = tmp_path_factory.mktemp("whole")
    return write(bundle, chosen(None), folder / "scales", lambda *call: calls.append(call)), calls


def stop_at(place: tuple[str, int], calls: list[Call]) -> OnProgress:
    def report(*call: str | int) -> None:
        calls.append(call)  # type: ignore[arg-type]
        if call[:2] == place:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(
    "place",
    [("llm", 1), ("modulation", 2), ("dit", 4), ("vae_decoder", 1), ("llm (smoothed)", 1), ("dit (smoothed)", 5)],
)
def test_an_interrupted_calibration_continues(
    bundle: Bundle, whole: tuple[bytes, list[Call]], tmp_path: Path, place: tuple[str, int]
) -> None:
    expected, all_calls = whole
    first, rest = [], []  # type: ignore[var-annotated]
    with pytest.raises(KeyboardInterrupt):
        write(bundle, chosen(tmp_path / "state"), tmp_path / "scales", stop_at(place, first))
    assert not (tmp_path / "scales").exists()
    assert write(bundle, chosen(tmp_path / "state"), tmp_path / "scales", lambda *call: rest.append(call)) == expected
    # What is repeated belongs to the unit that was not finished: the text, one step, or the decoding.
    again = [call for call in rest if call in first]
    assert len({call[0] for call in again} - {"clip", "refiner", "modulation"}) <= 1
    assert len([call for call in again if call[0].startswith("dit")]) <= 2
    assert [call for call in all_calls if call in first or call in rest] == all_calls


def test_several_interruptions(bundle: Bundle, whole: tuple[bytes, list[Call]], tmp_path: Path) -> None:
    for place in (("dit", 3), ("vae_decoder", 1), ("dit (smoothed)", 3)):
        with pytest.raises(KeyboardInterrupt):
            write(bundle, chosen(tmp_path / "state"), tmp_path / "scales", stop_at(place, []))
    calls: list[Call] = []
    assert write(bundle, chosen(tmp_path / "state"), tmp_path / "scales", lambda *c: calls.append(c)) == whole[0]
    assert calls[0] == ("dit (smoothed)", 3, 6)


def test_a_killed_calibration_continues(bundle: Bundle, whole: tuple[bytes, list[Call]], tmp_path: Path) -> None:
    place = ("dit", "3")
    state = tmp_path / "state"
    command = [sys.executable, "-c", SCRIPT, str(bundle.path), str(state), *place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    calls: list[Call] = []
    assert write(bundle, chosen(state), tmp_path / "scales", lambda *call: calls.append(call)) == whole[0]
    assert calls[0][0] == place[0]  # what was finished before is not repeated


def test_a_finished_state_serves_other_methods(bundle: Bundle, tmp_path: Path) -> None:
    settings = chosen(tmp_path / "state")
    first = write(bundle, settings, tmp_path / "a", lambda *_: None)
    calls: list[Call] = []
    again = write(bundle, settings, tmp_path / "b", lambda *call: calls.append(call))
    other = write(bundle, replace(settings, method=ScaleMethod.MSE), tmp_path / "c", lambda *call: calls.append(call))
    assert first == again != other
    assert calls == []


def test_max_stops_after_the_first_pass_and_another_method_adds_the_second(
    bundle: Bundle, whole: tuple[bytes, list[Call]], tmp_path: Path
) -> None:
    settings = chosen(tmp_path / "state")
    calls: list[Call] = []
    write(bundle, replace(settings, method=ScaleMethod.MAX), tmp_path / "a", lambda *_: None)
    assert write(bundle, settings, tmp_path / "b", lambda *call: calls.append(call)) == whole[0]
    assert {call[0] for call in calls} == {"llm (smoothed)", "dit (smoothed)"}


def test_the_state_of_other_settings_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    settings = chosen(tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        write(bundle, settings, tmp_path / "scales", stop_at(("llm", 1), []))
    changes = ({"seed": 12}, {"steps": 2}, {"smoothing": 0.25}, {"prompts": ("a cat", "a dog")})
    for change in changes:
        with pytest.raises(CalibrationError, match="belongs to another calibration") as caught:
            write(bundle, replace(settings, **change), tmp_path / "scales", lambda *_: None)  # type: ignore[arg-type]
        assert f"another {next(iter(change))}" in str(caught.value)


def test_without_a_folder_nothing_is_left(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        write(bundle, chosen(None), tmp_path / "scales", stop_at(("dit", 3), []))
    assert list(tmp_path.iterdir()) == []
