"""A profile on the terminal: a few tables. Knows profiles and rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from reelforge.tools import console
from reelforge.tools.profiling.compare import unequal_work
from reelforge.tools.profiling.layers import TOP
from reelforge.tools.profiling.schema import Advice, PhaseMemory, Profile, Summary, Timing
from reelforge.tools.profiling.schema_work import Ratio
from reelforge.tools.profiling.work import machine_words, options_words


def show(profile: Profile, screen: Console) -> None:
    """Print a profile."""
    work = profile.work
    what = f" on {work.target}: {work.height}x{work.width}x{work.frames}, {work.steps} steps; "
    screen.print(Text.assemble((work.bundle, "bold"), what, machine_words(profile.machine, work)))
    if options := options_words(work):
        screen.print(Text(", ".join(options)))
    if not profile.complete:
        screen.print(Text.assemble(("incomplete", "bold red"), f": {', '.join(profile.missing)} missing"))
    for table in _tables(profile):
        screen.print(table)
    if profile.comparison is not None:
        screen.print(_comparison_table(profile))
        if unequal := unequal_work(profile.comparison, work.bundle):
            screen.print(Text(unequal, style="bold yellow"))
    if profile.advice:
        screen.print(Text("what would speed it up", style="bold"))
    for line in _advice_lines(profile.advice):
        screen.print(Text(line))
    if profile.noise:
        screen.print(Text("how far to trust it", style="bold"))
    for note in profile.noise:
        screen.print(Text(f"· {note}", style="dim"))


def _advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    """Yield each action once, with how many of the largest layers it is for, and what it saves of them together."""
    by_action: dict[str, list[Advice]] = {}
    for one in advice:
        by_action.setdefault(one.action, []).append(one)
    for action, those in by_action.items():
        known = [one.saves_ms for one in those if one.saves_ms is not None]
        saves = f"; saves at most {sum(known):.3g} ms" if known else ""
        about = those[0].about if len(those) == 1 else f"{len(those)} of the largest layers"
        yield f"· {action} ({about}{saves})"


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
    on_gpu = " + in use of the GPU" if any(one.device_bytes is not None for one in warm.memory) else ""
    memory = ", ".join(f"{one.phase} {_sizes(one)}" for one in warm.memory)
    table.caption = f"peak memory, anonymous + file-backed{on_gpu}: {memory}" if memory else None
    table.caption_justify = "left"
    return table


def _sizes(memory: PhaseMemory) -> str:
    sizes = (memory.anonymous_bytes, memory.file_bytes, memory.device_bytes)
    return " + ".join(console.format_bytes(size) for size in sizes if size is not None)


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
    names = [escape(name) for name in (profile.work.bundle, other)]  # names may have brackets, as rich's marks do
    title = f"{names[1]} beside {names[0]}, {comparison.rounds} rounds"
    table = _table(title, "", *names, "ratio", f"{comparison.confidence:.0%} interval", "")
    for column in (table.columns[0], *table.columns[3:]):  # where it is narrow, the bundles' names are folded
        column.no_wrap = True
    for ratio in comparison.ratios:
        between = "" if ratio.low is None else f"{ratio.low:.2f}-{ratio.high:.2f}"
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
