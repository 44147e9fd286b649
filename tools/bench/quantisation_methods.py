"""What quantising the demonstration model's ``dit`` costs in the picture, by format, scale method and smoothing.

Every variant is the product's own build; it is compared with fp32 on the same noise by the gate's own comparison, on
prompts that no calibration saw. The module knows neither other quantisers nor times.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import click

from reelforge.calibration.budget import Choice, choose_recipe
from reelforge.calibration.comparison import compare
from reelforge.calibration.gate import summarise
from reelforge.calibration.reference_run import ReferenceRun, run_reference
from reelforge.calibration.scale_file import read_scale_file
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export.sensitivity import Metric, SensitivityOptions, evaluate_kept, layer_costs, measure_sensitivity
from reelforge.export.variants import Variants, scales_of
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import DEFAULT_PSNR_DB, QualityReport
from reelforge.runtime.recipe import Precision
from reelforge.tools.bench import report
from reelforge.tools.bench.calibration_data import (
    CALIBRATION_SEED,
    EVALUATION_SEED,
    calibration_requests,
    evaluation_requests,
)
from reelforge.tools.bench.quantisation_workbench import STAGE, Observed, Variant, Workbench

FORMATS = (Precision.INT8, Precision.FP8)
SMOOTHINGS = (None, 0.5)
RECIPE_METHOD, RECIPE_SMOOTHING = ScaleMethod.MAX, None
"""What mixed-precision recipes are chosen and built with."""

GOAL_COSINE = 0.999
RECIPE_COSINE = 0.9993
"""What a recipe must reach on the prompts that it is chosen on: others may be worse."""

RECIPE_PROMPTS = 24
"""Recipes are chosen on the calibration prompts and more: a step at which the model is sensitive is rare."""

_REPEAT_SEEDS = 100  # from one repeat's first noise to the next one's; more than there are prompts
_RECIPE_SEED = 50  # recipes are chosen on other noise than scales


@dataclass(frozen=True)
class Row:
    """What is measured: one line of the table. ``recipe`` marks layers kept by the budget."""

    precision: Precision
    method: ScaleMethod
    smoothing: float | None
    attention: bool = False
    recipe: bool = False

    def cells(self) -> tuple[str, ...]:
        """Return the line's first cells."""
        smoothing = "-" if self.smoothing is None else f"{self.smoothing:g}"
        other = "attention fp8" if self.attention else f"budget cosine {RECIPE_COSINE:g}" if self.recipe else "-"
        return (self.precision.value, self.method.value, smoothing, other)


ROWS = (
    *(Row(precision, method, smoothing) for precision in FORMATS for smoothing in SMOOTHINGS for method in ScaleMethod),
    *(Row(precision, RECIPE_METHOD, RECIPE_SMOOTHING, recipe=True) for precision in FORMATS),
    *(Row(precision, RECIPE_METHOD, RECIPE_SMOOTHING, attention=True) for precision in FORMATS),
)


@dataclass(frozen=True)
class Result:
    """One row in one repeat; ``kept_share`` of the layers' weight bytes is in high precision."""

    quality: QualityReport
    kept_share: float = 0.0
    kept: tuple[str, ...] = ()


def section(
    bench: Workbench, repeats: int, calibration: int, evaluation: int, recipe_prompts: int = RECIPE_PROMPTS
) -> list[str]:
    """Measure all rows and return the Markdown, without a title.

    Args:
        bench: Of the demonstration checkpoint.
        repeats: Each with other calibration prompts, calibration noise and evaluation noise.
        calibration: Prompts to calibrate with.
        evaluation: Prompts to compare videos of.
        recipe_prompts: Prompts to choose recipes on: those of the calibration first.
    """
    results: dict[Row, list[Result]] = {row: [] for row in ROWS}
    for repeat in range(repeats):
        for row, result in _measure(bench, repeat, calibration, evaluation, recipe_prompts).items():
            results[row].append(result)
    return [
        f"{calibration} calibration prompts, {evaluation} others to evaluate, all steps, the default size. Each of the",
        f"{repeats} repeats has other calibration prompts and noise, and other noise to evaluate: median",
        "(smallest-largest) over repeats; *worst* is over prompts, steps and repeats. *Cosine* is of each step's",
        "velocity on the reference's trajectory, of the worst prompt. *Kept* is the share of the blocks' weight bytes",
        "that stay in high precision. Budget rows are chosen as",
        f"`reelforge sensitivity --cosine-budget {RECIPE_COSINE:g} --no-loop` does, on {recipe_prompts} prompts, the",
        "calibration prompts among them and the evaluated ones not, with other noise; the margin over the goal is for",
        "the evaluated ones.",
        "",
        *_table(results),
        "",
        *_goals(results),
        "",
        *_kept(results),
    ]


