"""How the residual of a checkpoint's velocity grows along the schedule: what MagCache knows beforehand.

The file is JSON, written by ``reelforge measure-ratios``. The module knows numbers only, and not how they are measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.step_cache.measured_file import MeasuredFile, whole

_FILE = MeasuredFile("magnitude ratios", "measure-ratios")


@dataclass(frozen=True)
class MagnitudeRatios:
    """Magnitude ratios of one checkpoint (MagCache, arXiv 2506.09045, section 3).

    Attributes:
        sigmas: Noise level of each measured step, strictly falling.
        ratios: For each step ``mean(|r_i| / |r_{i-1}|)``, where ``r = velocity - latents`` and ``|.|`` is the norm over
            channels; the first is 1.
        spread: Standard deviation of each over the measured generations.
        generations: How many were measured.
        bundle: Content digest of the bundle that was measured, to tell files apart; nothing is refused by it, since a
            checkpoint's ratios serve its bundles of every precision.
    """

    sigmas: tuple[float, ...]
    ratios: tuple[float, ...]
    spread: tuple[float, ...] = ()
    generations: int = 1
    bundle: str = ""

    def at(self, sigmas: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the ratios of a schedule.

        The logarithm of the magnitude is interpolated between the measured noise levels, so that the ratios of a
        schedule with other steps have the same product over the same range; below the lowest level its slope goes on.

        Args:
            sigmas: ``[n]``, noise level of each step, falling.

        Returns:
            ``[n]``; the first is 1.
        """
        known = np.asarray(self.sigmas, np.float64)
        logs = np.cumsum(np.log(np.asarray(self.ratios, np.float64)))
        wanted = np.asarray(sigmas, np.float64)
        found = np.interp(wanted, known[::-1], logs[::-1])
        below = wanted < known[-1]
        slope = (logs[-1] - logs[-2]) / (known[-1] - known[-2])
        found[below] = logs[-1] + slope * (wanted[below] - known[-1])
        ratios: NDArray[np.float64] = np.exp(np.diff(found, prepend=found[:1]))
        return ratios

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OutputError: If it cannot be written.
        """
        content = {
            "sigmas": list(self.sigmas),
            "ratios": list(self.ratios),
            "spread": list(self.spread),
            "generations": self.generations,
            "bundle": self.bundle,
        }
        _FILE.write(path, content)

    @classmethod
    def read(cls, path: Path) -> MagnitudeRatios:
        """Read the file.

        Raises:
            RequestError: If it cannot be read or does not hold magnitude ratios.
        """
        content = _FILE.read(path)
        made = cls(
            sigmas=_FILE.numbers(content, "sigmas", path),
            ratios=_FILE.numbers(content, "ratios", path),
            spread=_FILE.numbers(content, "spread", path),
            generations=whole(content.get("generations")),
            bundle=str(content.get("bundle", "")),
        )
        if problem := made.problem():
            raise _FILE.refused(path, problem)
        return made

    def problem(self) -> str:
        """Return what is wrong with the numbers, or nothing."""
        if len(self.sigmas) != len(self.ratios) or len(self.ratios) < 2:
            return f"{len(self.sigmas)} sigmas and {len(self.ratios)} ratios; there must be as many, at least 2"
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in self.ratios):
            return "a ratio is not a finite number above 0"
        if not all(later < earlier for earlier, later in zip(self.sigmas, self.sigmas[1:], strict=False)):
            return "the sigmas do not fall"
        return ""
