"""A profile on the terminal: a few tables. Knows profiles and rich."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reelforge.tools import console
from reelforge.tools.profiling.compare import unequal_work
from reelforge.tools.profiling.layers import TOP
from reelforge.tools.profiling.schema import Profile, Summary, Timing
from reelforge.tools.profiling.schema_work import Ratio
from reelforge.tools.profiling.work import options_words


def show(profile: Profile, screen: Console) -> None:
    """Print a profile."""
    work = profile.work
    screen.print(
        f"[bold]{work.bundle}[/bold] on {work.target}: {work.height}x{work.width}x{work.frames}, {work.steps} steps; "
        f"{profile.machine.gpu or profile.machine.processor}, {profile.machine.cores} cores",
        highlight=False,
    )
    if options := options_words(work):
        screen.print(Text(", ".join(options)))
    if not profile.complete:
        screen.print(f"[bold red]incomplete[/bold red]: {', '.join(profile.missing)} missing", highlight=False)
    for table in _tables(profile):
        screen.print(table)
    if profile.comparison is not None:
        screen.print(_comparison_table(profile))
        if unequal := unequal_work(profile.comparison, work.bundle):
            screen.print(Text(unequal, style="bold yellow"))
    for note in profile.noise:
        screen.print(Text(f"· {note}", style="dim"))


def _tables(profile: Profile) -> Iterator[Table]:
    if profile.warm is not None or profile.cold is not None:
        yield _parts_table(profile)
    if profile.warm is not None:
        yield _stage_table(profile.warm)
    if profile.layers is not None and profile.layers.layers:
        yield _layer_table(profile)


def _parts_table(profile: Profile) -> Table:
    cold, warm = profile.cold, profile.warm
    table = _table("where the time goes, ms", "part", "cold", "warm", "p95", "max")
    names = dict.fromkeys([*(cold.parts if cold else ()), *(warm.parts if warm else ())])
    for name in names:
        first = cold.parts.get(name) if cold else None
        table.add_row(name, _ms(first), *_spread(warm.parts.get(name) if warm else None))
    table.add_section()
    table.add_row("whole", _ms(cold.total if cold else None), *_spread(warm.total if warm else None))
    for label, first, second in single_rows(profile):
        table.add_row(label, _ms(first), *_spread(second))
    for name, copy in (warm.copies if warm else {}).items():
        table.add_row(name, _ms(cold.copies.get(name) if cold else None), *_spread(copy))
    return table


def single_rows(profile: Profile) -> Iterator[tuple[str, Timing | None, Timing | None]]:
    """Yield single steps and gaps: what, cold, warm. Skipped steps are apart, and said to be."""
    cold, warm = profile.cold, profile.warm
    skips = max(summary.skips for summary in (cold, warm) if summary)
    labels = {
        "steps": "one computed step" if skips else "one step",
        "skipped_steps": f"one skipped step ({skips} of {profile.work.steps})",
        "step_gaps": "gap between steps",
        "tile_gaps": "gap between tiles",
    }
    for of, label in labels.items():
        first, second = (getattr(summary, of) if summary else None for summary in (cold, warm))
        if first or second:
            yield label, first, second


def _stage_table(warm: Summary) -> Table:
    table = _table("stages, warm, ms", "stage", "share", "calls", "one call", "p95", "per video", "load")
    for stage in warm.stages:
        table.add_row(
            stage.stage,
            f"{stage.share:.0%}",
            str(stage.calls),
            _ms(stage.call),
            f"{stage.call.p95_ms:.1f}",
            _ms(stage.run),
            _ms(stage.load),
        )
    memory = ", ".join(
        f"{one.phase} {console.format_bytes(one.anonymous_bytes)} + {console.format_bytes(one.file_bytes)}"
        for one in warm.memory
    )
    table.caption = f"memory, anonymous + file-backed: {memory}" if memory else None
    table.caption_justify = "left"
    return table


def _layer_table(profile: Profile) -> Table:
    assert profile.layers is not None
    table = _table(f"the largest {TOP} layers", "layer", "stage", "share", "ms per video", "precision")
    for layer in profile.layers.layers[:TOP]:
        table.add_row(layer.words, layer.stage, f"{layer.share:.1%}", f"{layer.per_video_ms:.1f}", layer.precision)
    return table


def _comparison_table(profile: Profile) -> Table:
    comparison = profile.comparison
    assert comparison is not None
    other = comparison.other.bundle
    title = f"{other} beside {profile.work.bundle}, {comparison.rounds} rounds"
    table = _table(title, "", profile.work.bundle, other, "ratio", f"{comparison.confidence:.0%} interval", "")
    for ratio in comparison.ratios:
        between = "" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        times = (f"{ratio.bundle_ms:.1f}", f"{ratio.other_ms:.1f}")
        table.add_row(ratio.what, *times, f"{ratio.ratio:.2f}", between, verdict(ratio))
    return table


def verdict(ratio: Ratio) -> str:
    """Say what a ratio means for the other bundle."""
    if ratio.low is None or ratio.high is None:
        return "one round: no interval"
    if ratio.low > 1:
        return "slower"
    return "faster" if ratio.high < 1 else "no difference shown"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    return table


def _ms(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median_ms:.1f}"


def _spread(timing: Timing | None) -> tuple[str, str, str]:
    return ("", "", "") if timing is None else (_ms(timing), f"{timing.p95_ms:.1f}", f"{timing.max_ms:.1f}")
