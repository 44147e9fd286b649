"""The quality gate: measures what a bundle loses against its reference, and refuses it below a threshold.

The module turns a comparison into a report and a report into an error. It does not know how a bundle was quantised, nor
which layers are to blame: who does passes their names.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from reelforge.calibration.comparison import Comparison, Loss, compare
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.runtime.errors import VerificationError
from reelforge.runtime.pipeline import OnProgress, Pipeline
from reelforge.runtime.quality import QualityReport, QualityThresholds, StageQuality
from reelforge.runtime.recipe import VideoShape


def measure_quality(
    reference: Pipeline,
    candidate: Pipeline,
    prompts: Sequence[str],
    seed: int,
    steps: int | None = None,
    shape: VideoShape | None = None,
    on_progress: OnProgress | None = None,
) -> QualityReport:
    """Generate the same videos with both pipelines, from the same noise, and report how far they are apart.

    Args:
        reference: In high precision.
        candidate: The same model, quantised.
        prompts: At least one; not those of the calibration.
        seed: Of the first prompt's noise; then counted up.
        steps: Sampling steps; None means the reference's default.
        shape: Size of the videos; None means the reference's default.
        on_progress: Told about finished work.

    Raises:
        RequestError: If there are no prompts, the reference does not support the request, or the models differ.
        VerificationError: If numbers are not finite.
        EngineError: If an engine fails.
    """
    run = run_reference(reference, prompts, seed, steps, shape, on_progress)
    return summarise(run, compare(run, candidate, on_progress=on_progress))


def summarise(run: ReferenceRun, comparison: Comparison) -> QualityReport:
    """Return the report of a complete comparison, in floats that are short to read."""
    request = run.videos[0].request
    steps = range(request.steps)
    # A comparison in which no stage differs has run no steps.
    velocity = comparison.velocity or [[Loss(1.0, 0.0)] * request.steps]
    drift = comparison.drift or [[0.0] * request.steps]
    return QualityReport(
        prompts=tuple(video.request.prompt for video in run.videos),
        seed=request.seed,
        shape=request.shape,
        steps=request.steps,
        stages={stage: _stage_quality(losses) for stage, losses in comparison.stages.items()},
        velocity_cosine=tuple(_near_one(min(losses[step].cosine for losses in velocity)) for step in steps),
        latent_drift=tuple(_short(max(values[step] for values in drift)) for step in steps),
        psnr_db=tuple(None if value == float("inf") else round(value, 3) for value in comparison.psnr_db),
        ssim=tuple(_near_one(value) for value in comparison.ssim),
    )


def meets(report: QualityReport, thresholds: QualityThresholds) -> bool:
    """Whether the report reaches every threshold."""
    return not _failures(report, thresholds)


def require_quality(report: QualityReport, thresholds: QualityThresholds, worst_layers: Sequence[str] = ()) -> None:
    """Refuse a report below a threshold.

    Args:
        report: What was measured.
        thresholds: The least that is accepted.
        worst_layers: The layers that lose most, worst first, as ``stage.layer``; see ``export.sensitivity``.

    Raises:
        VerificationError: Naming what was received and expected, the worst layers, and what can be done.
    """
    failures = _failures(report, thresholds)
    if not failures:
        return
    received, expected = zip(*failures, strict=True)
    names = ", ".join(worst_layers)
    keep = f"keep these layers in high precision: {names}; or" if names else "keep the worst layers in high precision,"
    raise VerificationError(
        "the quantised bundle is further from its reference than the recipe allows"
        + (f"; the worst layers are {names}." if names else "."),
        received=", ".join(received),
        expected=", ".join(expected),
        fix=f"{keep} calibrate with another method or with smoothing, find the layers to keep with `reelforge "
        "sensitivity --quality-budget`, or accept less with a lower threshold (0 dB accepts everything)",
    )


def _failures(report: QualityReport, thresholds: QualityThresholds) -> list[tuple[str, str]]:
    """Return (received, expected) of every threshold that is missed."""
    failures = []
    if 0 < thresholds.psnr_db > report.psnr_median_db:
        received = f"median PSNR {report.psnr_median_db:.2f} dB (worst {report.psnr_worst_db:.2f} dB)"
        failures.append((received, f"at least {thresholds.psnr_db:g} dB"))
    if 0 < thresholds.velocity_cosine > report.velocity_cosine_worst:
        step = report.velocity_cosine.index(report.velocity_cosine_worst)
        received = f"velocity cosine {report.velocity_cosine_worst:.5f} at step {step}"
        failures.append((received, f"at least {thresholds.velocity_cosine:g}"))
    return failures


def _stage_quality(losses: Sequence[Loss]) -> StageQuality:
    cosines = [loss.cosine for loss in losses]
    errors = [loss.relative_error for loss in losses]
    return StageQuality(
        cosine_min=_near_one(min(cosines)),
        cosine_median=_near_one(statistics.median(cosines)),
        relative_error_max=_short(max(errors)),
        relative_error_median=_short(statistics.median(errors)),
    )


def _near_one(value: float) -> float:
    return round(value, 8)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
