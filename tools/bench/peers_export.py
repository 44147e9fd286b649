"""Compiling at the published width: ours at full depth, ``torch.onnx.export`` of diffusers' module at growing depth.

Each export is a process with a limit of memory and time; the first that fails ends the series. The module knows no
graph.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from reelforge.tools.bench import report
from reelforge.tools.bench.export import build
from reelforge.tools.bench.memory import Usage, status_fields
from reelforge.tools.synthesize import synthesize

CHILD = "reelforge.tools.bench.peers_export_child"
DEPTHS = ((1, 1), (2, 2), (4, 4), (8, 8), (12, 12), (16, 16), (20, 40))
FULL_WEIGHT_BYTES = 25.6e9
LIMIT_BYTES, LIMIT_S = 12 * 10**9, 300.0
STAGES = "refiner,modulation,dit"
_SAID = 160  # characters of an error that go into the table
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "bad_alloc")


@dataclass(frozen=True)
class Export:
    """One export.

    Attributes:
        double: Blocks of two streams.
        single: Blocks of one.
        weight_bytes: Of the module; 0 if it could not even be built.
        seconds: Of the export alone; None if it failed.
        peak_bytes: Anonymous memory of the process, over its whole life.
        failure: What ended it, or empty.
    """

    double: int
    single: int
    weight_bytes: int
    seconds: float | None
    peak_bytes: int
    failure: str = ""


def export(double: int, single: int, folder: Path, limit_bytes: int, limit_s: float, heads: int, width: int) -> Export:
    """Export a module in a process of its own.

    Args:
        double: Blocks of two streams.
        single: Blocks of one.
        folder: Scratch folder; removed.
        limit_bytes: Of its private memory.
        limit_s: After so many seconds it is killed.
        heads: Attention heads.
        width: Of a head.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a series that was interrupted
    folder.mkdir(parents=True)
    job = {"double": double, "single": single, "heads": heads, "width_of_head": width, "limit_bytes": limit_bytes}
    command = [sys.executable, "-m", CHILD, json.dumps({**job, "graph": str(folder / "graph.onnx")})]
    peak, started = 0, time.monotonic()
    log = folder / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        while process.poll() is None:
            peak = max(peak, status_fields(Path(f"/proc/{process.pid}/status")).get("RssAnon", 0))
            if time.monotonic() - started > limit_s:
                process.kill()
            time.sleep(0.02)
        output = process.stdout.read() if process.stdout is not None else ""
    said = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    facts = {key: value for line in said for key, value in line.items()}
    failure = ""
    if process.returncode:
        late = time.monotonic() - started > limit_s
        failure = _why(process.returncode, log.read_text(errors="replace"), late, "weight_bytes" in facts)
    shutil.rmtree(folder)
    return Export(double, single, facts.get("weight_bytes", 0), facts.get("export_s"), peak, failure)


def _why(status: int, errors: str, late: bool, made: bool) -> str:
    """Return what ended a process, and whether its module had been made by then."""
    phase = "during the export" if made else "before the module was made"
    if late:
        return f"out of time {phase}"
    if any(word in errors for word in _NO_MEMORY):
        return f"out of memory {phase}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    return f"status {status} {phase}" + (f": {last[:_SAID]}" if last else "")


def grow(depths: Sequence[tuple[int, int]], work: Path, limit_bytes: int, limit_s: float) -> list[Export]:
    """Export deeper and deeper modules until one fails."""
    exports = []
    for double, single in depths:
        exports.append(export(double, single, work / f"{double}+{single}", limit_bytes, limit_s, 24, 128))
        click.echo(f"{double}+{single}: {exports[-1]}", err=True)
        if exports[-1].failure:
            break
    return exports


def fit(exports: Sequence[Export]) -> tuple[float, float, float, float] | None:
    """Return slope and intercept of peak memory, and of seconds, over weight bytes; None if fewer than three ended."""
    done = [(one.weight_bytes, one.peak_bytes, one.seconds) for one in exports if one.seconds is not None]
    if len(done) < 3:
        return None
    weights, peaks, seconds = (np.array(column, np.float64) for column in zip(*done, strict=True))
    memory, times = np.polyfit(weights, peaks, 1), np.polyfit(weights, seconds, 1)
    return float(memory[0]), float(memory[1]), float(times[0]), float(times[1])


