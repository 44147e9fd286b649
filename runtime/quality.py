"""What a quantised bundle loses against its high-precision reference, as data, and the least that is accepted.

The numbers are measured by the compiler and kept in the manifest; the runtime only shows them. The module measures
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from reelforge.runtime.recipe import VideoShape

DEFAULT_PSNR_DB = {"int8": 30.0, "fp8": 33.0}
"""The least median PSNR of the final videos, by precision."""


@dataclass(frozen=True)
class StageQuality:
    """One stage on the reference's inputs, against the reference's outputs; over all prompts and steps."""

    cosine_min: float
    cosine_median: float
    relative_error_max: float
    relative_error_median: float


@dataclass(frozen=True)
class QualityReport:
    """Videos of a bundle against those of its reference, from the same noise.

    Attributes:
        prompts: What was generated; the noise of prompt ``k`` has the seed ``seed + k``.
        seed: Of the first prompt's noise.
        shape: The videos' size.
        steps: Sampling steps.
        stages: The stages that differ from the reference's. ``modulation`` is never among them: smoothing moves factors
            between it and ``dit``, so that only both together can be compared, and ``dit`` stands for both.
        velocity_cosine: By step, the smallest over prompts, on the reference's trajectory.
        latent_drift: By step, the largest relative L2 error over prompts between the two trajectories.
        psnr_db: Of each prompt's video; None if it equals the reference's.
        ssim: Of each prompt's video, the mean over frames.
    """

    prompts: tuple[str, ...]
    seed: int
    shape: VideoShape
    steps: int
    stages: dict[str, StageQuality]
    velocity_cosine: tuple[float, ...]
    latent_drift: tuple[float, ...]
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]

    @property
    def psnr_median_db(self) -> float:
        """The median PSNR over prompts; infinite if more than half of the videos are equal."""
        return _median(self._psnr())

    @property
    def psnr_worst_db(self) -> float:
        """The smallest PSNR over prompts."""
        return min(self._psnr())

    @property
    def ssim_median(self) -> float:
        """The median SSIM over prompts."""
        return _median(self.ssim)

    @property
    def ssim_worst(self) -> float:
        """The smallest SSIM over prompts."""
        return min(self.ssim)

    @property
    def velocity_cosine_worst(self) -> float:
        """The smallest cosine of a velocity over prompts and steps."""
        return min(self.velocity_cosine)

    def _psnr(self) -> list[float]:
        return [math.inf if value is None else value for value in self.psnr_db]


@dataclass(frozen=True)
class QualityThresholds:
    """The least that a quantised bundle must reach; 0 accepts everything.

    Attributes:
        psnr_db: Median PSNR of the final videos.
        velocity_cosine: Smallest cosine of a velocity.
    """

    psnr_db: float = 0.0
    velocity_cosine: float = 0.0

    @classmethod
    def for_precisions(cls, precisions: Iterable[str]) -> QualityThresholds:
        """Return the default for a bundle with these precisions (``"int8"``): of several, the lower one."""
        return cls(min((DEFAULT_PSNR_DB[name] for name in precisions if name in DEFAULT_PSNR_DB), default=0.0))


def _median(values: Iterable[float]) -> float:
    """The median; ``statistics`` has one, and takes longer to import than any module of ours."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
