"""Quantises one stored weight as a stream: pieces of its bytes in, pieces of 8-bit codes out, read once.

Pieces are cut again to whole rows (output channels), and each row goes through folding, its largest magnitude, its
scale, division, rounding and saturation while it lies in the cache, so memory does not depend on the weight's size. The
codes and scales are those of ``quantise(weight, weight_scales(weight))``, bit for bit.

The module does not know where bytes come from or go to, nor how the factors to fold were chosen, nor which library
casts (``casts``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration import cast_numpy
from reelforge.calibration.casts import Casts
from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import NumberFormat
from reelforge.calibration.scale_methods import scales_of_maxima
from reelforge.calibration.weight_maxima import STORED

BLOCK_ELEMENTS = 1 << 19
"""Elements that are worked on at a time, 2 MB in fp32: with much larger ones the caches are of no use, and with much
smaller ones threads spend their time handing the interpreter's lock to each other."""

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {2: np.int16, 4: np.int32}


@dataclass(frozen=True, eq=False)
class WeightQuantisation:
    """How one weight ``[rows, C, ...]`` is quantised; the folds come before the scales are chosen, columns first.

    Attributes:
        number_format: Of the codes.
        column_factors: fp32 ``[C]``: input channel ``j`` is multiplied by ``column_factors[j]``, as
            ``smoothing.fold_into_weight`` does. None for none.
        row_divisors: fp32 ``[rows]``: output channel ``i`` is divided by ``row_divisors[i]``, as
            ``smoothing.fold_into_affine`` does. None for none.
    """

    number_format: NumberFormat
    column_factors: NDArray[np.float32] | None = None
    row_divisors: NDArray[np.float32] | None = None


def quantised_pieces(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    pieces: Iterable[NDArray[np.uint8]],
    how: WeightQuantisation,
    scales: NDArray[np.float32],
    casts: Casts = cast_numpy,
) -> Iterator[NDArray[np.uint8]]:
    """Return the stream of a weight's codes, and fill in its scales on the way.

    Args:
        name: For messages.
        dtype: The stored type as safetensors names it: BF16, F16 or F32.
        shape: ``[rows, C, ...]``, at least two dimensions; rows are output channels.
        pieces: The weight's bytes in order, cut anywhere; each must stay valid until the next one is asked for.
        how: Format and folds.
        scales: fp32 ``[rows]``, contiguous; each row's scale is there once the row's codes have been yielded.
        casts: How numbers are cast; see :func:`reelforge.calibration.casts.choose_casts`.

    Returns:
        Bytes of the codes in order, each piece valid until the next one is asked for.

    Raises:
        CalibrationError: If the stored type is another one; on iterating, if the weight holds NaN or infinities.
        ValueError: If shapes do not fit, or factors are not positive and finite; on iterating, if the stream is cut
            short or too long.
    """
    if dtype not in STORED:
        raise CalibrationError(
            f"the weight {name!r} cannot be quantised.",
            received=f"values of type {dtype}",
            expected=" or ".join(sorted(STORED)),
            fix="use a checkpoint that is not quantised already, or keep the stage in high precision",
        )
    if len(shape) < 2:
        raise ValueError(f"the weight {name!r} has shape {list(shape)}, two dimensions are needed")
    if scales.shape != shape[:1] or scales.dtype != np.float32 or not scales.flags.c_contiguous:
        raise ValueError(f"scales of {name!r} must be contiguous fp32 {[shape[0]]}")
    _check_factors(name, "column factors", how.column_factors, shape[1])
    _check_factors(name, "row divisors", how.row_divisors, shape[0])
    return _quantised(name, STORED[dtype], (shape[0], math.prod(shape[1:])), pieces, how, scales, casts)


def _check_factors(name: str, what: str, factors: NDArray[np.float32] | None, length: int) -> None:
    if factors is None:
        return
    if factors.shape != (length,) or factors.dtype != np.float32:
        raise ValueError(
            f"{what} of {name!r} have shape {list(factors.shape)} {factors.dtype}, expected fp32 {[length]}"
        )
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError(f"{what} of {name!r} are not all positive and finite")


