"""FoldedWeight: a stored parameter whose rows and columns are scaled and shifted while it is read.

Smoothing divides what feeds a layer by constants; where that is a norm or a linear, the constants go into its weight
and bias. The result is wider than a bf16 source, since a rounded quotient would not be undone by the layer behind it.
The module does not know why rows change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError
from reelforge.export.checkpoint.sources import Resolved
from reelforge.export.checkpoint.tensor_ref import DTYPES, PIECE_BYTES, nbytes_of
from reelforge.export.quantisation import RowAffine

_LARGEST_FP16 = 65504.0


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """``source[row] * columns * multiplier[row] + offset[row]``, computed in fp64 and rounded once."""

    source: Resolved
    affine: RowAffine

    @property
    def dtype(self) -> str:
        """fp32 for an fp32 source, else fp16: as large as bf16 and eight times finer where weights lie."""
        return "F32" if self.source.dtype == "F32" else "F16"

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Length of the result in bytes."""
        return nbytes_of(self.dtype, self.shape)

    def pieces(self, limit: int = PIECE_BYTES) -> Iterator[NDArray[np.uint8]]:
        """Yield the result's bytes in order; each piece is the caller's."""
        width = max(1, int(np.prod(self.shape[1:], dtype=np.int64)))
        position = 0
        for piece in self.source.pieces(limit):
            values = piece.view(DTYPES[self.source.dtype]).astype(np.float64)
            if self.affine.columns is not None:
                values *= np.resize(np.roll(self.affine.columns, -(position % width)), len(values))
            first, last = position // width, (position + len(values) - 1) // width
            counts = np.full(last - first + 1, width)
            counts[-1] -= (last + 1) * width - (position + len(values))
            counts[0] -= position - first * width
            values *= np.repeat(self.affine.multiplier[first : last + 1], counts)
            values += np.repeat(self.affine.offset[first : last + 1], counts)
            position += len(values)
            self._require_range(values)
            yield values.astype(DTYPES[self.dtype]).view(np.uint8)

    def _require_range(self, values: NDArray[np.float64]) -> None:
        if self.dtype != "F16" or not values.size:
            return
        largest = float(np.nanmax(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values))))
        if largest > _LARGEST_FP16:
            raise CalibrationError(
                "a parameter that takes in a smoothing does not fit fp16.",
                received=f"{largest:.3g}",
                expected=f"at most {_LARGEST_FP16:g} in magnitude",
                fix="build without smoothing, or from an fp32 checkpoint",
            )
