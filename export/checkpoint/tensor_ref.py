"""TensorRef: where the bytes of one stored tensor lie, and how to read them in pieces.

A reference is (file, offset, dtype, shape); nothing here reads a byte before it is asked to. The module knows no file
format and no model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Names of the safetensors format, and the little-endian numpy types they stand for."""

PIECE_BYTES = 4 << 20
"""Tensors are read in pieces of this size: small enough to stay near a core, large enough to amortise the calls."""

DROP_BEHIND_BYTES = 8 << 20
"""Tensors from this size on leave no pages behind in the cache: a build reads each once, and 40 GB of pages read once
would push out everything else (on a virtual machine, first-touched pages also cost several times the read itself)."""


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor with the safetensors type ``dtype``."""
    return math.prod(shape) * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor, contiguous and little-endian, as a range of a file.

    Attributes:
        name: The tensor's name in the checkpoint, as stored.
        path: The file that holds it.
        offset: First byte, counted from the beginning of the file.
        dtype: The safetensors name: ``"BF16"``, ``"F32"``, ...
        shape: Its shape, slowest dimension first.
    """

    name: str
    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of the range in bytes."""
        return nbytes_of(self.dtype, self.shape)

    def pieces(self, limit: int = PIECE_BYTES) -> Iterator[NDArray[np.uint8]]:
        """Yield the tensor's bytes in order, at most ``limit`` at a time; each piece is valid until the next one.

        Reads instead of mapping, so that a file cut short meanwhile is an error and not a SIGBUS.

        Raises:
            CheckpointError: If the file ends before the tensor does.
        """
        left = self.nbytes
        buffer = np.empty(min(limit, left), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            position = 0
            while left:
                piece = buffer[: min(limit, left)]
                self.read_into(file.fileno(), piece, position)
                yield piece
                position += len(piece)
                left -= len(piece)

    def read_into(self, descriptor: int, buffer: NDArray[np.uint8], position: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``position``; ``descriptor`` is its file, open for reading.

        Raises:
            CheckpointError: If the file ends before the buffer is full.
        """
        filled = 0
        while filled < len(buffer):
            received = os.preadv(descriptor, [buffer[filled:].data], self.offset + position + filled)
            if received == 0:
                raise CheckpointError(
                    f"{self.path} ends in the middle of tensor {self.name!r}.",
                    received=f"{self.offset + position + filled} bytes",
                    expected=f"at least {self.offset + self.nbytes} bytes",
                    fix="the file changed after it was opened; restore it and start again",
                )
            filled += received
        if self.nbytes >= DROP_BEHIND_BYTES:
            os.posix_fadvise(descriptor, self.offset + position, len(buffer), os.POSIX_FADV_DONTNEED)


def mapped(ref: TensorRef) -> NDArray[Any]:
    """Return the tensor as a read-only memory-mapped array of its own type (``ml_dtypes`` for BF16 and FP8)."""
    if ref.nbytes == 0:
        return np.empty(ref.shape, DTYPES[ref.dtype])
    data = np.memmap(ref.path, np.uint8, "r", ref.offset, (ref.nbytes,))
    return data.view(DTYPES[ref.dtype]).reshape(ref.shape)
