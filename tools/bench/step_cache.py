"""Measures step caching on the demonstration checkpoint and writes ``benchmarks/step_cache.md`` and its plot.

Run from the repository root: ``python -m reelforge.tools.bench.step_cache --work DIR``. Videos come from the bundle's
own pipeline, are compared with the full run from the same noise, and judged by ``demo.train.checker``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import click

from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import Backend, Target
from reelforge.runtime.request import Request
from reelforge.runtime.step_cache.measure import measure_ratios, measure_rescaling
from reelforge.tools.bench import report
from reelforge.tools.bench.demo_model import held_out_cases
from reelforge.tools.bench.step_cache_chart import GOAL_DB, GOAL_FACTOR, draw_chart
from reelforge.tools.bench.step_cache_overhead import overhead_us
from reelforge.tools.bench.step_cache_runs import Point, Setting, line, measure, settings_of

FEWER = "fewer steps"
GOAL_HOST_US = 100.0
LONG_STEPS = 50
EXPLAINED = (
    "PSNR compares the frames, in [0, 1], with those of the full run from the same noise: of the mean squared error "
    'over all videos, and of the worst video. "Above fewer steps" is the distance from the line of runs with fewer '
    'steps at the same number of evaluations, interpolated between whole numbers. "Right" is the share of videos that '
    "show colour, shape, motion and background of the prompt. The loop is timed from the end of the first step to the "
    "end of the last: median, and the range over prompts and repeats. Other work ran on the machine meanwhile; the "
    "time that the process computed (CPU, one thread) hardly depends on it. This checkpoint's steps take milliseconds, "
    "so that what a skipped step still costs is visible; at the released size a step takes seconds.",
    "",
    '"As published" reuses as the papers do: EasyCache and MagCache keep the residual, velocity minus latents, of the '
    "last computed step (`reuse=residual`), TeaCache and first-block cache what the blocks added to the tokens "
    "(`reuse=tokens`: what those after the first block added, for both), and all but MagCache then have no limit on "
    "runs of skipped steps. The others continue the line through the last two computed velocities, which is the "
    "default. MagCache's residual is the paper's, of velocity and latents; its authors' code takes that of the tokens. "
    "The first two steps and the last are always computed, which TeaCache and first-block cache as published do not "
    "ask for beyond the first (and TeaCache the last).",
    "",
    "An evaluation is one of all blocks. With first-block cache, and wherever tokens are reused, a skipped step still "
    "costs the first block: here one of 6, of the released model one of 60.",
)
CALIBRATION_PROMPT = "a blue square moving right on a gray background"
TEACACHE_PROMPTS = (
    CALIBRATION_PROMPT,
    "a red circle moving up on a white background",
    "a green triangle moving left on a black background",
    "a yellow circle moving down on a gray background",
)
HEADINGS = (
    "setting", "evaluations", "times fewer", "PSNR, dB", "lowest, dB", "above fewer steps, dB", "lowest above, dB",
    "right", "loop, ms", "loop, CPU ms", "faster (CPU)",
)  # fmt: skip


def rows(points: Sequence[Point]) -> list[list[str]]:
    """Return the table of all points, the full run first."""
    full, *others = points
    fewer = [full, *(one for one in others if one.setting.series == FEWER)]
    made = []
    for one in points:
        above = [_above(one, fewer, lowest=lowest) for lowest in (False, True)]
        made.append(
            [
                f"{one.setting.series} {one.setting.label}",
                f"{one.mean_evaluations:.1f} ({min(one.evaluations)}-{max(one.evaluations)})",
                f"{full.mean_evaluations / one.mean_evaluations:.2f}",
                _db(one.psnr_db),
                _db(one.lowest_db),
                *("" if value is None else f"{value:+.1f}" for value in above),
                f"{one.accuracy:.3f}",
                *(report.spread([seconds * 1e3 for seconds in times], 0) for times in (one.loop_s, one.cpu_s)),
                f"{statistics.median(full.cpu_s) / statistics.median(one.cpu_s):.2f}",
            ]
        )
    return made


def verdicts(points: Sequence[Point]) -> list[str]:
    """Return what the goals came to, as Markdown."""
    full, *others = points
    fewer = [full, *(one for one in others if one.setting.series == FEWER)]
    cached = [one for one in others if one.setting.series != FEWER and math.isfinite(one.psnr_db)]
    reached = [
        one
        for one in cached
        if full.mean_evaluations / one.mean_evaluations >= GOAL_FACTOR and one.lowest_db >= GOAL_DB
    ]
    best = max(reached, key=lambda one: one.lowest_db, default=None)
    lines = [f"- Goal: at least {GOAL_FACTOR}x fewer evaluations at {GOAL_DB:.0f} dB or more."]
    if best is None:
        lines[-1] += " **Missed.**"
    else:
        factor = full.mean_evaluations / best.mean_evaluations
        lines[-1] += (
            f" **Met**, also by the worst video, by {len(reached)} of {len(cached)} settings; the closest to the full "
            f"run is {best.setting.series} {best.setting.label}: {factor:.2f}x fewer, {best.psnr_db:.1f} dB, worst "
            f"video {best.lowest_db:.1f} dB."
        )
    lines += ["- Goal: never worse than simply using fewer steps, in dB above their line:"]
    for series in dict.fromkeys(one.setting.series for one in cached):
        said = []
        for words, lowest in (("all videos together", False), ("the worst video", True)):
            above = [_above(one, fewer, lowest=lowest) for one in cached if one.setting.series == series]
            known = [value for value in above if value is not None]
            if not known:
                continue
            worse = [value for value in known if value < 0]
            verdict = "**met**" if not worse else f"**missed** by {len(worse)} of {len(known)} settings"
            said.append(f"for {words} {verdict} ({min(known):+.1f} to {max(known):+.1f})")
        lines.append(f"  - {series}: {', '.join(said) or 'no setting skips enough to compare'}.")
    return lines


def overhead() -> list[str]:
    """Return what the host does per step besides its engines, as Markdown."""
    ways = (("computed, without a cache", None), ("computed, with EasyCache", 0.0), ("skipped by EasyCache", 1.0))
    median_us = {words: statistics.median(overhead_us(threshold)) for words, threshold in ways}
    worst = max(median_us.values())
    said = ", ".join(f"{words} {value:.0f}" for words, value in median_us.items())
    return [
        f"Host's time per step besides engines, in microseconds, median of some 1900 steps on engines that do nothing: "
        f"{said}. Goal: below {GOAL_HOST_US:.0f}. **{'Met' if worst < GOAL_HOST_US else 'Missed'}**. Not in it: what "
        "ONNX Runtime needs to bind arrays, of which a skipped step has two calls and a computed one one or two."
    ]


def _above(point: Point, fewer: Sequence[Point], *, lowest: bool) -> float | None:
    """Return by how many dB a point lies above the line of fewer steps; None on the line and where there is none.

    The line is interpolated between whole numbers of steps; one step less than the full run is its upper end.
    """
    known = [one for one in fewer if math.isfinite(one.psnr_db)]
    inside = min(one.mean_evaluations for one in known) <= point.mean_evaluations
    inside = inside and point.mean_evaluations <= max(one.mean_evaluations for one in known)
    if point.setting.series in (FEWER, fewer[0].setting.series) or not inside or not math.isfinite(point.psnr_db):
        return None
    here = point.lowest_db if lowest else point.psnr_db
    return here - line(known, lambda one: one.lowest_db if lowest else one.psnr_db, point.mean_evaluations)


def _db(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def section(points: Sequence[Point], steps: int, cases: int, picture: str) -> list[str]:
    """Return the Markdown about one number of steps."""
    return [
        f"## {steps} steps",
        "",
        f"{cases} held-out prompts, each with noise of its own.",
        "",
        *verdicts(points),
        "",
        *([f"![PSNR over evaluations saved]({picture})", ""] if picture else []),
        *report.table(HEADINGS, rows(points)),
    ]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the bundle; kept.")
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), default=Path("demo/checkpoint"))
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/step_cache.md"))
@click.option("--cases", default=16, show_default=True, help="Prompts with the model's own number of steps.")
@click.option("--long-cases", default=6, show_default=True, help="Prompts with 50 steps, as the papers have.")
@click.option("--repeats", default=1, show_default=True, help="Of every generation, for the times.")
@click.option("--threads", default=1, show_default=True, help="Threads per operator.")
def main(work: Path, checkpoint: Path, output: Path, cases: int, long_cases: int, repeats: int, threads: int) -> None:
    """Build the bundle, measure, and write the report and the plot."""
    bundle = work / "demo-fp32-parted.bundle"
    if not bundle.exists():
        from reelforge.export.build import build_bundle
        from reelforge.export.build_request import BuildRequest

        work.mkdir(parents=True, exist_ok=True)
        build_bundle(BuildRequest(checkpoint, bundle, Target(Backend.CPU), parted=True))
    every = held_out_cases()
    picture = output.with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    sections: list[str] = []
    notes: list[str] = []
    with Pipeline.open(bundle, threads=threads) as pipeline:
        own_steps, shift = pipeline.spec.defaults.steps, pipeline.spec.defaults.shift
        for steps, count in ((own_steps, cases), (LONG_STEPS, long_cases)):
            if not count:
                continue
            chosen = every[:: max(len(every) // count, 1)][:count]
            ratios = measure_ratios(pipeline, [Request(CALIBRATION_PROMPT, steps=steps, seed=1000)])
            ratios.write(work / f"ratios-{steps}.json")
            calibration = [
                Request(prompt, steps=steps, seed=1000 + number) for number, prompt in enumerate(TEACACHE_PROMPTS)
            ]
            rescaling = measure_rescaling(pipeline, calibration)
            rescaling.write(work / f"coefficients-{steps}.json")
            full = Setting("full run", f"{steps} steps", steps)
            settings = settings_of(steps, work / f"ratios-{steps}.json", work / f"coefficients-{steps}.json")
            points = measure(pipeline, chosen, settings, full, repeats, click.echo)
            if steps == own_steps:
                picture.write_bytes(draw_chart(points, steps))
            sections += ["", *section(points, steps, count, picture.name if steps == own_steps else "")]
            listed = ", ".join(f"{ratio:.3f}" for ratio in ratios.ratios)
            notes += ["", f"MagCache's ratios, {steps} steps, from one prompt ({CALIBRATION_PROMPT!r}): {listed}."]
            powers = ", ".join(f"{one:.4g}" for one in rescaling.coefficients)
            notes += [
                "",
                f"TeaCache's coefficients, {steps} steps, from {len(TEACACHE_PROMPTS)} prompts that are not among the "
                f"held-out ones: {powers}, for changes of {rescaling.least:.3f} to {rescaling.most:.3f}; the measured "
                f"changes of the velocity lie {rescaling.deviation:.3f} off (root of the mean square).",
            ]
            command = f"python -m reelforge.tools.bench.step_cache --work DIR --cases {cases} --long-cases {long_cases}"
            lines = [
                "# Step caching",
                "",
                *report.environment(f"{command} --repeats {repeats}", ("reelforge", "onnxruntime", "numpy")),
                f"- the demonstration checkpoint in fp32, shift {shift:g}; {repeats} generation"
                f"{'s' if repeats > 1 else ''} of each case; {threads} thread{'s' if threads > 1 else ''}",
                "",
                *EXPLAINED,
                "",
                *overhead(),
                *sections,
                *notes,
            ]
            report.write(output, lines)
    click.echo(f"wrote {output} and {picture}")


if __name__ == "__main__":
    main()
