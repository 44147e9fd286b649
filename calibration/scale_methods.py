"""From statistics to scales: where to clip a tensor so that 8 bits serve it best.

Every method returns ``clip / number_format.largest`` for one clip per tensor. They see the histogram of
magnitudes and nothing else: not the layer, not what its error does to the picture. For engines whose codes have a zero
point there is a range beside the scale: the smallest and largest value, cut off at the clip.

The methods:
    ``max``: the largest magnitude; nothing is clipped.
    ``percentile``: the magnitude below which the given share of elements lies.
    ``mse``: the clip with the smallest expected squared error. Elements count as spread evenly within their bin, over
        which the squared distance to the nearest value of the format's real grid is integrated in closed form; this
        covers INT8's equal steps, FP8's relative ones and what is cut off alike. Exact zeros, which cost nothing in
        truth, count as any other element of the first bin.
    ``entropy``: the clip with the smallest Kullback-Leibler divergence between the clipped histogram and itself seen
        through the format's levels: S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310), "Entropy
        Calibration - pseudocode". Published for INT8 with 128 equal levels; for FP8 its own levels are used instead.
        Unlike the publication, levels share bins evenly where their number does not divide, a clip whose last bin was
        empty before the outliers were added is no candidate (its divergence is infinite), and no half bin is added. The
        first bin counts as the second one does, which is how NVIDIA's later tools deal with the peak at zero.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.number_formats import INT8, UNSIGNED_LEVELS, NumberFormat
from reelforge.calibration.statistics import BINS, TensorStatistics

DEFAULT_PERCENTILE = 99.99

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_ENTROPY_BINS = 2048  # as published
_ENTROPY_LEVELS = 128
_COARSE_CLIPS = 2.0 ** -np.arange(0, 12, 1 / 16)
_FINE_CLIPS = 2.0 ** np.linspace(-1 / 16, 1 / 16, 33)


class ScaleMethod(enum.Enum):
    """How a tensor's clip is chosen; the module's docstring says what each does."""

    MAX = "max"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


def activation_scale(
    statistics: TensorStatistics,
    number_format: NumberFormat,
    method: ScaleMethod,
    percentile: float = DEFAULT_PERCENTILE,
) -> np.float32:
    """Return one scale for the whole tensor, positive and finite; 1 for a tensor that was always zero.

    Args:
        statistics: What was observed of it.
        number_format: The format it will be quantised to.
        method: How the clip is chosen.
        percentile: For that method, in percent of the elements; 99.9 to 99.999 are usual.

    Raises:
        CalibrationError: If nothing was observed, something not finite was, or the percentile is not in (0, 100].
    """
    if statistics.non_finite:
        raise CalibrationError(
            "the statistics of a tensor met values that are not finite.",
            received=f"{statistics.non_finite} NaN or infinite elements",
            expected="finite values",
            fix="keep the layer that produced them in high precision and calibrate again",
        )
    if not statistics.count:
        raise CalibrationError(
            "a tensor was never observed.",
            received="0 elements",
            expected="at least one calibration step that runs its layer",
            fix="calibrate with the same stages and recipe that will be built",
        )
    if method is ScaleMethod.PERCENTILE:
        clip = percentile_clip(statistics, percentile)
    elif method is ScaleMethod.MSE:
        clip = mse_clip(statistics, number_format)
    elif method is ScaleMethod.ENTROPY:
        clip = entropy_clip(statistics, number_format)
    else:
        clip = statistics.absolute_maximum
    return np.float32(_positive(np.asarray(clip) / number_format.largest))


def activation_range(statistics: TensorStatistics, scale: np.float32, method: ScaleMethod) -> NDArray[np.float32]:
    """Return the range that unsigned codes of an INT8 layer's input span, fp32 ``[2]``: ``lowest <= 0 <= highest``.

    It is what was observed, with zero, clipped at the method's magnitude on both sides.

    Args:
        statistics: What was observed of the input.
        scale: What :func:`activation_scale` chose for it and INT8.
        method: With which it was chosen. ``max`` clips nothing, and ``mse`` searches for a clip of the range's own.
    """
    if method is ScaleMethod.MAX:
        clip = statistics.absolute_maximum
    elif method is ScaleMethod.MSE:
        clip = mse_range_clip(statistics)
    else:
        clip = float(scale) * INT8.largest
    return np.clip(_range(statistics), -clip, clip).astype(np.float32) + np.float32(0)  # no -0.0


def weight_scales(weight: NDArray[Any], number_format: NumberFormat, axis: int = 0) -> NDArray[np.float32]:
    """Return one scale per output channel, fp32 ``[weight.shape[axis]]``: the channel's largest magnitude is kept.

    All are positive and finite; a channel of zeros has the scale 1, with which it stays zero.

    Raises:
        NonFiniteError: If the weight holds NaN or infinities.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis % weight.ndim)
    values = weight.astype(np.float32, copy=False)
    maxima = np.maximum(values.max(axis=others, initial=0), -values.min(axis=others, initial=0))
    if not np.isfinite(maxima).all():
        raise NonFiniteError(int(np.isnan(values).sum()), int(np.isinf(values).sum()), values.size, "a weight")
    return scales_of_maxima(maxima, number_format)


