"""Sensitivity: what each layer of a stage costs when it alone is in 8 bits, then each block.

Loss is measured at the stage's output, on inputs recorded from the reference, and at the end of the sampling loop, from
the same noise; always the worst over prompts and steps. The module does not choose scales or formats, nor does it know
which losses are acceptable.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reelforge.calibration.budget import LayerCost
from reelforge.calibration.comparison import Checks, Comparison, compare
from reelforge.calibration.gate import summarise
from reelforge.calibration.number_formats import NumberFormat
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.calibration.scale_file import ScaleFile
from reelforge.export.variants import Variants, scales_of
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.recipe import VideoShape

_SCREENED_BLOCKS = 2


class Metric(enum.Enum):
    """What a quality budget is stated in; more is better."""

    PSNR = "psnr"  # median of the final videos, dB
    COSINE = "cosine"  # smallest of a velocity, on the reference's trajectory


@dataclass(frozen=True)
class SensitivityRow:
    """What one layer, or all layers of one block, cost when nothing else is in 8 bits.

    Attributes:
        name: The layer, or the block.
        block: The block: the layer's name up to its first number.
        layers: What is in 8 bits.
        format: Their number format.
        weight_bytes: Of their weights in high precision.
        cosine: At the stage's output, the smallest over prompts and sampled steps.
        relative_error: There, the largest.
        velocity_cosine: The smallest over prompts and sampled steps; None for a stage after the loop.
        latent_error: Relative error of the final latents, the largest over prompts; None if not measured.
        psnr_db: Of the final video, the smallest over prompts; None if not measured, or infinite.
    """

    name: str
    block: str
    layers: tuple[str, ...]
    format: str
    weight_bytes: int
    cosine: float
    relative_error: float
    velocity_cosine: float | None
    latent_error: float | None
    psnr_db: float | None


@dataclass(frozen=True)
class SensitivityTable:
    """The rows of one stage and how they were measured; layers and blocks in execution order."""

    stage: str
    prompts: tuple[str, ...]
    seed: int
    shape: VideoShape
    steps: int
    sampled_steps: tuple[int, ...]
    layers: tuple[SensitivityRow, ...]
    blocks: tuple[SensitivityRow, ...]


@dataclass(frozen=True)
class SensitivityOptions:
    """How much is measured.

    Attributes:
        sampled_steps: Steps of the reference's trajectory on which the stage's output is compared, spread evenly from
            the first to the last.
        loop: Whether each row also samples a whole video.
        video: Whether it is decoded, too.
        blocks: Whether blocks are measured after the layers.
    """

    sampled_steps: int = 5
    loop: bool = True
    video: bool = False
    blocks: bool = True


def measure_sensitivity(
    run: ReferenceRun,
    variants: Variants,
    options: SensitivityOptions | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> SensitivityTable:
    """Quantise one layer at a time, then one block at a time.

    Args:
        run: The reference; its prompts are what is measured.
        variants: Of the same pipeline's stage, with scales for the layers to measure.
        options: How much is measured; None for the defaults.
        on_row: Called with (rows measured so far, rows to measure).

    Raises:
        VerificationError: If a layer in 8 bits gives numbers that are not finite.
        EngineError: If an engine fails.
    """
    options = options or SensitivityOptions()
    request = run.videos[0].request
    steps = spread_steps(request.steps, options.sampled_steps)
    checks = Checks(steps, options.loop or options.video, options.video)
    groups: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in variants.layers]
    if options.blocks:
        groups += list(blocks_of(variants.layers).items())
    rows = []
    for name, layers in groups:
        rows.append(_row(run, variants, name, layers, checks))
        if on_row is not None:
            on_row(len(rows), len(groups))
    count = len(variants.layers)
    return SensitivityTable(
        stage=variants.stage,
        prompts=tuple(video.request.prompt for video in run.videos),
        seed=request.seed,
        shape=request.shape,
        steps=request.steps,
        sampled_steps=steps,
        layers=tuple(rows[:count]),
        blocks=tuple(rows[count:]),
    )


def worst_layers(
    reference: Pipeline,
    scales: ScaleFile,
    formats: Mapping[str, Mapping[str, NumberFormat]],
    prompts: Sequence[str],
    seed: int,
    steps: int | None = None,
    shape: VideoShape | None = None,
    count: int = 5,
) -> list[str]:
    """Return the layers that lose most at their stage's output, worst first, as ``stage.layer``.

    Quick: three steps, and only the layers of the worst blocks of each stage are tried one by one.

    Args:
        reference: In high precision.
        scales: From a calibration.
        formats: Stage -> layer -> number format.
        prompts: One is enough.
        seed: Of the first prompt's noise.
        steps: Sampling steps; None means the reference's default.
        shape: Size of the videos; None means the reference's default.
        count: How many are named.

    Raises:
        CalibrationError: If a scale is missing.
        VerificationError: If a layer in 8 bits gives numbers that are not finite.
        EngineError: If an engine fails.
    """
    run = run_reference(reference, prompts, seed, steps, shape)
    checks = Checks(spread_steps(run.videos[0].request.steps, 3), loop=False, video=False)
    errors: dict[str, float] = {}
    for stage, layers in formats.items():
        variants = Variants(reference, stage, scales_of(scales, stage, layers))
        blocks = blocks_of(variants.layers)
        of_block = {name: _row(run, variants, name, inside, checks).relative_error for name, inside in blocks.items()}
        for block in sorted(blocks, key=lambda name: -of_block[name])[:_SCREENED_BLOCKS]:
            for layer in blocks[block]:
                errors[f"{stage}.{layer}"] = _row(run, variants, layer, (layer,), checks).relative_error
    return sorted(errors, key=lambda name: -errors[name])[:count]


def evaluate_kept(run: ReferenceRun, variants: Variants, kept: frozenset[str], metric: Metric) -> float:
    """Return the quality with every layer in 8 bits but those ``kept``, all prompts and steps, end to end."""
    checks = {Metric.PSNR: Checks(steps=()), Metric.COSINE: Checks(loop=False, video=False)}[metric]
    comparison = compare(run, _without(variants, kept), checks)
    if metric is Metric.PSNR:
        return float(np.median(comparison.psnr_db))
    return min((loss.cosine for losses in comparison.velocity for loss in losses), default=1.0)


def report_kept(run: ReferenceRun, variants: Variants, kept: frozenset[str]) -> QualityReport:
    """Return the full report with every layer in 8 bits but those ``kept``."""
    return summarise(run, compare(run, _without(variants, kept)))


def layer_costs(table: SensitivityTable, metric: Metric) -> dict[str, LayerCost]:
    """Return the table as what :func:`reelforge.calibration.budget.choose_recipe` takes.

    The energy of the error stands for a layer's loss: of the final latents for the PSNR, of the velocity for the
    cosine, whose distance from 1 is half of that energy where the error is orthogonal.
    """
    return {row.name: LayerCost(_loss(row, metric), row.weight_bytes) for row in table.layers}


def blocks_of(layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the blocks of layers, in order: what their names have up to the first number."""
    blocks: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        blocks[block_of(layer)] = (*blocks.get(block_of(layer), ()), layer)
    return blocks


