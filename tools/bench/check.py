"""The regression guard: ``python -m reelforge.tools.bench.check``, or ``make bench-check``, from a checkout.

Ratios are measured on the demonstration model and compared with ``benchmarks/baseline.json``; absolute times never are.
A ratio fails if its median is above its tolerance in two measurements. What is measured is in ``check_measures``.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from reelforge.runtime.errors import RequestError, VerificationError
from reelforge.tools import console
from reelforge.tools.bench import report
from reelforge.tools.bench.baseline import (
    UPDATE,
    Baseline,
    Judged,
    Verdict,
    judge,
    read_baseline,
    spread_entry,
    updated,
    write_baseline,
)
from reelforge.tools.bench.check_measures import GROUPS, Group, Samples, Workbench
from reelforge.tools.inspect_receipts import slim_table

PACKAGES = ("onnxruntime", "numpy", "torch", "diffusers")
ATTEMPTS = 2
ENOUGH_RUNS = 3
SMALL = 0.1  # ratios below are shown with one more digit
WORK = Path("build/bench")
STYLES = {Verdict.WORSE: "bold red", Verdict.SAME: "green", Verdict.BETTER: "cyan"}


def tolerances(groups: Sequence[Group]) -> dict[str, float]:
    """Return the tolerance of every ratio by its name, in the order of measuring."""
    return {name: value for group in groups for name, value in group.tolerances.items()}


def measure(groups: Sequence[Group], bench: Workbench) -> dict[str, Samples]:
    """Return the samples of all ratios of ``groups``."""
    samples: dict[str, Samples] = {}
    for group in groups:
        started = time.monotonic()
        samples |= group.measure(bench)
        click.echo(f"measured {', '.join(group.tolerances)} in {time.monotonic() - started:.0f} s", err=True)
    return samples


def guard(baseline: Baseline, groups: Sequence[Group], bench: Workbench) -> list[Judged]:
    """Measure everything, and once more the groups with a ratio that got worse; the better median counts."""
    judged = {one.name: one for one in judge(baseline, measure(groups, bench))}
    for _ in range(ATTEMPTS - 1):
        again = [g for g in groups if any(judged[name].verdict is Verdict.WORSE for name in g.tolerances)]
        for one in judge(baseline, measure(again, bench)):
            judged[one.name] = min(judged[one.name], one, key=lambda each: each.ratio)
    return list(judged.values())


def show(judged: Sequence[Judged], baseline: Baseline) -> None:
    """Print the table on stdout."""
    table = slim_table(f"ratios against the baseline of commit {baseline.commit or 'unknown'}; lower is better")
    table.add_column("ratio", overflow="fold")
    for heading in ("baseline", "at most", "measured, median (range)", ""):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for one in judged:
        style = STYLES[one.verdict]
        digits = 4 if one.entry.ratio < SMALL else 3
        measured = report.spread(one.samples, digits)
        verdict = f"[{style}]{one.verdict.value}[/]"
        stored, limit = (f"{value:.{digits}f}" for value in (one.entry.ratio, one.entry.limit))
        table.add_row(one.name, stored, limit, measured, verdict)
    Console(highlight=False).print(table)


@click.command(epilog=console.EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--baseline", "path", default=Path("benchmarks/baseline.json"), show_default=True, type=click.Path(path_type=Path)
)
@click.option("--checkpoint", default=Path("demo/checkpoint"), show_default=True, type=click.Path(path_type=Path))
@click.option("--update", is_flag=True, help="Store what is measured now; tolerances in the file are kept.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --update: measure so often; of 3 and more the tolerances follow from how far the runs are apart.",
)
@click.option("--only", help="With --update: groups to measure, separated by commas.  [default: all]")
def main(path: Path, checkpoint: Path, update: bool, runs: int, only: str | None) -> None:
    """Compare ratios of times with the stored ones; the exit code is 6 if one got worse."""
    names = tolerances(GROUPS)
    groups = _chosen(only, update, runs)
    if update:
        baseline = read_baseline(path) if path.exists() else None
    else:
        baseline = read_baseline(path, names)
    if only is not None and baseline is not None and baseline.machine not in ("", report.machine()):
        raise RequestError(
            f"some of the ratios in {path} would be of another machine than the rest.",
            received=report.machine(),
            expected=baseline.machine,
            fix="leave --only out to store all of them, or give another file with --baseline",
        )
    if not checkpoint.is_dir():
        raise RequestError(
            f"there is no checkpoint at {checkpoint}.",
            expected="the demonstration checkpoint",
            fix="run this from a checkout's root, or give --checkpoint",
        )
    WORK.mkdir(parents=True, exist_ok=True)  # of the checkpoint's file system, most likely, so that links will do
    with tempfile.TemporaryDirectory(prefix="check-", dir=WORK) as folder:
        bench = Workbench(checkpoint, Path(folder))
        if update:
            _update(path, baseline, [measure(groups, bench) for _ in range(runs)], names)
            return
        assert baseline is not None
        judged = guard(baseline, GROUPS, bench)
    show(judged, baseline)
    verdict(judged, baseline, path)


def verdict(judged: Sequence[Judged], baseline: Baseline, path: Path) -> None:
    """Say what follows from the table.

    Raises:
        VerificationError: If a ratio got worse.
    """
    if baseline.machine != report.machine():
        console.print_notice(
            f"the baseline was measured on {baseline.machine or 'an unknown machine'}, not {report.machine()}"
        )
    better = [one.name for one in judged if one.verdict is Verdict.BETTER]
    if better:
        console.print_notice(f"better than the baseline allows for: {', '.join(better)}; to keep it: {UPDATE}")
    worse = [one for one in judged if one.verdict is Verdict.WORSE]
    if worse:
        raise VerificationError(
            f"{len(worse)} of {len(judged)} ratios got worse than {path} allows.",
            received=", ".join(f"{one.name} = {one.ratio:.3g}" for one in worse),
            expected=", ".join(f"at most {one.entry.limit:.3g}" for one in worse),
            fix=f"find what became slower; if it is meant to be, store it: {UPDATE}",
        )


def _chosen(only: str | None, update: bool, runs: int) -> Sequence[Group]:
    """Return the groups to measure.

    Raises:
        RequestError: If a group is not known, or the options are for another mode.
    """
    if (only or runs > 1) and not update:
        raise RequestError(
            "--runs and --only are for storing a baseline; a check measures everything.",
            received=f"--only {only}" if only else f"--runs {runs}",
            expected="--update beside it",
            fix="add --update, or leave it out",
        )
    known = {group.name: group for group in GROUPS}
    wanted = list(known) if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise RequestError(
            "there is no such group of ratios.",
            received=", ".join(unknown),
            expected=f"some of {', '.join(known)}",
            fix="leave --only out to measure all",
        )
    return [known[name] for name in wanted]


def _update(
    path: Path, before: Baseline | None, runs: Sequence[Mapping[str, Samples]], defaults: Mapping[str, float]
) -> None:
    """Store what runs measured; entries that were not measured stay."""
    samples = {name: tuple(one for run in runs for one in run[name]) for name in runs[0]}
    if len(runs) < ENOUGH_RUNS:
        entries = updated(before, samples, defaults)
    else:
        entries = {name: spread_entry([statistics.median(run[name]) for run in runs]) for name in samples}
    if before is not None and len(samples) < len(defaults):
        entries = {
            name: entries.get(name) or before.ratios[name] for name in defaults if name in entries | before.ratios
        }
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    after = Baseline(entries, report.machine(), report.versions(PACKAGES), report.commit(), today)
    write_baseline(path, after)
    show(judge(replace(before, ratios={**entries, **before.ratios}) if before else after, samples), before or after)
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    console.run(main)
