"""What ``build-engine`` shows: bars while it works, and tables about what it built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from reelforge.runtime.quality import QualityReport
from reelforge.tools import console

if TYPE_CHECKING:
    from reelforge.export.build_request import BuildEvents
    from reelforge.runtime.manifest import Manifest, StageEntry


@contextmanager
def shown(hidden: bool, on_stage: Callable[[StageEntry], None]) -> Iterator[BuildEvents]:
    """Show bars for weights, calibration and measuring, and a line per finished stage, on stderr."""
    from reelforge.export.build_request import BuildEvents

    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal, disable=hidden, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        finished: list[StageEntry] = []

        def update(name: str, done: int, total: int, amount: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, amount="")
            bars.update(tasks[name], completed=done, total=total, amount=amount)

        def weights(stage: str, done: int, total: int) -> None:
            amount = f"{console.format_bytes(done)} of {console.format_bytes(total)}"
            update(f"{stage} weights", done, total, amount)

        def work(what: str, done: int, total: int) -> None:
            update(what, done, total, f"{done} of {total}")

        def stage_done(entry: StageEntry) -> None:
            on_stage(entry)
            whole = whole_of(entry, finished)
            finished.append(entry)
            if not hidden:
                kinds = [f"{count} {operator}" for operator, count in entry.nodes.items()]
                nodes = ", ".join([*kinds[:4], *(["..."] if kinds[4:] else [])])
                total = sum(entry.nodes.values())
                size = console.format_bytes(sum(weight.length for weight in entry.weights))
                weights = f"{size:>10} weights" if whole is None else f"{size:>10} of {whole.name}'s"
                terminal.print(f"[bold]{entry.name:>12}[/bold]  {weights}  {total} nodes ({nodes})")

        yield BuildEvents(weights=weights, work=work, stage=stage_done, notice=console.print_notice)


def whole_of(entry: StageEntry, others: Iterable[StageEntry]) -> StageEntry | None:
    """Return the stage of which ``entry`` is another view: whose weights, the very bytes, include all of its own."""
    own = set(entry.weights)
    return next((other for other in others if own and own < set(other.weights)), None)


def node_table(manifest: Manifest) -> Table:
    """Operators of each stage, the most frequent first; a row per stage."""
    table = Table(title="nodes by type", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("nodes", justify="right")
    table.add_column("operators")
    for entry in manifest.stages:
        counts = sorted(entry.nodes.items(), key=lambda item: (-item[1], item[0]))
        operators = ", ".join(f"{operator} {count}" for operator, count in counts)
        table.add_row(entry.name, str(sum(entry.nodes.values())), operators)
    return table


def quality_table(quality: QualityReport) -> Table:
    """What quantisation costs, as the build's gate measured it."""
    count = len(quality.prompts)
    prompts = f"{count} held-out prompt{'s' if count > 1 else ''}"
    table = Table(title=f"against fp32: {prompts} of {quality.shape}, {quality.steps} steps")
    for heading in ("measure", "median", "worst"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    table.add_row("video PSNR", _decibels(quality.psnr_median_db), _decibels(quality.psnr_worst_db))
    table.add_row("video SSIM", f"{quality.ssim_median:.4f}", f"{quality.ssim_worst:.4f}")
    table.add_row("velocity cosine, worst prompt of a step", *_middle_and_worst(quality.velocity_cosine, min))
    table.add_row("latent drift, worst prompt of a step", *_middle_and_worst(quality.latent_drift, max))
    for name, stage in quality.stages.items():
        table.add_row(f"{name}: cosine", f"{stage.cosine_median:.5f}", f"{stage.cosine_min:.5f}")
        errors = (stage.relative_error_median, stage.relative_error_max)
        table.add_row(f"{name}: relative error", *(f"{error:.4f}" for error in errors))
    return table


def _middle_and_worst(values: tuple[float, ...], worst: Callable[[tuple[float, ...]], float]) -> tuple[str, str]:
    return f"{sorted(values)[len(values) // 2]:.5f}", f"{worst(values):.5f}"


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.2f} dB"
