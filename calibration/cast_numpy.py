"""Casts of weights with NumPy alone; ``casts`` says when they are used and what each function promises.

The cast of ``ml_dtypes`` to FP8 goes element by element and holds the interpreter's lock; here it is integer arithmetic
on whole arrays, five times as fast and equal to it for every fp32 number up to 464 in magnitude.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.number_formats import NumberFormat

_CHUNK_ELEMENTS = 1 << 16  # with both scratch arrays still in a core's own cache
_EXPONENT = np.int32(0xFF << 23)
_SMALLEST_NORMAL = np.int32((127 - 6) << 23)  # the bits of 2**-6, from which on steps of FP8 E4M3 grow
_TO_STEP = np.int32((23 - 3) << 23)  # times 2**20: from a power of two to the one whose last place is FP8's step there
_FIRST_CODE = np.int32((127 - 6 + 23 - 3) << 3)
_SIGN = np.int32(0x80)


def widen(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Copy fp32, fp16 or bf16 to ``out``."""
    np.copyto(out, stored)


def narrow(numbers: NDArray[np.float32], number_format: NumberFormat, out: NDArray[np.uint8]) -> None:
    """Write the codes of ``numbers``, which are overwritten, to ``out``."""
    if number_format.mantissa_bits is None:
        np.rint(numbers, out=numbers)  # half to even
        np.copyto(out.view(np.int8), numbers, casting="unsafe")
        return
    flat, codes = numbers.reshape(-1), out.reshape(-1)
    powers = np.empty(min(_CHUNK_ELEMENTS, len(flat)), np.int32)
    sums = np.empty_like(powers)
    for start in range(0, len(flat), _CHUNK_ELEMENTS):
        own = flat[start : start + _CHUNK_ELEMENTS]
        _narrow_to_e4m3(own, powers[: len(own)], sums[: len(own)], codes[start : start + len(own)])


def one_thread_per_operation() -> AbstractContextManager[None]:
    """Do nothing: NumPy's operations run on the thread that calls them."""
    return nullcontext()


def _narrow_to_e4m3(
    numbers: NDArray[np.float32], powers: NDArray[np.int32], sums: NDArray[np.int32], codes: NDArray[np.uint8]
) -> None:
    """Round in the adder: in ``|x| + p``, with ``p`` a power of two whose last place is FP8's step, nothing finer fits.

    The bits of the sum less those of ``p`` count steps, 8 to 16 of them above the smallest normal number. Together with
    the exponent that is the code, also where 16 steps carry into the next exponent.
    """
    bits = numbers.view(np.int32)
    np.bitwise_and(bits, _EXPONENT, out=powers)
    np.maximum(powers, _SMALLEST_NORMAL, out=powers)
    np.add(powers, _TO_STEP, out=powers)
    magnitudes = sums.view(np.float32)
    np.abs(numbers, out=magnitudes)
    np.add(magnitudes, powers.view(np.float32), out=magnitudes)
    np.subtract(sums, powers, out=sums)
    np.right_shift(powers, 20, out=powers)
    np.subtract(powers, _FIRST_CODE, out=powers)
    np.add(sums, powers, out=sums)
    np.right_shift(bits, 24, out=powers)
    np.bitwise_and(powers, _SIGN, out=powers)
    np.bitwise_or(sums, powers, out=sums)
    np.copyto(codes, sums, casting="unsafe")
