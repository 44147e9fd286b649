"""Reads weights once: the sha256 of each tensor's bytes, and how many of its elements are NaN or infinite.

Tensors are spread over threads (hashlib and NumPy release the interpreter), each read in cache-sized pieces, so memory
is bounded whatever the size. The module does not know what the weights are for.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from reelforge.export.checkpoint.sources import WeightSource

T = TypeVar("T")

THREADS = 2
Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call, never from two threads at once."""

# Exponent bits all set means NaN or infinity; E4M3 has no infinity and one NaN pattern per sign.
_EXPONENT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
}


class TensorDigest(NamedTuple):
    """What one pass over a tensor's bytes tells: its sha256 in hex, and its NaN and infinite elements."""

    sha256: str
    non_finite: int


def count_non_finite(data: NDArray[np.uint8], dtype: str) -> int:
    """Return how many elements of ``data`` (whole elements of the safetensors type ``dtype``) are NaN or infinite."""
    if dtype not in _EXPONENT:
        return 0
    kind, mask = _EXPONENT[dtype]
    return int(np.count_nonzero((data.view(kind) & kind(mask)) == kind(mask)))


class Stopped(Exception):  # noqa: N818 - not an error: another thread failed or the user interrupted
    """Work was given up because another thread failed."""


class ProgressMeter:
    """Passes progress on from several threads, one call at a time, and stops them when one fails."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def advance(self, nbytes: int) -> None:
        """Report ``nbytes``.

        Raises:
            Stopped: If the work is being given up.
        """
        if self.stopping.is_set():
            raise Stopped
        if self._progress is not None:
            with self._lock:
                self._progress(nbytes)


def digest_one(weight: WeightSource, meter: ProgressMeter) -> TensorDigest:
    """Return the digest of one weight, reading it once."""
    sha = hashlib.sha256()
    non_finite = 0
    for piece in weight.pieces():
        sha.update(piece.data)
        non_finite += count_non_finite(piece, weight.dtype)
        meter.advance(piece.nbytes)
    return TensorDigest(sha.hexdigest(), non_finite)


def in_threads(jobs: Mapping[str, Callable[[], T]], meter: ProgressMeter, threads: int) -> dict[str, T]:
    """Run ``jobs`` on ``threads`` threads and return their results; the first failure or Ctrl-C stops all of them."""
    with ThreadPoolExecutor(threads) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        try:
            return {names[future]: future.result() for future in as_completed(names)}
        except BaseException:
            meter.stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def digest(
    weights: Mapping[str, WeightSource], progress: Progress | None = None, threads: int = THREADS
) -> dict[str, TensorDigest]:
    """Return the digest of every weight, in the order given.

    Args:
        weights: References or conversions by name.
        progress: Called with bytes done.
        threads: How many tensors are read at a time.

    Raises:
        CheckpointError: If a file ends before its tensor does.
    """
    meter = ProgressMeter(progress)
    by_size = sorted(weights, key=lambda name: -weights[name].nbytes)
    # Largest first, so that no thread is left alone with a large tensor at the end.
    results = in_threads({name: partial(digest_one, weights[name], meter) for name in by_size}, meter, threads)
    return {name: results[name] for name in weights}
