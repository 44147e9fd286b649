"""Latents on disk, so that a decoder or a step that fails does not cost the sampling before it.

The module knows neither what made them nor what decodes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import OutputError, RequestError


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
        raise OutputError(
            f"the latents cannot be written to {str(path)!r}: {error.strerror or error}.",
            expected="a file in a folder that this user may write",
            fix="choose another path with --save-latents",
        ) from error


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
