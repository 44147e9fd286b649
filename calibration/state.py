"""What a calibration has done so far, in a folder: a calibration that was interrupted continues there.

``identity.json`` says which calibration it is, ``progress.npz`` holds statistics and latents after the last finished
unit of work, ``inputs/`` what ``dit`` is told about each prompt, which would otherwise fill the memory. Every file is
written aside and renamed, so that whatever ends the process leaves the previous one. The module knows names and arrays,
not what they mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError

_IDENTITY, _PROGRESS, _INPUTS, _LOCK = "identity.json", "progress.npz", "inputs", "lock"
_DONE = "done"


class CalibrationState:
    """The folder of one calibration, held for this process until :meth:`close`.

    Args:
        folder: It is created; if it holds the state of the same calibration, that is continued.
        identity: Everything that the observations depend on, as JSON types.
        temporary: Nobody will continue from the folder: progress is not saved, and nothing waits for the disk.

    Raises:
        CalibrationError: If the folder holds another calibration's state or other files, is in use by another process,
            or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], temporary: bool = False) -> None:
        self.folder = folder
        self.temporary = temporary
        self._identity = json.loads(json.dumps(identity))
        try:
            (folder / _INPUTS).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _LOCK).open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._hold()
            self._check_identity()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def save(self, done: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Note that ``done`` units of work are finished, and what they gave; nothing if the folder is temporary.

        Raises:
            CalibrationError: If it cannot be written.
        """
        if self.temporary:
            return
        content: dict[str, Any] = {_DONE: np.array(done), **arrays}
        self._write(_PROGRESS, lambda file: np.savez(file, **content))

    def load(self) -> tuple[int, dict[str, NDArray[Any]]]:
        """Return what was saved last: units done and arrays; 0 and nothing in a new folder.

        Raises:
            CalibrationError: If the file is damaged.
        """
        path = self.folder / _PROGRESS
        if not path.exists():
            return 0, {}
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            return int(arrays.pop(_DONE)), arrays
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(path, error) from error

    def save_inputs(self, prompt: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays of one prompt.

        Raises:
            CalibrationError: If they cannot be written.
        """
        for name, array in arrays.items():

            def write(file: IO[bytes], array: NDArray[Any] = array) -> None:
                np.save(file, array, allow_pickle=False)

            self._write(f"{_INPUTS}/{prompt}.{name}.npy", write)

    def load_inputs(self, prompt: int, name: str) -> NDArray[Any]:
        """Return an array of a prompt, mapped and not read.

        Raises:
            CalibrationError: If it is missing or damaged.
        """
        path = self.folder / _INPUTS / f"{prompt}.{name}.npy"
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(path, error) from error
        return array

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CalibrationError(
                f"the calibration state {self.folder} is in use by another process.",
                expected="one calibration at a time in a folder",
                fix="wait for it, or choose another folder",
            ) from error

    def _check_identity(self) -> None:
        path = self.folder / _IDENTITY
        if not path.exists():
            others = sorted(item.name for item in self.folder.iterdir() if item.name not in (_INPUTS, _LOCK))
            if any(not name.startswith(".") for name in others):
                raise CalibrationError(
                    f"the folder {self.folder} holds other files than a calibration's state.",
                    received=", ".join(others[:5]),
                    expected="a new folder, or one that an earlier calibration left",
                    fix="choose another folder",
                )
            text = json.dumps(self._identity, sort_keys=True, indent=1)
            self._write(_IDENTITY, lambda file: file.write(text.encode()))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(k for k in {*found, *self._identity} if found.get(k) != self._identity.get(k))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(path, error) from error
        if different:
            raise CalibrationError(
                f"the calibration state {self.folder} belongs to another calibration.",
                received="another " + ", ".join(different),
                expected="the state of this checkpoint, these prompts and these settings",
                fix=f"repeat the settings that it was made with, or remove {self.folder} or choose another folder",
            )

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.folder / name
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                write(file)
                if not self.temporary:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CalibrationError:
        return CalibrationError(
            f"the calibration state {self.folder} cannot be written: {error.strerror or error}.",
            expected="a folder that this user may write, with room for the statistics",
            fix="free some space or choose another folder; what was saved before is kept",
        )

    def _damaged(self, path: Path, error: Exception) -> CalibrationError:
        return CalibrationError(
            f"the calibration state {path} is damaged.",
            received=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="the file as a calibration wrote it",
            fix=f"remove the folder {self.folder} and calibrate again",
        )