def _measure(
    bench: Workbench, repeat: int, calibration: int, evaluation: int, recipe_prompts: int
) -> dict[Row, Result]:
    """Measure every row once."""
    trained = [request.prompt for request in calibration_requests(max(calibration, recipe_prompts), repeat)]
    prompts = trained[:calibration]
    seed = CALIBRATION_SEED + repeat * _REPEAT_SEEDS
    reference = Pipeline(bench.reference)
    others = [request.prompt for request in evaluation_requests(evaluation)]
    run = run_reference(reference, others, EVALUATION_SEED + repeat * _REPEAT_SEEDS)
    chosen_on = run_reference(reference, trained[:recipe_prompts], seed + _RECIPE_SEED)
    results = {}
    for smoothing in SMOOTHINGS:
        observed = bench.observe(prompts, seed, smoothing)
        for row in ROWS:
            if row.smoothing == smoothing:
                results[row] = _result(bench, observed, row, run, chosen_on)
                quality = results[row].quality
                click.echo(
                    f"repeat {repeat} {' '.join(row.cells())}: {quality.psnr_median_db:.2f} dB, worst cosine "
                    f"{quality.velocity_cosine_worst:.5f}, kept {results[row].kept_share:.1%}"
                )
    return results


def _result(bench: Workbench, observed: Observed, row: Row, run: ReferenceRun, chosen_on: ReferenceRun) -> Result:
    variant = Variant(
        row.precision,
        bench.scales(observed, row.precision, row.method),
        attention=Precision.FP8 if row.attention else None,
    )
    share, kept = 0.0, variant.kept
    if row.recipe:
        choice = _choose(bench, variant, chosen_on)
        share, kept = choice.kept_bytes / choice.total_bytes, choice.kept
        variant = Variant(row.precision, variant.scales, kept)
    with bench.candidate(variant) as candidate:
        return Result(summarise(run, compare(run, candidate)), share, kept)


def _choose(bench: Workbench, variant: Variant, run: ReferenceRun) -> Choice:
    """Choose layers to keep as ``reelforge sensitivity --cosine-budget --no-loop`` does."""
    layers = bench.formats(variant.precision)[STAGE]
    variants = Variants(run.pipeline, STAGE, scales_of(read_scale_file(variant.scales), STAGE, layers))
    table = measure_sensitivity(run, variants, SensitivityOptions(loop=False, blocks=False))
    costs = layer_costs(table, Metric.COSINE)
    return choose_recipe(costs, RECIPE_COSINE, lambda kept: evaluate_kept(run, variants, kept, Metric.COSINE))


def _table(results: dict[Row, list[Result]]) -> list[str]:
    headings = (
        "format",
        "method",
        "smoothing",
        "other",
        "PSNR dB, median",
        "worst",
        "SSIM, median",
        "cosine, median step",
        "worst step",
        "kept",
    )
    rows = []
    for row, repeats in results.items():
        qualities = [result.quality for result in repeats]
        rows.append(
            (
                *row.cells(),
                report.spread([quality.psnr_median_db for quality in qualities], 2),
                f"{min(quality.psnr_worst_db for quality in qualities):.2f}",
                report.spread([quality.ssim_median for quality in qualities], 4),
                report.spread([statistics.median(quality.velocity_cosine) for quality in qualities], 5),
                f"{_worst_cosine(repeats):.5f}",
                f"{statistics.median(result.kept_share for result in repeats):.1%}",
            )
        )
    return report.table(headings, rows)


def _goals(results: dict[Row, list[Result]]) -> list[str]:
    """Return one line per goal: which rows meet it, and which do not."""
    lines = []
    for precision in FORMATS:
        own = {row: repeats for row, repeats in results.items() if row.precision is precision}
        least = DEFAULT_PSNR_DB[precision.value]
        median = {
            row: statistics.median(result.quality.psnr_median_db for result in repeats) for row, repeats in own.items()
        }
        lines.append((f"{precision.value}: PSNR >= {least:g} dB", [row for row in own if median[row] >= least], own))
        at_every_step = [row for row, repeats in own.items() if _worst_cosine(repeats) >= GOAL_COSINE]
        goal = f"{precision.value}: cosine >= {GOAL_COSINE:g} at every step, of every prompt, in all repeats"
        lines.append((goal, at_every_step, own))
    return report.table(
        ("goal", "", "met by", "missed by"),
        [
            (
                goal,
                "met by all" if len(met) == len(own) else "met by some" if met else "**missed**",
                _names(met),
                _names([row for row in own if row not in met]),
            )
            for goal, met, own in lines
        ],
    )


def _names(rows: Sequence[Row]) -> str:
    return "; ".join(" ".join(cell for cell in row.cells()[1:] if cell != "-") for row in rows) or "-"


def _kept(results: dict[Row, list[Result]]) -> list[str]:
    """Return what the budget keeps in the first repeat."""
    return [
        f"- {row.precision.value}, kept in the first repeat: {', '.join(repeats[0].kept) or 'nothing'}"
        for row, repeats in results.items()
        if row.recipe
    ]


def _worst_cosine(repeats: Sequence[Result]) -> float:
    return min(result.quality.velocity_cosine_worst for result in repeats)
