"""The largest magnitude per input channel of a stored weight, read in pieces: the weights' half of smoothing factors.

The module knows a bundle's weight entries; it does not know which layers share an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.smoothing import input_channel_maxima
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import WeightEntry

STORED: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
)

_PIECE_BYTES = 1 << 24


def stored_channel_maxima(folder: Path, entry: WeightEntry) -> NDArray[np.float32]:
    """Return the maxima, fp32 ``[C]``, of a weight ``[rows, C, ...]`` in a bundle.

    Args:
        folder: The bundle's.
        entry: Where the weight lies.

    Raises:
        CalibrationError: If it is stored in another type than fp32, fp16 or bf16, or is not finite.
        BundleError: If its file cannot be read or is too short.
    """
    if entry.dtype not in STORED:
        raise CalibrationError(
            f"the weight {entry.name!r} cannot be smoothed as it is stored.",
            received=entry.dtype,
            expected=", ".join(STORED),
            fix="calibrate the bundle in fp32 or fp16, not one that is quantised already",
        )
    dtype, (rows, channels, *kernel) = STORED[entry.dtype], entry.shape
    row_bytes = entry.length // rows
    step = max(1, _PIECE_BYTES // row_bytes)
    maxima = np.zeros(channels, np.float32)
    try:
        with (folder / entry.file).open("rb") as file:
            file.seek(entry.offset)
            for start in range(0, rows, step):
                data = file.read(min(step, rows - start) * row_bytes)
                piece = np.frombuffer(data, dtype).reshape(-1, channels, int(np.prod(kernel, dtype=np.int64)))
                np.maximum(maxima, input_channel_maxima(*piece.transpose(2, 0, 1)), out=maxima)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"the weight {entry.name!r} cannot be read from {entry.file!r}: {error}.",
            expected=f"{entry.length} bytes from {entry.offset}",
            fix="copy the bundle again, or rebuild it with build-engine",
        ) from error
    if not np.isfinite(maxima).all():
        nan, infinite = int(np.isnan(maxima).sum()), int(np.isinf(maxima).sum())
        raise NonFiniteError(nan, infinite, channels, f"the weight {entry.name!r} (by input channel)")
    return maxima