def block_of(layer: str) -> str:
    """Return the name of a layer's block: ``single.3`` for ``single.3.fc1``."""
    match = re.match(r".*?\.\d+(?=\.|$)", layer)
    return match.group() if match else layer


def spread_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return up to ``count`` steps of ``steps``, evenly from the first to the last; of one, the last."""
    if count == 1:
        return (steps - 1,)
    return tuple(int(step) for step in np.unique(np.linspace(0, steps - 1, count).round().astype(int)))


def _without(variants: Variants, kept: frozenset[str]) -> Pipeline:
    return variants.pipeline_of([name for name in variants.layers if name not in kept])


def _row(run: ReferenceRun, variants: Variants, name: str, layers: tuple[str, ...], checks: Checks) -> SensitivityRow:
    comparison = compare(run, variants.pipeline_of(layers), checks)
    losses = comparison.stages[variants.stage]
    return SensitivityRow(
        name=name,
        block=block_of(layers[0]),
        layers=layers,
        format=variants.scales[layers[0]].number_format.name,
        weight_bytes=sum(variants.weight_bytes(layer) for layer in layers),
        cosine=min(loss.cosine for loss in losses),
        relative_error=max(loss.relative_error for loss in losses),
        velocity_cosine=min((loss.cosine for video in comparison.velocity for loss in video), default=None),
        latent_error=max((drift[-1] for drift in comparison.drift), default=None),
        psnr_db=_finite_psnr(comparison),
    )


def _finite_psnr(comparison: Comparison) -> float | None:
    smallest = min(comparison.psnr_db, default=np.inf)
    return float(smallest) if np.isfinite(smallest) else None


def _loss(row: SensitivityRow, metric: Metric) -> float:
    if metric is Metric.COSINE and row.velocity_cosine is not None:
        return 1 - row.velocity_cosine
    error = row.relative_error if row.latent_error is None else row.latent_error
    return error * error
