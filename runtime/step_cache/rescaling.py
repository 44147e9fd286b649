"""How far the velocity moves when what the first block is given moves: what TeaCache knows of a checkpoint beforehand.

A polynomial, as data: published for the released model, and of other checkpoints measured by ``reelforge
measure-coefficients``, which writes a JSON file. The module knows numbers only, and not how they are measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.runtime.spec import ModelSpec
from reelforge.runtime.step_cache.measured_file import MeasuredFile, whole

DEGREE = 4
"""Of the paper's polynomials."""

_FILE = MeasuredFile("TeaCache's coefficients", "measure-coefficients")


@dataclass(frozen=True)
class Rescaling:
    """A checkpoint's polynomial (TeaCache, arXiv 2411.19108, equation 8).

    Attributes:
        coefficients: Highest power first, as they are published.
        least: Smallest measured change of the first block's input. Changes outside of what was measured are taken for
            the nearest that was: beyond it a polynomial says nothing.
        most: Largest measured.
        deviation: Root of the mean square by which the measured changes of the velocity lie off the polynomial.
        generations: How many were measured.
        bundle: Content digest of the bundle that was measured, to tell files apart; a checkpoint's coefficients serve
            its bundles of every precision.
    """

    coefficients: tuple[float, ...]
    least: float = 0.0
    most: float = math.inf
    deviation: float = 0.0
    generations: int = 1
    bundle: str = ""

    def estimate(self, change: float) -> float:
        """Return by what share the velocity moves, at least 0; not a number if the change is none."""
        inside = min(max(change, self.least), self.most) if not math.isnan(change) else change
        value = 0.0
        for coefficient in self.coefficients:
            value = value * inside + coefficient
        return max(value, 0.0)  # in this order, which keeps a value that is not a number

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OutputError: If it cannot be written.
        """
        content = {
            "coefficients": list(self.coefficients),
            "range": [self.least, self.most],
            "deviation": self.deviation,
            "generations": self.generations,
            "bundle": self.bundle,
        }
        _FILE.write(path, content)

    @classmethod
    def read(cls, path: Path) -> Rescaling:
        """Read the file.

        Raises:
            RequestError: If it cannot be read or does not hold coefficients.
        """
        content = _FILE.read(path)
        ends = _FILE.numbers(content, "range", path)
        if len(ends) != 2:
            raise _FILE.refused(path, f"a range of {len(ends)} numbers; it has two")
        deviation = _FILE.numbers({"deviation": [content.get("deviation", 0.0)]}, "deviation", path)
        made = cls(
            coefficients=_FILE.numbers(content, "coefficients", path),
            least=ends[0],
            most=ends[1],
            deviation=deviation[0],
            generations=whole(content.get("generations")),
            bundle=str(content.get("bundle", "")),
        )
        if problem := made.problem():
            raise _FILE.refused(path, problem)
        return made

    def problem(self) -> str:
        """Return what is wrong with the numbers, or nothing."""
        if not self.coefficients or not all(math.isfinite(one) for one in self.coefficients):
            return "no coefficients, or not finite ones"
        if not 0 <= self.least <= self.most:
            return (
                f"the range {self.least:g} to {self.most:g}; it begins at 0 or above, and ends where it begins or above"
            )
        return ""


def fit(changes: Sequence[float], moved: Sequence[float], generations: int = 1, bundle: str = "") -> Rescaling:
    """Return the polynomial through measured changes with the least squares, as the paper's authors fit theirs.

    Args:
        changes: Of what the first block is given, from step to step.
        moved: How far the velocity moved in the same steps, relatively; as many, and more than the polynomial's degree.
        generations: How many they are of.
        bundle: Content digest of what was measured.
    """
    x, y = np.asarray(changes, np.float64), np.asarray(moved, np.float64)
    # Fitted on [-1, 1], where powers differ in size by little, and then written in powers of the change itself.
    fitted = np.polynomial.Polynomial.fit(x, y, DEGREE)
    powers = fitted.convert().coef
    coefficients = np.pad(powers, (0, DEGREE + 1 - len(powers)))[::-1]
    deviation = float(np.sqrt(np.mean((fitted(x) - y) ** 2)))
    return Rescaling(
        tuple(float(one) for one in coefficients), float(x.min()), float(x.max()), deviation, generations, bundle
    )


_Size = tuple[str, int, int, int]

PUBLISHED: dict[_Size, Rescaling] = {
    # TeaCache4HunyuanVideo/teacache_sample_video.py of https://github.com/ali-vilab/TeaCache, for 720p with 50 steps;
    # its README states 1.6 and 2.1 times fewer seconds at thresholds of 0.1 and 0.15.
    ("hunyuan_video", 3072, 20, 40): Rescaling(
        (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02)
    ),
}
"""By family, width, double and single blocks."""


def published(spec: ModelSpec) -> Rescaling | None:
    """Return the published coefficients of a model of this size, None where there are none."""
    return PUBLISHED.get((spec.family, spec.dit.width, spec.dit.double_blocks, spec.dit.single_blocks))
