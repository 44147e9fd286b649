"""The report's sections, each from a profile to HTML; empty where the profile has nothing for it.

Knows profiles and the charts' building blocks; it computes nothing but sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from reelforge.tools.profiling.compare import unequal_work
from reelforge.tools.profiling.layers import TOP
from reelforge.tools.profiling.report_charts import (
    Axis,
    Bar,
    Dot,
    Label,
    Line,
    bar_rows,
    legend,
    milliseconds,
    number,
    plot,
    text,
)
from reelforge.tools.profiling.report_steps import section
from reelforge.tools.profiling.roofline import Point, point, share_of_roof, stage_points
from reelforge.tools.profiling.schema import LayerTiming, Profile, Timing
from reelforge.tools.profiling.terminal import single_rows, verdict

_KINDS = ("gemm", "attention", "convolution", "norm", "elementwise", "quantise", "layout", "other")
_KIND_WORDS = {
    "gemm": "matrix products",
    "elementwise": "element-wise",
    "quantise": "to and from 8 bits",
    "layout": "reordering, casts",
    "norm": "norms",
    "convolution": "convolutions",
}
_DOTS = 60  # layers on the roofline
_LEAST_SHARE = 0.005  # below this a percentage would be rounded to nothing


def parts(profile: Profile) -> str:
    """Show where the time goes, cold and warm."""
    warm, cold = profile.warm, profile.cold
    if warm is None and cold is None:
        return ""
    names = dict.fromkeys([*(cold.parts if cold else ()), *(warm.parts if warm else ())])
    rows = [
        _row(name, cold.parts.get(name) if cold else None, warm.parts.get(name) if warm else None) for name in names
    ]
    rows.append(_row("whole", cold.total if cold else None, warm.total if warm else None, "sum"))
    extra = [_row(*row) for row in single_rows(profile)]
    for name, copy in (warm.copies if warm else {}).items():
        extra.append(_row(name, cold.copies.get(name) if cold else None, copy))
    about = (
        "Medians in milliseconds. Parts are of a whole video; gaps are how long an engine waited for the host between "
        "two of its calls."
    )
    return section(
        "Where the time goes",
        about,
        '<div class="scroll"><table><tr><th></th><th>cold</th><th>warm</th><th>p95</th>'
        f'<th class="hide-narrow">max</th></tr>{"".join(rows + extra)}</table></div>',
    )


def _row(name: str, cold: Timing | None, warm: Timing | None, kind: str = "") -> str:
    cells = [
        number(cold.median_ms) if cold else "",
        number(warm.median_ms) if warm else "",
        number(warm.p95_ms) if warm else "",
    ]
    last = f'<td class="hide-narrow">{number(warm.max_ms) if warm else ""}</td>'
    return f'<tr class="{kind}"><td>{text(name)}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + last + "</tr>"


def stages(profile: Profile) -> str:
    """Show a bar per stage."""
    summary = profile.warm or profile.cold
    if summary is None or not summary.stages:
        return ""
    longest = max(stage.run.median_ms for stage in summary.stages)
    rows = []
    for stage in summary.stages:
        calls = f"{stage.calls} call{'s' if stage.calls > 1 else ''}"
        share = f"{stage.share:.0%}" if stage.share >= _LEAST_SHARE else "<1%"
        value = f"{milliseconds(stage.run.median_ms)} · {share}"
        title = f"{stage.stage}: {calls} of {milliseconds(stage.call.median_ms)}"
        rows.append((stage.stage, [Bar(0.0, stage.run.median_ms, stage.stage, "", title)], value))
    loads = []
    for stage in summary.stages:
        load_ms = stage.load.median_ms if stage.load else 0.0
        loads.append((stage.stage, [Bar(0.0, load_ms, stage.stage, "", stage.stage)], milliseconds(load_ms)))
    most = max(stage.load.median_ms if stage.load else 0.0 for stage in summary.stages)
    content = f"<h3>Running, per video</h3>{bar_rows(rows, longest)}"
    content += f"<h3>Loading, when they are loaded</h3>{bar_rows(loads, most)}"
    return section("Stages", f"Medians of {summary.temperature} runs; shares are of all stages' calls.", content)


def blocks(profile: Profile) -> str:
    """Show each stage's blocks, by kind of work."""
    if profile.layers is None or not profile.layers.layers:
        reason = profile.layers.source if profile.layers else ""
        return section("Layers", f"There are no times of layers: {reason}.", "") if reason else ""
    by_stage: dict[str, dict[str, list[LayerTiming]]] = defaultdict(lambda: defaultdict(list))
    for layer in profile.layers.layers:
        by_stage[layer.stage][layer.block or "outside of blocks"].append(layer)
    totals = {stage: sum(_ms(layers) for layers in found.values()) for stage, found in by_stage.items()}
    content = legend([(_KIND_WORDS.get(kind, kind), kind) for kind in _KINDS])
    whole = sum(totals.values())
    for stage in sorted(totals, key=lambda name: -totals[name]):
        if totals[stage] < 0.02 * whole:
            continue
        found = by_stage[stage]
        longest = max(_ms(layers) for layers in found.values())
        rows = [
            (block, _by_kind(found[block]), milliseconds(_ms(found[block])))
            for block in sorted(found, key=_block_order)
        ]
        content += f"<h3>{text(stage)}: {milliseconds(totals[stage])} per video</h3>" + bar_rows(rows, longest)
    about = "Layers' times per video, in the profiler's own runs; stages below 2 % are left out."
    return section("Blocks", about, content)


