"""What is remembered of a tensor that is seen many times: extremes, channel maxima and a histogram of magnitudes.

Memory is one histogram and one number per channel, whatever is observed. The histogram's range is always the power of
two above the largest magnitude seen; when a larger one arrives, the range doubles and pairs of bins are merged. Since
ranges and the number of bins are powers of two, binning is exact, and the result depends on the values observed and
neither on their order nor on how they were cut into batches. The module does not know what it observes or why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError, NonFiniteError

BINS = 8192
"""Bins of the histogram. The largest magnitude lies in its upper half, so a bin is at most 1/4096 of it."""

MIN_EXPONENT = -100
"""The smallest range is 2**-100: below it everything counts as zero, and all factors stay normal fp32 numbers."""

_PIECE_ELEMENTS = 1 << 18


class TensorStatistics:
    """Streaming statistics of one tensor; the last axis is its channels.

    Attributes:
        channels: Length of the last axis.
        count: Finite elements observed.
        non_finite: NaN and infinite elements met; the batches that held them are not part of anything else.
        minimum: Smallest value; infinity before the first.
        maximum: Largest value; minus infinity before the first.
        channel_absolute_maximum: Per channel, fp32 ``[channels]``.
        exponent: The histogram covers magnitudes from 0 to ``2**exponent``.
        histogram: Elements per bin, int64 ``[BINS]``; bin ``i`` holds ``i * bin_width <= |x| < (i + 1) * bin_width``.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.count = 0
        self.non_finite = 0
        self.minimum = np.float32(np.inf)
        self.maximum = np.float32(-np.inf)
        self.channel_absolute_maximum = np.zeros(channels, np.float32)
        self.exponent = MIN_EXPONENT
        self.histogram = np.zeros(BINS, np.int64)

    @property
    def absolute_maximum(self) -> float:
        """The largest magnitude observed; zero before the first."""
        return float(self.channel_absolute_maximum.max(initial=0.0))

    @property
    def bin_width(self) -> float:
        """The width of a bin of the histogram."""
        return 2.0**self.exponent / BINS

    def update(self, batch: NDArray[Any]) -> None:
        """Add ``batch``, a floating-point array ``[..., channels]``, seen as fp32.

        Raises:
            NonFiniteError: If it holds NaN or infinities; only ``non_finite`` has changed then. The caller knows the
                layer and adds it with :meth:`~reelforge.calibration.errors.NonFiniteError.located`.
            ValueError: If the last axis has another length.
        """
        if batch.ndim == 0 or batch.shape[-1] != self.channels:
            raise ValueError(f"the batch has shape {list(batch.shape)}, expected [..., {self.channels}]")
        if batch.size == 0:
            return
        rows = batch.reshape(-1, self.channels)
        step = max(1, _PIECE_ELEMENTS // self.channels)
        pieces = [slice(start, start + step) for start in range(0, len(rows), step)]
        lowest = np.full(self.channels, np.inf, np.float32)
        highest = np.full(self.channels, -np.inf, np.float32)
        for piece in pieces:  # NaN and infinities pass through a minimum or a maximum: one look at the end suffices
            values = _as_fp32(rows[piece])
            np.minimum(lowest, values.min(axis=0), out=lowest)
            np.maximum(highest, values.max(axis=0), out=highest)
        if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
            nan = sum(int(np.isnan(_as_fp32(rows[piece])).sum()) for piece in pieces)
            infinite = sum(int(np.isinf(_as_fp32(rows[piece])).sum()) for piece in pieces)
            self.non_finite += nan + infinite
            raise NonFiniteError(nan, infinite, batch.size)
        self._widen(lowest, highest, np.maximum(highest, -lowest))
        factor = np.float32(2.0**-self.exponent * BINS)
        for piece in pieces:
            magnitudes = np.abs(_as_fp32(rows[piece])).reshape(-1)
            bins = np.multiply(magnitudes, factor, out=magnitudes).astype(np.int32)
            self.histogram += np.bincount(bins, minlength=BINS)
        self.count += batch.size

    def merge(self, other: TensorStatistics) -> None:
        """Add what ``other`` has observed, as if its batches had come here.

        Raises:
            ValueError: If it has another number of channels.
        """
        if other.channels != self.channels:
            raise ValueError(f"the other statistics have {other.channels} channels, expected {self.channels}")
        maxima = other.channel_absolute_maximum
        self._widen(np.asarray(other.minimum), np.asarray(other.maximum), maxima)
        self.histogram += _merge_bins(other.histogram, self.exponent - other.exponent)
        self.count += other.count
        self.non_finite += other.non_finite

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the statistics as plain arrays by name; equal observations give equal bytes."""
        return {
            "count": np.array(self.count, np.int64),
            "non_finite": np.array(self.non_finite, np.int64),
            "minimum": np.array(self.minimum, np.float32),
            "maximum": np.array(self.maximum, np.float32),
            "channel_absolute_maximum": self.channel_absolute_maximum.copy(),
            "exponent": np.array(self.exponent, np.int64),
            "histogram": self.histogram.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> TensorStatistics:
        """Build statistics from what :meth:`to_arrays` returned.

        Raises:
            CalibrationError: If an array is missing, has another type or shape, or they contradict each other.
        """
        maxima = arrays.get("channel_absolute_maximum")
        result = cls(0 if maxima is None or maxima.ndim != 1 else len(maxima))
        for name, expected in result.to_arrays().items():
            array = arrays.get(name)
            if array is None or array.dtype != expected.dtype or array.shape != expected.shape:
                raise _damaged(
                    f"{name}: {'absent' if array is None else f'{array.dtype} {list(array.shape)}'}",
                    f"{name}: {expected.dtype} {list(expected.shape)}",
                )
        result.count = int(arrays["count"])
        result.non_finite = int(arrays["non_finite"])
        result.minimum = np.float32(arrays["minimum"])
        result.maximum = np.float32(arrays["maximum"])
        result.channel_absolute_maximum = arrays["channel_absolute_maximum"].copy()
        result.exponent = int(arrays["exponent"])
        result.histogram = arrays["histogram"].copy()
        if int(result.histogram.sum()) != result.count or result.histogram.min() < 0:
            raise _damaged(f"{int(result.histogram.sum())} elements in the histogram", f"{result.count} elements")
        if result.exponent != _exponent(result.absolute_maximum):
            raise _damaged(f"a range of 2**{result.exponent}", f"2**{_exponent(result.absolute_maximum)}")
        return result

    def _widen(self, lowest: NDArray[Any], highest: NDArray[Any], maxima: NDArray[np.float32]) -> None:
        # Adding zero makes -0.0 positive: which of two equal zeros came first must not be visible in the bytes.
        self.minimum = np.float32(min(self.minimum, lowest.min(initial=np.inf)) + np.float32(0))
        self.maximum = np.float32(max(self.maximum, highest.max(initial=-np.inf)) + np.float32(0))
        np.maximum(self.channel_absolute_maximum, maxima, out=self.channel_absolute_maximum)
        self.channel_absolute_maximum += np.float32(0)
        exponent = _exponent(self.absolute_maximum)
        self.histogram = _merge_bins(self.histogram, exponent - self.exponent)
        self.exponent = exponent


def _as_fp32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond fp32 becomes infinite and is counted as such
        return values.astype(np.float32, copy=False)


def _exponent(magnitude: float) -> int:
    """Return the smallest ``e >= MIN_EXPONENT`` with ``magnitude < 2**e``."""
    return max(MIN_EXPONENT, int(np.frexp(magnitude)[1])) if magnitude else MIN_EXPONENT


def _merge_bins(histogram: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    merged = np.zeros_like(histogram)
    group = 1 << min(doublings, BINS.bit_length() - 1)
    merged[: BINS // group] = histogram.reshape(-1, group).sum(axis=1)
    return merged


def _damaged(received: str, expected: str) -> CalibrationError:
    return CalibrationError(
        "saved statistics are damaged or were written by another version.",
        received=received,
        expected=expected,
        fix="delete them and calibrate again",
    )
