"""The ``reelforge sensitivity`` command: what each layer loses in 8 bits, and which to keep for a quality budget."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.recipe import EVERY_STAGE, Precision, QuantisationRecipe, VideoShape, parse_precisions
from reelforge.tools import console

if TYPE_CHECKING:
    from reelforge.calibration.budget import Choice
    from reelforge.calibration.reference_run import ReferenceRun
    from reelforge.export.sensitivity import Metric, SensitivityRow, SensitivityTable
    from reelforge.export.variants import Variants
    from reelforge.runtime.quality import QualityReport

SHOWN_ROWS = 20
_DEFAULT_STAGE = "dit"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Budget:
    metric: Metric
    value: float


@click.command("sensitivity", epilog=console.EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--scales", required=True, type=click.Path(path_type=Path), help="Scale file of `reelforge calibrate`.")
@click.option("--precision", required=True, help="What is tried: int8 or fp8, or dit=fp8 for a certain stage.")
@click.option("--stage", help="The stage, if --precision names several or none. [default: dit]")
@click.option("--prompts", type=click.Path(path_type=Path), help="Text file, one prompt per line. Built-in by default.")
@click.option("--prompt-count", default=2, show_default=True, type=click.IntRange(1), help="How many are used.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the first prompt's noise.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps; the bundle's default by default.")
@click.option("--shape", help="HEIGHTxWIDTHxFRAMES; the bundle's default by default.")
@click.option(
    "--steps-sampled",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="At how many steps the stage's output is compared, from the first to the last.",
)
@click.option("--no-loop", is_flag=True, help="Do not sample whole videos for each layer: much faster.")
@click.option("--video", is_flag=True, help="Decode those videos, too, and show their PSNR.")
@click.option(
    "--quality-budget",
    type=float,
    metavar="PSNR",
    help="Find the layers to keep for this median PSNR in dB.",
)
@click.option(
    "--cosine-budget",
    type=float,
    metavar="COSINE",
    help="Likewise for the cosine of every step's velocity.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file for the whole table.")
@click.option("--chart", type=click.Path(path_type=Path), help="PNG file for a bar chart; needs matplotlib.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="File for `build-engine --recipe`; needs one of the budgets."
)
def sensitivity(
    bundle: Path,
    scales: Path,
    precision: str,
    stage: str | None,
    prompts: Path | None,
    prompt_count: int,
    seed: int,
    steps: int | None,
    shape: str | None,
    steps_sampled: int,
    no_loop: bool,
    video: bool,
    quality_budget: float | None,
    cosine_budget: float | None,
    output: Path | None,
    chart: Path | None,
    recipe: Path | None,
) -> None:
    """Measure what each layer of a stage of BUNDLE costs when it alone is in 8 bits, then each block.

    BUNDLE is in fp32 or fp16. Losses are measured at the stage's output and at the end of the sampling loop, from the
    same noise. With a budget, the layers to keep in high precision are chosen by loss per byte, and the choice is
    measured end to end before it is written.

    \b
    Examples:
      reelforge sensitivity hv.bundle --scales hv.scales --precision int8 -o table.json --chart chart.png
      reelforge sensitivity hv.bundle --scales hv.scales --precision fp8 --cosine-budget 0.999 --recipe recipe.json
    """  # noqa: D301 - \b is click's mark for text that it does not wrap
    chosen, word = _stage_and_precision(precision, stage)
    _check_outputs(output, chart, recipe)
    size = None if shape is None else VideoShape.parse(shape)
    budget = _budget(quality_budget, cosine_budget, recipe, chosen)
    from reelforge.calibration.fingerprint import bundle_fingerprint
    from reelforge.calibration.prompts import DEFAULT_PROMPTS, read_prompts, split_prompts
    from reelforge.calibration.reference_run import run_reference
    from reelforge.calibration.scale_file import read_scale_file
    from reelforge.export.quantisation import NUMBER_FORMATS
    from reelforge.export.sensitivity import SensitivityOptions, measure_sensitivity, report_kept
    from reelforge.export.variants import Variants, formats_of, scales_of
    from reelforge.runtime.pipeline import Pipeline

    pipeline = Pipeline.open(bundle)
    formats = formats_of(pipeline, chosen, NUMBER_FORMATS[word])
    # The built-in prompts' first part is what scales are calibrated on by default.
    lines = split_prompts(DEFAULT_PROMPTS)[1] if prompts is None else read_prompts(prompts)
    scale_file = read_scale_file(scales, bundle_fingerprint(pipeline.bundle))
    variants = Variants(pipeline, chosen, scales_of(scale_file, chosen, formats))
    with _progress() as report:
        run = run_reference(
            pipeline,
            lines[:prompt_count],
            seed,
            steps,
            size,
            lambda progress: report(progress.phase, progress.step, progress.total),
        )
        options = SensitivityOptions(steps_sampled, loop=not no_loop, video=video)
        table = measure_sensitivity(run, variants, options, lambda done, total: report("layers, blocks", done, total))
        choice = None if budget is None else _choose(run, variants, table, budget, report)
        quality = None if choice is None else report_kept(run, variants, frozenset(choice.kept))
    _print(table, choice, quality)
    if output is not None:
        content = {"table": to_json(table), "choice": to_json(choice), "quality": to_json(quality)}
        _write(output, _json_bytes(content))
    if chart is not None:
        from reelforge.tools.sensitivity_chart import draw_chart

        _write(chart, draw_chart(table, () if choice is None else choice.kept))
    if recipe is not None and choice is not None:
        layers = {chosen: choice.kept} if choice.kept else {}
        content = {**to_json(QuantisationRecipe({chosen: word}, layers)), "quality": to_json(quality)}
        _write(recipe, _json_bytes(content))


def _stage_and_precision(text: str, stage: str | None) -> tuple[str, Precision]:
    """Return what to try, from ``--precision`` and ``--stage``."""
    words = {name: word for name, word in parse_precisions(text).items() if word.quantised}
    named = [name for name in words if name != EVERY_STAGE]
    chosen = stage or (named[0] if len(named) == 1 else _DEFAULT_STAGE if not named else None)
    word = None if chosen is None else words.get(chosen, words.get(EVERY_STAGE))
    if chosen is None or word is None:
        raise RequestError(
            "the command tries one stage in 8 bits at a time.",
            received=f"--precision {text}" + (f" --stage {stage}" if stage else ""),
            expected="int8 or fp8 for one stage",
            fix="write for example --precision dit=int8, or --precision dit=int8,llm=int8 --stage llm",
        )
    return chosen, word


def _budget(psnr: float | None, cosine: float | None, recipe: Path | None, stage: str) -> _Budget | None:
    from reelforge.export.sensitivity import Metric

    if psnr is not None and cosine is not None:
        raise RequestError(
            "two budgets are given.",
            received=f"--quality-budget {psnr:g} --cosine-budget {cosine:g}",
            expected="one of them",
            fix="choose by the one and look at the other in the result",
        )
    if psnr is None and cosine is None:
        if recipe is not None:
            raise RequestError(
                "--recipe needs a budget to choose layers for.",
                received=f"--recipe {recipe}",
                expected="--quality-budget or --cosine-budget",
                fix="add for example --quality-budget 40",
            )
        return None
    if cosine is not None and stage == "vae_decoder":
        raise RequestError(
            "no velocity depends on the stage 'vae_decoder'.",
            received=f"--cosine-budget {cosine:g}",
            expected="--quality-budget",
            fix="add for example --quality-budget 40",
        )
    return _Budget(Metric.PSNR, psnr) if psnr is not None else _Budget(Metric.COSINE, cosine or 0.0)


def _choose(run: ReferenceRun, variants: Variants, table: SensitivityTable, budget: _Budget, report: Report) -> Choice:
    from reelforge.calibration.budget import choose_recipe, most_evaluations
    from reelforge.export.sensitivity import evaluate_kept, layer_costs

    costs = layer_costs(table, budget.metric)
    done = 0

    def evaluate(kept: frozenset[str]) -> float:
        nonlocal done
        done += 1
        quality = evaluate_kept(run, variants, kept, budget.metric)
        report("recipes", done, most_evaluations(len(costs)))
        return quality

    return choose_recipe(costs, budget.value, evaluate)


def _check_outputs(output: Path | None, chart: Path | None, recipe: Path | None) -> None:
    """Refuse, before any work, what could not be written after it."""
    for path, suffix in ((output, ""), (chart, ".png"), (recipe, "")):
        if path is not None and (not path.parent.is_dir() or path.is_dir() or not path.name.lower().endswith(suffix)):
            raise OutputError(
                f"the result cannot be written to '{path}'.",
                expected="a file" + (f" whose name ends in {suffix}," if suffix else "") + " in a folder that exists",
                fix="choose another path",
            )
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "matplotlib is not installed, which draws the chart.",
            received=f"--chart {chart}",
            fix="pip install matplotlib, or leave --chart out",
        )


def _print(table: SensitivityTable, choice: Choice | None, quality: QualityReport | None) -> None:
    out = Console()
    out.print(_rich_table(f"layers of {table.stage}, each alone in {_format(table)}", table.layers))
    if table.blocks:
        out.print(_rich_table("blocks", table.blocks))
    if choice is None or quality is None:
        return
    share = choice.kept_bytes / max(1, choice.total_bytes)
    out.print(
        f"kept in high precision: {len(choice.kept)} of {len(table.layers)} layers, "
        f"{console.format_bytes(choice.kept_bytes)} of {console.format_bytes(choice.total_bytes)} ({share:.1%}); "
        f"{choice.evaluations} recipes were run"
    )
    if choice.kept:
        out.print("  " + ", ".join(choice.kept), highlight=False)
    out.print(
        f"measured with them: median PSNR {quality.psnr_median_db:.2f} dB, worst {quality.psnr_worst_db:.2f} dB, SSIM "
        f"{quality.ssim_median:.4f}, smallest velocity cosine {quality.velocity_cosine_worst:.5f}"
    )


def _rich_table(title: str, rows: Sequence[SensitivityRow]) -> Table:
    """Return a table of the worst rows, worst first; columns that nothing was measured for are left out."""
    shown = sorted(rows, key=lambda row: -row.relative_error)[:SHOWN_ROWS]
    more = f"; {len(rows) - len(shown)} more in the JSON file" if len(shown) < len(rows) else ""
    table = Table(title=f"{title}: worst first{more}")
    loop = any(row.latent_error is not None for row in rows)
    video = any(row.psnr_db is not None for row in rows)
    for heading, present in (
        ("", True),
        ("weight", True),
        ("relative error", True),
        ("cosine", True),
        ("final latents", loop),
        ("video PSNR", video),
    ):
        if present:
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in shown:
        cells = [row.name, console.format_bytes(row.weight_bytes), f"{row.relative_error:.4f}", f"{row.cosine:.5f}"]
        cells += ["-" if row.latent_error is None else f"{row.latent_error:.4f}"] if loop else []
        cells += ["equal" if row.psnr_db is None else f"{row.psnr_db:.2f} dB"] if video else []
        table.add_row(*cells)
    return table


def _format(table: SensitivityTable) -> str:
    return table.layers[0].format if table.layers else "8 bits"


@contextmanager
def _progress() -> Iterator[Report]:
    """Show one bar per phase on stderr, which goes away at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)

        yield report


def _json_bytes(content: object) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file: complete, or not at all."""
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"the result cannot be written to '{path}': {error.strerror or error}.",
            expected="a file in a folder that this user may write",
            fix="choose another path",
        ) from error