def _ms(layers: Sequence[LayerTiming]) -> float:
    return sum(layer.per_video_ms for layer in layers)


def _by_kind(layers: Sequence[LayerTiming]) -> list[Bar]:
    bars, end = [], 0.0
    for kind in _KINDS:
        length = _ms([layer for layer in layers if layer.kind == kind])
        if length:
            bars.append(Bar(end, end + length, kind, "", f"{_KIND_WORDS.get(kind, kind)}: {milliseconds(length)}"))
            end += length
    return bars


def _block_order(block: str) -> tuple[bool, str, int]:
    """Sort ``double.2`` before ``double.10``, and what is outside of blocks last."""
    head, _, tail = block.rpartition(".")
    return (block == "outside of blocks", head or block, int(tail) if tail.isdigit() else -1)


def largest_layers(profile: Profile) -> str:
    """Show the ten largest layers and what would speed them up, and what concerns the run."""
    layers = profile.layers.layers[:TOP] if profile.layers else ()
    advice: Mapping[str, list[str]] = defaultdict(list)
    general: list[str] = []
    names = {f"{layer.stage}: {layer.name}" for layer in layers}
    for one in profile.advice:
        saves = "" if one.saves_ms is None else f" Saves at most {milliseconds(one.saves_ms)} per video."
        sentence = f"<li><b>{text(one.action)}</b> &ndash; {text(one.reason)}.{text(saves)}</li>"
        (advice[one.about] if one.about in names else general).append(sentence)
    if not layers and not general:
        return ""
    items = ""
    for layer in layers:
        place = point(layer, profile.peak)
        reached = f" · {share_of_roof(place)} of the roof" if place else ""
        length = layer.share / layers[0].share if layers[0].share else 0.0
        bar = f'<div class="track"><i style="width:{length:.2%};background:{_kind(layer)}"></i></div>'
        items += (
            f'<li><div class="head"><span class="words">{text(layer.words)}</span>'
            f"<span>{milliseconds(layer.per_video_ms)} · {layer.share:.1%}</span></div>{bar}"
            f'<div class="small muted"><code>{text(layer.stage)}: {text(layer.name)}</code> {text(layer.precision)} '
            f"{text(', '.join(layer.kernels[:4]))} · {milliseconds(layer.call_ms)} per call{reached}</div>"
            f"<ul class='small'>{''.join(advice[f'{layer.stage}: {layer.name}'])}</ul></li>"
        )
    content = f'<ul class="small">{"".join(general)}</ul>' if general else ""
    content += f'<ol class="layers">{items}</ol>' if items else ""
    return section(
        "The largest layers, and what would speed them up", "Shares are of all layers' time per video.", content
    )


def _kind(layer: LayerTiming) -> str:
    return f"var(--{layer.kind if layer.kind in _KINDS else 'other'})"