def ours(work: Path) -> tuple[Usage, int]:
    """Build the stages that diffusers' module is, at full size, in a process of its own; also return their weights."""
    checkpoint, bundle = work / "full", work / "full.bundle"
    for left in (checkpoint, bundle):  # by a run that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    synthesize(checkpoint, "full")
    usage = build(checkpoint, bundle, "--precision", "fp16", "--stages", STAGES)
    shutil.rmtree(bundle)
    shutil.rmtree(checkpoint)
    stages = json.loads(usage.output)["stages"]
    return usage, sum(stage["weights_bytes"] for stage in stages.values())


def our_section(work: Path) -> list[str]:
    """Return the section on ours; ``work`` must have 60 GB free."""
    return our_lines(*ours(work))


def our_lines(usage: Usage, weights: int) -> list[str]:
    """Return that section's Markdown."""
    return [
        *report.prose(
            f"`build-engine --precision fp16 --stages {STAGES}` of a synthetic sparse checkpoint, one run: the stages "
            "that diffusers' module is, at full depth (20 blocks of two streams, 40 of one). The time is of the whole "
            f"command: reading, hashing and checking {weights / 1e9:.1f} GB, capture, and writing what needs another "
            "order. Weights are referred to where they lie."
        ),
        "",
        *report.table(
            ("weights GB", "seconds", "peak anonymous GB"),
            [(f"{weights / 1e9:.1f}", f"{usage.seconds:.0f}", f"{usage.peak_anonymous_bytes / 1e9:.2f}")],
        ),
    ]


def section(work: Path, limit_bytes: int = LIMIT_BYTES, limit_s: float = LIMIT_S) -> list[str]:
    """Return the section on exports of diffusers' module; ``work`` must have 30 GB free."""
    return lines(grow(DEPTHS, work / "exports", limit_bytes, limit_s), limit_bytes, limit_s)


def lines(exports: Sequence[Export], limit_bytes: int, limit_s: float) -> list[str]:
    """Return that section's Markdown."""
    rows = [
        (
            f"{one.double}+{one.single}",
            f"{one.weight_bytes / 1e9:.1f}" if one.weight_bytes else "not made",
            f"{one.seconds:.0f}" if one.seconds is not None else "-",
            f"{one.peak_bytes / 1e9:.2f}",
            one.failure or "done",
        )
        for one in exports
    ]
    return [
        *report.prose(
            "HunyuanVideo's transformer at its published width (24 heads of 128, bf16, random weights), by blocks of "
            "two streams + blocks of one; the published depth is 20+40. The time is of "
            "`torch.onnx.export(dynamo=True, external_data=True)` alone; peak anonymous memory is of its process, over "
            f"its whole life. A process may take {limit_bytes / 1e9:.0f} GB of private memory and {limit_s:.0f} s with "
            "all that it imports, one run each; the series ends with the first that fails."
        ),
        "",
        *report.table(("blocks", "weights GB", "seconds", "peak anonymous GB", ""), rows),
        *_fit_lines(exports),
    ]


def _fit_lines(exports: Sequence[Export]) -> list[str]:
    found = fit(exports)
    if found is None:
        return []
    memory, memory_0, seconds, seconds_0 = found
    count = sum(one.seconds is not None for one in exports)
    return [
        "",
        *report.prose(
            f"**A linear fit, not a measurement,** through the {count} exports that ended: {memory:.1f} bytes of peak "
            f"memory per byte of weights and {memory_0 / 1e9:.1f} GB, {seconds * 1e9:.1f} s per GB of weights and "
            f"{seconds_0:.0f} s. At the published {FULL_WEIGHT_BYTES / 1e9:.1f} GB the line is at "
            f"{(memory * FULL_WEIGHT_BYTES + memory_0) / 1e9:.0f} GB and "
            f"{seconds * FULL_WEIGHT_BYTES + seconds_0:.0f} s."
        ),
    ]
