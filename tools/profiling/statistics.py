"""Medians, percentiles and intervals of a few measurements. The module knows numbers only.

Ratios are of paired measurements: both were taken in the same round, so that a disturbance of the machine meets both.
Their logarithms are averaged, with Student's interval around the mean (Student, Biometrika 6, 1908): times vary by
factors, and the interval of a ratio is then the inverse of that of its inverse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from reelforge.tools.profiling.schema import Timing

CONFIDENCE = 0.95

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; from then on the last is a little too wide.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def timing(milliseconds: Sequence[float]) -> Timing:
    """Return what several measurements say, at least one."""
    ordered = sorted(milliseconds)
    median = statistics.median(ordered)
    spread = percentile(ordered, 0.75) - percentile(ordered, 0.25)
    return Timing(
        len(ordered), median, percentile(ordered, 0.95), ordered[0], ordered[-1], spread / median if median else 0.0
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of an ascending sequence lies, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the geometric mean of ``theirs / ours`` and the ends of its 95 % interval.

    Args:
        ours: One time per round, above zero.
        theirs: Of the same rounds.

    Returns:
        Ratio, low and high; the ends are None for a single round.
    """
    logarithms = [math.log(their / our) for our, their in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logarithms)
    if len(logarithms) == 1:
        return math.exp(mean), None, None
    quantile = _T95[min(len(logarithms) - 1, len(_T95)) - 1]
    half = quantile * statistics.stdev(logarithms) / math.sqrt(len(logarithms))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
