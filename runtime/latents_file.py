"""Latents on disk, so that a decoder or a step that fails does not cost the sampling before it.

The module knows neither what made them nor what decodes them.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import OutputError, RequestError


class UnsavedLatentsError(OutputError):
    """Final latents could not be written; they are not lost.

    Attributes:
        latents: What was sampled, ``[1, C, T, H, W]``, for ``Pipeline.decode``.
    """

    def __init__(self, error: OutputError, latents: NDArray[np.float32]) -> None:
        go_on = "the error has the latents: finish later with Pipeline.decode(error.latents)"
        super().__init__(error.where, received=error.received, expected=error.expected, fix=f"{error.fix}; {go_on}")
        self.latents = latents


def writable(path: str | Path | None) -> Path | None:
    """Return where latents are to be written, if that is possible as things stand: known before they are computed.

    None, for nowhere, always is.

    Raises:
        OutputError: If it is not.
    """
    if path is None:
        return None
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise _unwritable(path, error) from error


def write_final(path: Path, latents: NDArray[np.float32]) -> None:
    """Write what a whole sampling made.

    Raises:
        UnsavedLatentsError: If the file cannot be written, with the latents.
    """
    try:
        write_latents(path, latents)
    except OutputError as error:
        raise UnsavedLatentsError(error, latents) from error


def write_latents(path: Path, latents: NDArray[np.float32]) -> None:
    """Write latents as ``.npy``: complete, or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        try:
            with partial.open("wb") as file:
                np.save(file, latents, allow_pickle=False)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def read_latents(path: Path) -> NDArray[np.float32]:
    """Read an array from a ``.npy`` file; whether it is latents is for ``runtime.decode`` to say.

    Raises:
        RequestError: If it cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            values: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise RequestError(
            f"the latents {str(path)!r} cannot be read: {error.strerror or error}.", expected="a readable .npy file"
        ) from error
    except (ValueError, EOFError) as error:
        raise RequestError(
            f"the file {str(path)!r} holds no latents.",
            received=str(error).splitlines()[0][:200],
            expected="a .npy file of float32",
            fix="pass a file that generate --save-latents wrote",
        ) from error
    return values


def kind_of(values: object) -> str:
    """Return what a message says of something that should be latents: ``float32 [1, 16, 33, 90, 160]``."""
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the latents cannot be written to {str(path)!r}: {error.strerror or error}.",
        expected="a file in a folder that this user may write",
        fix="choose another path with --save-latents",
    )