def scales_of_maxima(maxima: NDArray[np.float32], number_format: NumberFormat) -> NDArray[np.float32]:
    """Return the scales with which ``maxima`` (fp32, any shape, finite, not negative) become the largest value.

    All are positive and finite; 1 where the maximum is zero.
    """
    return _positive(maxima / np.float32(number_format.largest))


def percentile_clip(statistics: TensorStatistics, percentile: float) -> float:
    """Return the magnitude below which ``percentile`` percent of the elements lie, interpolated within its bin.

    Raises:
        CalibrationError: If the percentile is not in (0, 100].
    """
    if not 0 < percentile <= 100:
        raise CalibrationError(
            f"the percentile {percentile} is not possible.",
            received=percentile,
            expected="a number above 0 and up to 100",
            fix="use 99.99, or 99.999 to keep more outliers",
        )
    rank = percentile / 100 * statistics.count
    cumulative = np.cumsum(statistics.histogram)
    index = min(int(np.searchsorted(cumulative, rank)), BINS - 1)
    inside = (rank - (cumulative[index] - statistics.histogram[index])) / statistics.histogram[index]
    return float(min((index + inside) * statistics.bin_width, statistics.absolute_maximum))


def mse_clip(statistics: TensorStatistics, number_format: NumberFormat) -> float:
    """Return the clip with the smallest expected squared error, searched over 12 octaves below the maximum."""
    return _mse_clip(statistics, lambda clips: clips / number_format.largest * number_format.grid)


