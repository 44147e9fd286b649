"""Benchmark of quantising weights as a stream: ``python -m reelforge.tools.bench.quantise_weights``.

A DiT of 13 billion parameters in a sparse synthetic checkpoint, and a smaller one of the same width with random content
everywhere, are quantised to each format; in between, the same bytes are read, cast and written without scales. Numbers
of a busy machine are worth little: run it on an idle one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from reelforge.calibration.number_formats import FORMATS
from reelforge.tools.bench import report
from reelforge.tools.bench.memory import Usage, run_sampled
from reelforge.tools.synthesize import synthesize

PACKAGES = ("torch", "numpy", "ml_dtypes")
GOAL_BYTES, GOAL_RATIO = 2e9, 0.5
_CHILD = "reelforge.tools.bench.quantise_weights_child"
_SLICES = 3  # checkpoints with one block of each kind, 0.7 GB of quantised weights in each

_INTRODUCTION = """\
Every linear layer of the DiT's blocks, bf16, to 8-bit codes with one scale per output channel: one read; largest
magnitude, scale, division, rounding, SHA-256 and writing on the way; 2 threads, a tensor each. *Plain* reads the same
pieces, casts them as they are with PyTorch's direct cast to the 8-bit type (no scales), and hashes and writes them with
the same writer on as many threads. Both are processes of their own, run in turn; the time is from the first byte read
to the written file's fsync. GB are of bf16 read; memory is sampled every 20 ms over the whole process, imports
included."""
_SPARSE = """\
The 13-billion-parameter checkpoint, sparse: each tensor begins with 4 KB of its own values, the rest are holes that
read as zeros without touching the disk. Neither side's work depends on values, so this is a test of size."""
_RANDOM = """\
Three checkpoints of full width with one block of each kind and random values everywhere: real reads from the disk, and
casts of real numbers."""


@dataclass(frozen=True)
class Pass:
    """One measured pass."""

    seconds: float
    source_bytes: int
    tensors: int
    usage: Usage

    @property
    def speed(self) -> float:
        """In GB of source per second."""
        return self.source_bytes / 1e9 / self.seconds


@dataclass(frozen=True)
class Comparison:
    """Passes of one format over one set of checkpoints, taken in turn."""

    format_name: str
    quantised: tuple[Pass, ...]
    plain: tuple[Pass, ...]

    @property
    def ratio(self) -> float:
        """Median speed of quantising, the plain pass being 1."""
        return statistics.median(run.speed for run in self.quantised) / statistics.median(
            run.speed for run in self.plain
        )


def run_pass(checkpoints: Sequence[Path], output: Path, format_name: str, plain: bool) -> Pass:
    """Run one pass in a process of its own."""
    command = [sys.executable, "-m", _CHILD, *map(str, checkpoints), "--output", str(output), "--format", format_name]
    usage = run_sampled([*command, *["--plain"] * plain])
    result = json.loads(usage.output)
    os.sync()  # what the pass deleted is not the next one's business
    return Pass(result["seconds"], result["source_bytes"], result["tensors"], usage)


def compare(checkpoints: Sequence[Path], output: Path, repeats: int) -> list[Comparison]:
    """Quantise to each format and cast plainly in turn, ``repeats`` times."""
    comparisons = []
    for name in FORMATS:
        pairs = [[run_pass(checkpoints, output, name, plain) for plain in (False, True)] for _ in range(repeats)]
        quantised, plain = zip(*pairs, strict=True)
        comparisons.append(Comparison(name, quantised, plain))
    return comparisons


def section(work: Path, repeats: int) -> list[str]:
    """Measure everything below the empty folder ``work`` (20 GB free) and return the Markdown, without a title."""
    full = [synthesize(work / "full", "full")]
    size = compare(full, work / "bundle", repeats)
    shutil.rmtree(full[0])
    slices = [synthesize(work / f"slice{seed}", "block", seed=seed) for seed in range(_SLICES)]
    os.sync()
    content = compare(slices, work / "bundle", repeats)
    for path in slices:
        shutil.rmtree(path)
    return [
        _INTRODUCTION,
        "",
        f"{_SPARSE} {_amount(size)}",
        "",
        *_table(size),
        "",
        f"{_RANDOM} {_amount(content)}",
        "",
        *_table(content),
        "",
        *_goals(size, content),
    ]


def _amount(comparisons: Sequence[Comparison]) -> str:
    run = comparisons[0].quantised[0]
    return f"{run.tensors} weights, {run.source_bytes / 1e9:.2f} GB."


def _table(comparisons: Sequence[Comparison]) -> list[str]:
    rows = []
    for comparison in comparisons:
        for name, runs in (("quantised", comparison.quantised), ("plain", comparison.plain)):
            rows.append(
                (
                    comparison.format_name,
                    name,
                    report.spread([run.seconds for run in runs]),
                    report.spread([run.speed for run in runs], 2),
                    f"{comparison.ratio:.2f}" if name == "quantised" else "1",
                    f"{max(run.usage.peak_anonymous_bytes for run in runs) / 1e9:.2f}",
                    f"{max(run.usage.peak_file_bytes for run in runs) / 1e9:.2f}",
                )
            )
    headings = (
        "format",
        "",
        "seconds, median (min-max)",
        "GB/s",
        "of plain",
        "peak anonymous GB",
        "peak file-backed GB",
    )
    return report.table(headings, rows)


def _goals(size: Sequence[Comparison], content: Sequence[Comparison]) -> list[str]:
    memory = max(run.usage.peak_anonymous_bytes for item in size for run in item.quantised)
    rows = [("peak anonymous memory under 2 GB", f"{memory / 1e9:.2f} GB", _met(memory < GOAL_BYTES))]
    for name, comparisons in (("sparse", size), ("random", content)):
        worst = min(item.ratio for item in comparisons)
        rows.append((f"at least half the plain speed, {name}", f"{worst:.2f}", _met(worst >= GOAL_RATIO)))
    return report.table(("goal", "measured (worst format)", ""), rows)


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="Scratch folder, 20 GB free.  [default: a temporary one]")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(work: Path | None, repeats: int, output: Path) -> None:
    """Measure quantising weights as a stream and write Markdown to OUTPUT."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    command = f"python -m reelforge.tools.bench.quantise_weights --repeats {repeats} -o FILE"
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        lines = section(Path(scratch), repeats)
    report.write(output, ["# Quantising weights", "", *report.environment(command, PACKAGES), "", *lines])
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
