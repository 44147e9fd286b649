"""Which library casts weights: NumPy, or PyTorch where it is loaded already or is worth loading. Both give equal bits.

NumPy is as fast as PyTorch, or nearly, at what most weights need: bf16 and fp32 in, INT8 out. For a block of 2 MB in
the cache (AMD EPYC, one thread) it takes 1.4 ns an element for FP8, PyTorch 0.6, and for a source in fp16 1.7 ns,
PyTorch 0.1. Loading PyTorch takes 1 to 2 s and 127 MB of anonymous memory: below ``TORCH_PAYS_ELEMENTS`` it never pays.
A process that has PyTorch already, as one that builds from a checkpoint, uses it for these whatever the size.

The module knows no files and no scales.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration import cast_numpy
from reelforge.calibration.number_formats import NumberFormat

TORCH_PAYS_ELEMENTS = 1 << 30
"""What PyTorch gains for so many elements on one thread, about a second, is what it costs to load it."""


class Casts(Protocol):
    """The casts of one library; every implementation gives the same bits."""

    def widen(self, stored: NDArray[Any], out: NDArray[np.float32]) -> None:
        """Copy fp32, fp16 or bf16 (the type of ``ml_dtypes``) to ``out``; both contiguous and of one shape."""
        ...

    def narrow(self, numbers: NDArray[np.float32], number_format: NumberFormat, out: NDArray[np.uint8]) -> None:
        """Round half to even and write the codes to ``out``; both contiguous and of one shape.

        Args:
            numbers: Up to the format's largest magnitude, or what rounds to it; they may be overwritten.
            number_format: The codes' format.
            out: The codes' bytes.
        """
        ...

    def one_thread_per_operation(self) -> AbstractContextManager[None]:
        """Keep operations from being split over threads, in threads that start inside the block.

        For callers that spread weights over threads themselves: both together would be several threads per core.
        """
        ...


class CastWork(NamedTuple):
    """One weight's casts: its safetensors type, how many elements it has, and what they become."""

    dtype: str
    elements: int
    number_format: NumberFormat


def choose_casts(work: Iterable[CastWork]) -> Casts:
    """Return the library for all of ``work``, as the module's docstring says."""
    slow = sum(item.elements for item in work if item.dtype == "F16" or item.number_format.mantissa_bits is not None)
    if slow >= TORCH_PAYS_ELEMENTS or (slow and "torch" in sys.modules):
        return cast(Casts, importlib.import_module("reelforge.calibration.cast_torch"))
    return cast_numpy