def mse_range_clip(statistics: TensorStatistics) -> float:
    """Return the magnitude at which to clip the range of unsigned codes; searched as by :func:`mse_clip`.

    All steps are spent on what the clip leaves of the range. That the zero point is rounded, which moves both ends by
    up to half a step, is not part of the error.
    """
    lowest, highest = _range(statistics)

    def grids(clips: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = (np.minimum(clips, -lowest) + np.minimum(clips, highest)) / UNSIGNED_LEVELS
        return np.minimum(steps * np.arange(UNSIGNED_LEVELS + 1), clips)

    return _mse_clip(statistics, grids)


def squared_errors(
    edges: NDArray[np.float64], counts: NDArray[np.float64], grids: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean squared distances ``[K]`` of magnitudes, spread evenly within bins, to the nearest grid value.

    Args:
        edges: The bins' edges, rising strictly, ``[N + 1]``, the first one zero.
        counts: Elements per bin, ``[N]``.
        grids: ``[K, G]``, each rising from zero to its clip.
    """
    ends = np.full((len(grids), 1), edges[-1])
    points = np.minimum(np.concatenate([0 * ends, (grids[:, 1:] + grids[:, :-1]) / 2, ends], axis=1), ends)
    bins = np.minimum(np.searchsorted(edges, points, side="right") - 1, len(counts) - 1)
    # The moments of the density from zero to each point: within a bin they are polynomials.
    density, start = counts / np.diff(edges), edges[:-1]
    moments = []
    for order in range(3):
        whole_bins = np.concatenate([[0.0], np.cumsum(density * _power_integral(order, start, edges[1:]))])
        parts = density[bins] * _power_integral(order, start[bins], points)
        moments.append(np.diff(whole_bins[bins] + parts, axis=1))
    zeroth, first, second = moments
    errors: NDArray[np.float64] = (second - 2 * grids * first + grids**2 * zeroth).sum(axis=1) / counts.sum()
    return errors


def entropy_clip(statistics: TensorStatistics, number_format: NumberFormat) -> float:
    """Return the clip with the smallest divergence; see the module's docstring for the source."""
    counts = statistics.histogram.reshape(_ENTROPY_BINS, -1).sum(axis=1).astype(np.float64)
    width = statistics.bin_width * (BINS // _ENTROPY_BINS)
    used = int(np.flatnonzero(counts)[-1]) + 1
    # Values near zero are one level whatever the clip, but by their number they would decide it alone.
    counts[0] = counts[1]
    if used < _ENTROPY_LEVELS:  # only if all is below the smallest range of the histogram
        return statistics.absolute_maximum
    candidates = range(_ENTROPY_LEVELS, used + 1)
    best = candidates[int(np.argmin([_divergence(counts[:used], size, number_format) for size in candidates]))]
    return min(best * width, statistics.absolute_maximum)


def _mse_clip(statistics: TensorStatistics, grids: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
    """Return the best clip; ``grids`` gives the magnitudes ``[K, G]`` that codes stand for, of clips ``[K, 1]``."""
    edges, counts = _density(statistics)
    largest = edges[-1]
    if largest == 0:
        return 0.0
    clips = largest * _COARSE_CLIPS
    best = clips[np.argmin(squared_errors(edges, counts, grids(clips[:, None])))]
    clips = np.minimum(best * _FINE_CLIPS, largest)
    return float(clips[np.argmin(squared_errors(edges, counts, grids(clips[:, None])))])


def _power_integral(order: int, start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the integral of ``x**order`` from start to end, without the difference of nearly equal powers."""
    means = (np.ones_like(start), (start + end) / 2, (start * start + start * end + end * end) / 3)
    result: NDArray[np.float64] = (end - start) * means[order]
    return result


def _range(statistics: TensorStatistics) -> tuple[float, float]:
    """Return the smallest and the largest value, with zero."""
    return min(float(statistics.minimum), 0.0), max(float(statistics.maximum), 0.0)


def _positive(scales: NDArray[Any]) -> NDArray[np.float32]:
    return np.where(scales > 0, np.maximum(scales, _SMALLEST_SCALE), 1).astype(np.float32)


def _density(statistics: TensorStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return edges and counts up to the bin of the largest magnitude, which ends that bin if it lies inside."""
    largest = statistics.absolute_maximum
    used = int(np.flatnonzero(statistics.histogram)[-1]) + 1
    edges = np.arange(used + 1, dtype=np.float64) * np.float64(statistics.bin_width)
    counts = statistics.histogram[:used].astype(np.float64)
    if edges[used - 1] < largest:
        edges[used] = largest
        return edges, counts
    if used > 1:  # the last bin is a single point at its lower edge: count it below that edge
        counts[used - 2] += counts[used - 1]
    return edges[:used], counts[: used - 1]


def _divergence(counts: NDArray[np.float64], size: int, number_format: NumberFormat) -> float:
    """Return KL(P, Q): P the first ``size`` bins with the others added to the last one, Q those bins by levels."""
    kept = counts[:size]
    outliers = counts[size:].sum()
    if kept[-1] == 0 and outliers:
        return np.inf
    filled = kept > 0
    starts = _level_starts(size, number_format)
    level_of_bin = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, size)))
    filled_per_level = np.add.reduceat(filled, starts, dtype=np.int64)
    means = np.add.reduceat(kept, starts) / np.maximum(filled_per_level, 1)
    candidate = means[level_of_bin][filled]
    reference = kept.copy()
    reference[-1] += outliers
    reference = reference[filled]
    total = counts.sum()
    # Q sums to what is kept, P to everything.
    return float(np.sum(reference * np.log(reference / candidate)) / total + np.log(kept.sum() / total))


def _level_starts(size: int, number_format: NumberFormat) -> NDArray[np.int64]:
    """Return the first bin of each level when ``size`` bins are quantised."""
    if number_format.mantissa_bits is None:
        return np.arange(_ENTROPY_LEVELS) * size // _ENTROPY_LEVELS
    grid = number_format.grid
    starts = np.rint((grid[1:] + grid[:-1]) / 2 * (size / number_format.largest)).astype(np.int64)
    starts = np.unique(np.append(0, starts))
    return starts[starts < size]
