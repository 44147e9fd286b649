"""The report's sections over time: what happened when, and the latency of each sampling step.

A step that a step cache skipped is shown as such in both. Knows profiles and the charts' building blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelforge.tools.profiling.report_charts import (
    Area,
    Axis,
    Bar,
    Dot,
    Line,
    lanes,
    legend,
    milliseconds,
    plot,
    text,
)
from reelforge.tools.profiling.schema import Kind, Profile, RunRecord, Span
from reelforge.tools.profiling.statistics import timing
from reelforge.tools.profiling.summary import of_kind, steps_of

_LANES: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("host", (Kind.START, Kind.IMPORT, Kind.OPEN, Kind.TOKENISE, Kind.HOST)),
    ("load", (Kind.LOAD,)),
    ("steps", (Kind.STEP, Kind.SKIPPED_STEP)),
    ("run", (Kind.RUN,)),
    ("copies", (Kind.COPY,)),
    ("file", (Kind.ENCODE,)),
)


def section(title: str, about: str, content: str) -> str:
    """Return a section of the page; ``content`` is HTML."""
    return f'<section><h2>{text(title)}</h2><p class="small muted">{text(about)}</p>{content}</section>'


def timeline(profile: Profile) -> str:
    """Show the cold run and the median warm one."""
    shown = []
    cold = next((record for record in profile.runs if record.temperature == "cold"), None)
    if cold is not None:
        shown.append(("Cold run", cold))
    if (warm := median_run(profile)) is not None:
        shown.append(("Warm run, the median one", warm))
    if not shown and profile.runs:
        shown.append(("The last run", profile.runs[-1]))
    content = ""
    for title, record in shown:
        axis = Axis(0.0, max(record.total_ms, 1e-6), "ms")
        rows = [(name, bars) for name, kinds in _LANES if (bars := _lane(record, kinds))]
        if not of_kind(record, Kind.SKIPPED_STEP):  # the lane of engines shows the others already
            rows = [(name, bars) for name, bars in rows if name != "steps"]
        content += f"<h3>{text(title)}: {milliseconds(record.total_ms)}</h3>" + lanes(rows, axis)
    stages = dict.fromkeys(span.stage for _, record in shown for span in of_kind(record, Kind.RUN))
    entries = [(stage, stage) for stage in stages] + [("host", "host")]
    if any(of_kind(record, Kind.SKIPPED_STEP) for _, record in shown):
        entries.append(("a skipped step", "skipped"))
    return section("Timeline", "What happened when.", legend(entries) + content) if content else ""


def _lane(record: RunRecord, kinds: tuple[Kind, ...]) -> list[Bar]:
    return [
        Bar(
            span.start_ms,
            span.end_ms,
            "skipped" if span.kind is Kind.SKIPPED_STEP else span.stage or "host",
            span.name,
            f"{span.name}: {milliseconds(span.duration_ms)}",
            marked=span.kind is Kind.SKIPPED_STEP,
        )
        for span in sorted(record.spans, key=lambda span: span.start_ms)
        if span.kind in kinds
    ]


def median_run(profile: Profile) -> RunRecord | None:
    """Return the counted warm run of this bundle whose time is nearest to the median."""
    if profile.warm is None:
        return None
    median = profile.warm.total.median_ms
    return min(counted_runs(profile), key=lambda record: abs(record.total_ms - median), default=None)


def counted_runs(profile: Profile) -> list[RunRecord]:
    """Return the warm runs of this bundle that the summary counts."""
    warm = [one for one in profile.runs if one.temperature == "warm" and one.bundle == profile.work.bundle]
    # The last round of an interrupted comparison does not count, though this bundle's run may have been finished.
    count = 0 if profile.warm is None else profile.warm.runs
    return [one for one in warm[profile.warmup :] if one.complete][:count]


def steps(profile: Profile) -> str:
    """Show the latency of every step of every counted run; lines join computed steps, dots are skipped ones."""
    runs = [found for record in counted_runs(profile) if (found := steps_of(record))]
    if not runs or len(runs[0]) < 2:
        return ""
    count = min(len(run) for run in runs)
    computed = [_points(run[:count], Kind.STEP) for run in runs]
    skipped = [_points(run[:count], Kind.SKIPPED_STEP) for run in runs]
    medians, left_out = _medians(computed), _medians(skipped)
    flat = timing([value for run in computed for _, value in run])
    top = min(flat.max_ms, 3 * max(flat.p95_ms, *(value for _, value in medians)))
    x, y = Axis(1.0, float(count), "sampling step"), Axis(0.0, top * 1.05, "ms")
    shapes: list[Line | Area] = [Line(run, "host", 1.0, opacity=0.55) for run in computed]
    shapes.append(Line([(1.0, flat.p95_ms), (float(count), flat.p95_ms)], "vae_decoder", 1.5, dashed=True))
    shapes.append(Line(medians, "dit", 3.0))
    entries = [("each run", "host"), ("median over runs", "dit")]
    whose = "computed steps" if left_out else "all steps"
    entries.append((f"95 % of {whose} are below", "vae_decoder"))
    caption = f"Median {milliseconds(flat.median_ms)}, p95 {milliseconds(flat.p95_ms)}, max {milliseconds(flat.max_ms)}"
    about = "Latency of each sampling step, with the host's part."
    dots = []
    if left_out:
        entries.append(("skipped by the step cache, median", "skipped"))
        each = timing([value for run in skipped for _, value in run])
        caption = f"Computed: {caption[0].lower()}{caption[1:]}. Skipped: median {milliseconds(each.median_ms)}"
        about += f" {len(left_out)} of {count} steps were skipped: lines join the computed ones."
        for at, value in left_out:
            dots.append(Dot(at, value, "skipped", f"step {at:.0f}, skipped: {milliseconds(value)}"))
        dots += [Dot(at, value, "dit", f"step {at:.0f}: {milliseconds(value)}") for at, value in medians]
    return section("Steps", about, legend(entries) + plot(x, y, shapes, dots, caption))


def _points(run: Sequence[Span], kind: Kind) -> list[tuple[float, float]]:
    """Return number and milliseconds of a run's steps of one kind."""
    return [(float(number), span.duration_ms) for number, span in enumerate(run, start=1) if span.kind is kind]


def _medians(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the median of each step over the runs that have it; a step is where most runs have it."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for number, value in run:
            found.setdefault(number, []).append(value)
    return [(number, timing(found[number]).median_ms) for number in sorted(found) if 2 * len(found[number]) > len(runs)]