def roofline(profile: Profile) -> str:
    """Show how close the products, convolutions and attentions come to the machine's limits."""
    peak = profile.peak
    if peak is None:
        return ""
    layers = profile.layers.layers[:_DOTS] if profile.layers else ()
    points = [place for layer in layers if (place := point(layer, peak)) is not None]
    stages = stage_points(profile.warm.stages if profile.warm else (), profile.stage_work, peak)
    of, points = ("layer", points) if points else ("stage", stages)
    if not points:
        return ""
    ridge = max(peak.flops.values()) / peak.bandwidth
    intensities = [place.intensity for place in points]
    x = Axis(min(*intensities, 1.0) / 1.5, max(*intensities, ridge) * 2, "operations per byte", logarithmic=True)
    rates = [place.rate for place in points]
    lowest = min(*rates, x.low * peak.bandwidth) / 1.5 / 1e9
    y = Axis(lowest, max(*rates, *peak.flops.values()) * 1.6 / 1e9, "billion operations per second", logarithmic=True)
    shapes: list[Line] = []
    labels = []
    used = {place.precision for place in points}
    for precision, rate in sorted(peak.flops.items(), key=lambda item: item[1]):
        if precision not in used and precision not in ("fp32", "int8"):
            continue
        knee = rate / peak.bandwidth
        shapes.append(Line([(knee, rate / 1e9), (x.high, rate / 1e9)], "host", 2.0, dashed=precision not in used))
        labels.append(Label(x.high, rate / 1e9, f"{precision} {number(rate / 1e9)}"))
    highest = max(rate for precision, rate in peak.flops.items() if precision in used or precision in ("fp32", "int8"))
    slope = [(x.low, x.low * peak.bandwidth / 1e9), (highest / peak.bandwidth, highest / 1e9)]
    shapes.append(Line(slope, "host", 2.0))
    dots = [_roof_dot(place) for place in reversed(points)]
    how = "measured beside the runs" if peak.measured else "by its documents"
    caption = f"Roof: {peak.name}, {how}; {number(peak.bandwidth / 1e9)} GB/s. A dot is a {of}; dashed: not used."
    drawn = dict.fromkeys(place.kind for place in points)
    kinds = [kind for kind in _KINDS if kind in drawn] if of == "layer" else list(drawn)
    keys = legend([(_KIND_WORDS.get(kind, kind), kind) for kind in kinds])
    about = (
        f"Below the slope a {of} waits for memory, below the flat roof for arithmetic. Far below both it is too small, "
        "or its kernel is slow."
    )
    return section("Roofline", about, keys + plot(x, y, shapes, dots, caption, labels) + _stage_rates(stages))


def _roof_dot(place: Point) -> Dot:
    title = (
        f"{place.words}: {number(place.rate / 1e9)} GFLOP/s at {number(place.intensity)} operations per byte, "
        f"{share_of_roof(place)} of the roof ({place.bound})"
    )
    return Dot(place.intensity, place.rate / 1e9, place.kind, title)


def _stage_rates(stages: Sequence[Point]) -> str:
    """Show what whole stages reach, with all that they do besides products."""
    if not stages:
        return ""
    rows = "".join(
        f'<tr><td>{text(one.words)}</td><td class="hide-narrow">{number(one.flops / 1e9)}</td>'
        f"<td>{number(one.rate / 1e9)}</td><td>{text(share_of_roof(one))}</td>"
        f'<td class="hide-narrow">{text(f"{one.precision}, {one.bound}")}</td></tr>'
        for one in stages
    )
    heads = '<th class="hide-narrow">10⁹ per call</th><th>10⁹ per second</th><th>of the roof</th>'
    return (
        '<h3>Whole stages: operations by the planner, time without a profiler</h3><div class="scroll"><table><tr>'
        f'<th></th>{heads}<th class="hide-narrow">which roof</th></tr>{rows}</table></div>'
    )


def comparison(profile: Profile) -> str:
    """Show ratios with their intervals."""
    found = profile.comparison
    if found is None:
        return ""
    ends = [value for one in found.ratios for value in (one.ratio, one.low, one.high) if value is not None]
    axis = Axis(min(*ends, 0.95) / 1.05, max(*ends, 1.05) * 1.05, "", logarithmic=True)
    rows = ""
    for one in found.ratios:
        low, high = (one.low, one.high) if one.low is not None and one.high is not None else (one.ratio, one.ratio)
        left, width = axis.place(low), axis.place(high) - axis.place(low)
        words = verdict(one)
        kind = {"slower": "bad", "faster": "good"}.get(words, "muted")
        between = "" if one.low is None else f" ({low:.2f} to {high:.2f})"
        rows += (
            f'<div class="small">{text(one.what)}</div><div class="ratio">'
            f'<span class="one" style="left:{axis.place(1.0):.2%}"></span>'
            f'<span class="span" style="left:{left:.2%};width:{width:.2%}"></span>'
            f'<span class="mid" style="left:{axis.place(one.ratio):.2%}"></span></div>'
            f'<div class="small value">{one.ratio:.2f}{between}<br><span class="{kind}">{words}</span></div>'
        )
    about = (
        f"Time of {found.other.bundle} over time of {profile.work.bundle}, {found.rounds} rounds in turn, with "
        f"{found.confidence:.0%} intervals, of which one in twenty misses by chance; the dashed line is 1."
    )
    title = f"Beside {found.other.bundle}"
    unequal = unequal_work(found, profile.work.bundle)
    warning = f'<p class="bad">{text(unequal)}</p>' if unequal else ""
    return section(title, about, f'<div class="bars">{rows}</div>{warning}')