def _quantised(
    name: str,
    stored: np.dtype[Any],
    shape: tuple[int, int],
    pieces: Iterable[NDArray[np.uint8]],
    how: WeightQuantisation,
    scales: NDArray[np.float32],
    casts: Casts,
) -> Iterator[NDArray[np.uint8]]:
    rows, columns = shape
    scales.fill(1)  # stays where there are no columns
    if rows == 0 or columns == 0:
        return
    row_bytes = columns * stored.itemsize
    scratch = np.empty((min(max(1, BLOCK_ELEMENTS // columns), rows), columns), np.float32)
    by_column, by_row = _column_multiplier(how, columns), how.row_divisors
    buffer = np.empty(0, np.uint8)
    row = 0
    for part in _whole_rows(pieces, row_bytes):
        count = len(part) // row_bytes
        if row + count > rows:
            raise ValueError(f"the stream of {name!r} is longer than {rows} rows")
        if part.ctypes.data % stored.itemsize:
            part = part.copy()
        if len(buffer) < count * columns:
            buffer = np.empty(count * columns, np.uint8)
        values = part.view(stored).reshape(count, columns)
        codes = buffer[: count * columns].reshape(count, columns)
        if by_column is None and by_row is None:  # in one go, and over half as many bytes as in fp32
            _choose_scales(name, values, row, how, scales)
        for first in range(0, count, len(scratch)):
            block = values[first : first + len(scratch)]
            start, stop = row + first, row + first + len(block)
            numbers = scratch[: len(block)]
            casts.widen(block, numbers)
            if by_column is not None or by_row is not None:
                with np.errstate(over="ignore", invalid="ignore"):  # named below
                    if by_column is not None:
                        np.multiply(numbers, by_column, out=numbers)
                    if by_row is not None:
                        np.divide(numbers, by_row[start:stop, None], out=numbers)
                _choose_scales(name, numbers, start, how, scales)
            np.divide(numbers, scales[start:stop, None], out=numbers)
            # Nothing to saturate: the scale's own rounding lifts a quotient above the largest value by one unit in the
            # last place at most, which the cast rounds off.
            casts.narrow(numbers, how.number_format, codes[first : first + len(block)])
        row += count
        yield buffer[: count * columns]
    if row != rows:
        raise ValueError(f"the stream of {name!r} ended after {row} of {rows} rows")


def _choose_scales(
    name: str, values: NDArray[Any], first: int, how: WeightQuantisation, scales: NDArray[np.float32]
) -> None:
    """Fill in the scales of the rows from ``first`` on, which hold ``values``."""
    maxima = _row_maxima(values)
    finite = np.isfinite(maxima)
    if not finite.all():
        folded = how.column_factors is not None or how.row_divisors is not None
        raise CalibrationError(
            f"the weight {name!r} holds values that are not finite{' once smoothing is folded in' * folded}.",
            received=f"NaN or infinity in output channel {first + int(np.argmin(finite))}",
            expected="finite values",
            fix="restore the checkpoint's file; if it is as published, keep this layer in high precision",
        )
    scales[first : first + len(maxima)] = scales_of_maxima(maxima, how.number_format)


def _row_maxima(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return the largest magnitude of each row, fp32; not finite if the row holds NaN or infinities.

    Compares bit patterns: magnitudes of one sign are ordered as the integers that hold them, NaN above infinity.
    """
    size = values.dtype.itemsize
    words = values.view(_SIGNED[size])
    positive = np.maximum(words.max(axis=1), 0).view(_UNSIGNED[size])
    # As unsigned numbers all negative values come after the positive ones; if there are none this is `positive` again.
    other = words.view(_UNSIGNED[size]).max(axis=1) & np.iinfo(_SIGNED[size]).max
    largest = np.maximum(positive, other).astype(_UNSIGNED[size])
    return np.asarray(largest.view(values.dtype).astype(np.float32))


def _column_multiplier(how: WeightQuantisation, columns: int) -> NDArray[np.float32] | None:
    """Return a factor per element of a row: an input channel of a convolution has several."""
    if how.column_factors is None:
        return None
    return np.repeat(how.column_factors, columns // len(how.column_factors))


def _whole_rows(pieces: Iterable[NDArray[np.uint8]], row_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the same bytes in runs of whole rows; only a row that is split between pieces is copied."""
    split = np.empty(row_bytes, np.uint8)
    filled = 0
    for piece in pieces:
        start = 0
        if filled:
            start = min(row_bytes - filled, len(piece))
            split[filled : filled + start] = piece[:start]
            filled += start
            if filled < row_bytes:
                continue
            yield split
        stop = start + (len(piece) - start) // row_bytes * row_bytes
        if stop > start:
            yield piece[start:stop]
        filled = len(piece) - stop
        split[:filled] = piece[stop:]
    if filled:
        raise ValueError(f"the stream ended {filled} bytes into a row of {row_bytes}")
