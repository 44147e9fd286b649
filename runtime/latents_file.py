"""Final latents on disk, so that a decoder that fails does not cost the sampling.

The module knows neither what made them nor what decodes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import OutputError


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
