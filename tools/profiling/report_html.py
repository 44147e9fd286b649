"""The report: one HTML file that needs no network, no script and no fonts of its own.

Puts a profile's numbers into sections; how charts are drawn is in ``report_charts``, what they look like in
``report_style``. Whatever is missing in an incomplete profile is left out, and the page says so at its top.
"""

from __future__ import annotations

from reelforge.tools.console import format_bytes
from reelforge.tools.profiling import report_memory, report_steps
from reelforge.tools.profiling import report_sections as sections
from reelforge.tools.profiling.report_charts import milliseconds, text
from reelforge.tools.profiling.report_style import style_sheet
from reelforge.tools.profiling.schema import Profile, Timing
from reelforge.tools.profiling.work import machine_words, options_words


def report(profile: Profile) -> str:
    """Return the page."""
    body = "".join(
        (
            _header(profile),
            _tiles(profile),
            _noise(profile),
            sections.comparison(profile),
            report_steps.timeline(profile),
            sections.parts(profile),
            sections.stages(profile),
            report_steps.steps(profile),
            sections.blocks(profile),
            sections.largest_layers(profile),
            sections.roofline(profile),
            report_memory.memory(profile),
            _method(profile),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(profile.work.bundle)}: profile</title><style>{style_sheet()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(profile: Profile) -> str:
    work = profile.work
    options = "".join(f"<br>{text(option)}" for option in options_words(work))
    video = (
        f"{work.width}x{work.height} pixels, {work.frames} frame{'s' if work.frames > 1 else ''}, {work.steps} steps"
    )
    tiles = f"{work.tiles} decoder tile{'s' if work.tiles > 1 else ''}"
    precisions = sorted(set(work.precision.values()))
    banner = ""
    if not profile.complete:
        missing = ", ".join(profile.missing)
        banner = (
            '<section class="banner" role="alert">This profile is incomplete: it ended before all was measured. '
            f"Missing: {text(missing)}.</section>"
        )
    return (
        f"<header><h1>{text(work.bundle)}</h1>"
        f'<p class="muted">{text(work.family)} for {text(work.target)}, {text(" and ".join(precisions))} &middot; '
        f"{text(video)} ({work.image_tokens:,} image tokens, {tiles}){options}<br>"
        f"{text(machine_words(profile.machine, work))} &middot; {text(_when(profile.created))}</p></header>{banner}"
    )


def _when(created: str) -> str:
    """Return a time of ISO 8601 as people write it."""
    return created.replace("T", " ").replace("+00:00", " UTC")


def _tiles(profile: Profile) -> str:
    warm, cold = profile.warm, profile.cold
    tiles: list[tuple[str, str, str]] = []
    if warm is not None:
        tiles.append(("a video, warm", milliseconds(warm.total.median_ms), _range(warm.total)))
        if warm.steps is not None:
            skips = f"; {warm.skips} of {profile.work.steps} skipped" if warm.skips else ""
            spread = f"95 % below {milliseconds(warm.steps.p95_ms)}, at most {milliseconds(warm.steps.max_ms)}"
            name = "a computed step" if warm.skips else "a step"
            tiles.append((name, milliseconds(warm.steps.median_ms), spread + skips))
    if cold is not None:
        tiles.append(("the first video, cold", milliseconds(cold.total.median_ms), "from starting Python to the file"))
    summary = warm or cold
    if summary is not None and summary.memory:
        peak = max(summary.memory, key=lambda phase: phase.anonymous_bytes)
        mapped = max(phase.file_bytes for phase in summary.memory)
        tiles.append(
            (
                "memory of its own",
                format_bytes(peak.anonymous_bytes),
                f"{peak.phase}; {format_bytes(mapped)} mapped files",
            )
        )
        device = [(phase.device_bytes, phase.phase) for phase in summary.memory if phase.device_bytes is not None]
        if device:
            most, when = max(device)
            tiles.append(("GPU memory in use", format_bytes(most), f"{when}; other programs' included"))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span class="muted small">{text(name)}</span><b>{text(value)}</b>'
            f'<span class="muted small">{text(about)}</span></div>'
            for name, value, about in tiles
        )
        + "</div>"
    )


def _range(timing: Timing) -> str:
    if timing.count == 1:
        return "one run"
    return f"{timing.count} runs, {milliseconds(timing.min_ms)} to {milliseconds(timing.max_ms)}"


def _noise(profile: Profile) -> str:
    notes = "".join(f"<li>{text(note)}</li>" for note in profile.noise)
    return f'<section><h2>How far to trust it</h2><ul class="small">{notes}</ul></section>' if notes else ""


def _method(profile: Profile) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in profile.machine.versions.items())
    facts = [
        f"Warm: {profile.warmup} run{' that does' if profile.warmup == 1 else 's that do'} not count, then "
        f"{profile.repeats}; medians.",
        "Cold: a new process, after asking the system to drop the bundle from its page cache.",
        f"Versions: {versions}.",
        f"Bundle {profile.work.content_digest}.",
    ]
    if profile.layers is not None:
        facts.append(f"Layers: {profile.layers.source}.")
    if profile.peak is not None:
        facts.append(f"Peak: {profile.peak.source}.")
    items = "".join(f"<li>{text(fact)}</li>" for fact in facts)
    return (
        f'<section><h2>How it was measured</h2><ul class="small muted">{items}</ul>'
        '<p class="small muted">profile.json beside this file holds every number; trace.json opens in '
        "ui.perfetto.dev.</p></section>"
    )
