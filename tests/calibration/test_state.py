"""The saved state of a calibration: what comes back, whose it is, and what is left when writing fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration import state as state_module
from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.state import CalibrationState

IDENTITY = {"bundle": "abc", "steps": 3, "versions": {"numpy": "2"}}
ARRAYS = {"0:dit.double.0.image.q.activation/histogram": np.arange(5), "latents": np.ones((2, 3), np.float32)}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[CalibrationState]:
    state = CalibrationState(tmp_path / "state", IDENTITY)
    yield state
    state.close()


def test_a_new_folder_is_empty_and_a_used_one_continues(state: CalibrationState) -> None:
    assert state.load() == (0, {})
    state.save(4, ARRAYS)
    state.save_inputs(1, {"text": np.arange(6.0).reshape(2, 3)})
    state.close()
    again = CalibrationState(state.folder, dict(reversed(IDENTITY.items())))
    done, arrays = again.load()
    assert done == 4
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
    text = again.load_inputs(1, "text")
    assert isinstance(text, np.memmap)
    np.testing.assert_array_equal(text, np.arange(6.0).reshape(2, 3))
    again.close()


@pytest.mark.parametrize(
    "change", [{"bundle": "def"}, {"steps": 4}, {"versions": {"numpy": "3"}}, {"more": None, "x": 1}]
)
def test_the_state_of_another_calibration_is_refused(state: CalibrationState, change: dict[str, object]) -> None:
    state.save(1, ARRAYS)
    state.close()
    with pytest.raises(CalibrationError, match="belongs to another calibration") as caught:
        CalibrationState(state.folder, {**IDENTITY, **change})
    assert f"received: another {'x' if 'x' in change else next(iter(change))}" in str(caught.value)
    assert "or remove" in str(caught.value)
    CalibrationState(state.folder, IDENTITY).close()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(CalibrationError, match="holds other files") as caught:
        CalibrationState(tmp_path, IDENTITY)
    assert "received: holiday.jpg" in str(caught.value)


def test_a_folder_in_use_is_refused(state: CalibrationState) -> None:
    code = (
        "import sys; from pathlib import Path; from reelforge.calibration.state import CalibrationState\n"
        "CalibrationState(Path(sys.argv[1]), {})"
    )
    result = subprocess.run([sys.executable, "-c", code, state.folder], capture_output=True, text=True, check=False)
    assert "is in use by another process" in result.stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match="cannot be written: "):
        CalibrationState(tmp_path / "file" / "state", IDENTITY)


def test_a_full_disk_keeps_what_was_saved(state: CalibrationState, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(1, ARRAYS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_module.os, "fsync", full)
    with pytest.raises(CalibrationError, match="cannot be written: No space left on device"):
        state.save(2, ARRAYS)
    with pytest.raises(CalibrationError, match="No space left"):
        state.save_inputs(0, {"text": np.ones(3)})
    assert state.load()[0] == 1
    assert not [path for path in state.folder.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("length", [0, 10, 300])
def test_damaged_files_are_named(state: CalibrationState, length: int) -> None:
    state.save(1, ARRAYS)
    state.save_inputs(0, {"text": np.ones(99)})
    for path in (state.folder / "progress.npz", state.folder / "inputs" / "0.text.npy"):
        path.write_bytes(path.read_bytes()[:length])
    for load in (state.load, lambda: state.load_inputs(0, "text")):
        with pytest.raises(CalibrationError, match="is damaged") as caught:
            load()
        assert f"remove the folder {state.folder}" in str(caught.value)
    with pytest.raises(CalibrationError, match="is damaged"):
        state.load_inputs(5, "text")
    state.close()
    (state.folder / "identity.json").write_text("{")
    with pytest.raises(CalibrationError, match="is damaged"):
        CalibrationState(state.folder, IDENTITY)


def test_a_temporary_state_keeps_inputs_and_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("waits for the disk"))
    with closing(CalibrationState(tmp_path, IDENTITY, temporary=True)) as state:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        state.save(3, {"a": array})
        state.save_inputs(1, {"text": array})
        assert state.load() == (0, {})
        np.testing.assert_array_equal(state.load_inputs(1, "text"), array)
