"""Casts of weights with PyTorch; ``casts`` says when they are used and what each function promises.

PyTorch's cast to FP8 is vectorised. It equals ``ml_dtypes`` for every fp32 number up to 448 in magnitude (compared
exhaustively, in its AVX-512, AVX2 and portable variants); beyond 464 it gives NaN, which no quotient here reaches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat

_STORED: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
}
_CODES: dict[NumberFormat, torch.dtype] = {INT8: torch.int8, FP8_E4M3: torch.float8_e4m3fn}
_thread_count = threading.Lock()


def widen(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Copy fp32, fp16 or bf16 to ``out``."""
    if not stored.flags.writeable:  # which PyTorch warns about
        stored = stored.copy()
    data = torch.from_numpy(stored.view(f"i{stored.itemsize}"))
    torch.from_numpy(out).copy_(data.view(_STORED[stored.dtype]))


def narrow(numbers: NDArray[np.float32], number_format: NumberFormat, out: NDArray[np.uint8]) -> None:
    """Write the codes of ``numbers``, which may be overwritten, to ``out``."""
    rounded = torch.from_numpy(numbers)
    if number_format.mantissa_bits is None:
        rounded.round_()  # half to even
    torch.from_numpy(out).view(_CODES[number_format]).copy_(rounded)


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Set PyTorch to one thread per operation.

    The setting belongs to the process, hence only one such block runs at a time and the others wait.
    """
    with _thread_count:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
