"""Quantises one stored weight as a stream: pieces of its bytes in, pieces of 8-bit codes out, read once.

Pieces are cut again to whole rows (output channels), and each row goes through folding, its largest magnitude, its
scale, division, rounding and saturation while it lies in the cache, so memory does not depend on the weight's size. The
codes and scales are those of ``quantise(weight, weight_scales(weight))``, bit for bit.

Why PyTorch: its cast to FP8 is vectorised, unlike that of ``ml_dtypes``, and takes fewer passes than integer
arithmetic in NumPy. It equals ``ml_dtypes`` for every fp32 number up to 448 in magnitude (compared exhaustively, in its
AVX-512, AVX2 and portable variants); beyond 464 it gives NaN, which no quotient here reaches.

The module does not know where bytes come from or go to, nor how the factors to fold were chosen.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat
from reelforge.calibration.scale_methods import scales_of_maxima

BLOCK_ELEMENTS = 1 << 19
"""Elements that are worked on at a time, 2 MB in fp32: with much larger ones the caches are of no use, and with much
smaller ones threads spend their time handing the interpreter's lock to each other."""

_STORED: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CODES: dict[NumberFormat, torch.dtype] = {INT8: torch.int8, FP8_E4M3: torch.float8_e4m3fn}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {2: np.int16, 4: np.int32}
_thread_count = threading.Lock()


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


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Keep PyTorch from splitting operations over threads of its own in threads that start inside the block.

    For callers that spread weights over threads themselves: both together would be several threads per core. The
    setting belongs to the process, hence only one such block runs at a time and the others wait.
    """
    with _thread_count:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def quantised_pieces(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    pieces: Iterable[NDArray[np.uint8]],
    how: WeightQuantisation,
    scales: NDArray[np.float32],
) -> Iterator[NDArray[np.uint8]]:
    """Return the stream of a weight's codes, and fill in its scales on the way.

    Args:
        name: For messages.
        dtype: The stored type as safetensors names it: BF16, F16 or F32.
        shape: ``[rows, C, ...]``, at least two dimensions; rows are output channels.
        pieces: The weight's bytes in order, cut anywhere; each must stay valid until the next one is asked for.
        how: Format and folds.
        scales: fp32 ``[rows]``, contiguous; each row's scale is there once the row's codes have been yielded.

    Returns:
        Bytes of the codes in order, each piece valid until the next one is asked for.

    Raises:
        CalibrationError: If the stored type is another one; on iterating, if the weight holds NaN or infinities.
        ValueError: If shapes do not fit, or factors are not positive and finite; on iterating, if the stream is cut
            short or too long.
    """
    if dtype not in _STORED:
        raise CalibrationError(
            f"the weight {name!r} cannot be quantised.",
            received=f"values of type {dtype}",
            expected=" or ".join(_STORED),
            fix="use a checkpoint that is not quantised already, or keep the stage in high precision",
        )
    if len(shape) < 2:
        raise ValueError(f"the weight {name!r} has shape {list(shape)}, two dimensions are needed")
    if scales.shape != shape[:1] or scales.dtype != np.float32 or not scales.flags.c_contiguous:
        raise ValueError(f"scales of {name!r} must be contiguous fp32 {[shape[0]]}")
    _check_factors(name, "column factors", how.column_factors, shape[1])
    _check_factors(name, "row divisors", how.row_divisors, shape[0])
    return _quantised(name, _STORED[dtype], (shape[0], math.prod(shape[1:])), pieces, how, scales)


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
    stored: torch.dtype,
    shape: tuple[int, int],
    pieces: Iterable[NDArray[np.uint8]],
    how: WeightQuantisation,
    scales: NDArray[np.float32],
) -> Iterator[NDArray[np.uint8]]:
    rows, columns = shape
    scales.fill(1)  # stays where there are no columns
    if rows == 0 or columns == 0:
        return
    row_bytes = columns * stored.itemsize
    scratch = torch.empty((min(max(1, BLOCK_ELEMENTS // columns), rows), columns), dtype=torch.float32)
    by_column = _column_multiplier(how, columns)
    by_row = None if how.row_divisors is None else torch.tensor(how.row_divisors)
    buffer = np.empty(0, np.uint8)
    row = 0
    for part in _whole_rows(pieces, row_bytes):
        count = len(part) // row_bytes
        if row + count > rows:
            raise ValueError(f"the stream of {name!r} is longer than {rows} rows")
        if part.ctypes.data % stored.itemsize or not part.flags.writeable:  # PyTorch wants neither
            part = part.copy()
        if len(buffer) < count * columns:
            buffer = np.empty(count * columns, np.uint8)
        values = torch.from_numpy(part).view(stored).view(count, columns)
        codes = torch.from_numpy(buffer[: count * columns]).view(_CODES[how.number_format]).view(count, columns)
        if by_column is None and by_row is None:  # in one go, and over half as many bytes as in fp32
            _choose_scales(name, values, row, how, scales)
        for first in range(0, count, len(scratch)):
            block = values[first : first + len(scratch)]
            start, stop = row + first, row + first + len(block)
            numbers = scratch[: len(block)]
            numbers.copy_(block)
            if by_column is not None:
                numbers.mul_(by_column)
            if by_row is not None:
                numbers.div_(by_row[start:stop, None])
            if by_column is not None or by_row is not None:
                _choose_scales(name, numbers, start, how, scales)
            numbers.div_(torch.from_numpy(scales[start:stop])[:, None])
            # Nothing to saturate: the scale's own rounding lifts a quotient above the largest value by one unit in the
            # last place at most, which the cast rounds off.
            if how.number_format.mantissa_bits is None:
                numbers.round_()  # half to even
            codes[first : first + len(block)].copy_(numbers)
        row += count
        yield buffer[: count * columns]
    if row != rows:
        raise ValueError(f"the stream of {name!r} ended after {row} of {rows} rows")


def _choose_scales(
    name: str, values: torch.Tensor, first: int, how: WeightQuantisation, scales: NDArray[np.float32]
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


def _row_maxima(values: torch.Tensor) -> NDArray[np.float32]:
    """Return the largest magnitude of each row, fp32; not finite if the row holds NaN or infinities.

    Compares bit patterns: magnitudes of one sign are ordered as the integers that hold them, NaN above infinity.
    """
    size = values.dtype.itemsize
    words = values.view({2: torch.int16, 4: torch.int32}[size]).numpy()
    positive = np.maximum(words.max(axis=1), 0).view(_UNSIGNED[size])
    # As unsigned numbers all negative values come after the positive ones; if there are none this is `positive` again.
    other = words.view(_UNSIGNED[size]).max(axis=1) & np.iinfo(_SIGNED[size]).max
    largest = np.maximum(positive, other).astype(_UNSIGNED[size]).view(_SIGNED[size])
    maxima: NDArray[np.float32] = torch.from_numpy(largest).view(values.dtype).float().numpy()
    return maxima


def _column_multiplier(how: WeightQuantisation, columns: int) -> torch.Tensor | None:
    """Return a factor per element of a row: an input channel of a convolution has several."""
    if how.column_factors is None:
        return None
    return torch.from_numpy(np.repeat(how.column_factors, columns // len(how.column_factors)))


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
