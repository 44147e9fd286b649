"""How ``reelforge inspect --diff`` shows two bundles to a person: what differs, and little else.

Knows the data of ``inspect_diff`` only. Long lists of layers are folded: numbers in their names become ``*``, and what
is listed in full is the matter of ``--json``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reelforge.tools import console
from reelforge.tools.inspect_diff import BundleDifference, Change, PlanDifference, PlanSummary, StageDifference
from reelforge.tools.inspect_receipts import COMPUTING_KINDS, slim_table

_LONGEST = 60  # letters of a value that is shown; templates and lists are longer
_LONGEST_NAME = 26  # of a bundle at the head of a column
_KINDS = (*COMPUTING_KINDS, "reformat", "cast")
_TITLES = {"gemm": "GEMMs", "attention": "attention", "convolution": "convolutions"}


def difference(found: BundleDifference) -> Group:
    """Return everything that a person should see of ``found``."""
    first, second = _names(found)
    parts: list[RenderableType] = [_heading(found)]
    if found.manifest:
        parts.append(_change_table("manifest", ("field", first, second), found.manifest))
    parts.append(_stage_table(found.stages, first, second))
    retyped = [(stage.name, change) for stage in found.stages for change in stage.weights_retyped]
    if retyped:
        parts.append(_folded_table("weights of another type", "weights", retyped, first, second))
    if found.plans:
        parts.append(_plan_table(found.plans, first, second))
        changed = [(plan.stage, change) for plan in found.plans for change in plan.precisions]
        if changed:
            parts.append(_folded_table("layers in another precision", "layers", changed, first, second))
    if found.quality:
        rows = [change for change in found.quality if change.name != "prompts" or _differ(change)]
        if not any(change.first != change.second for change in rows):
            rows = [Change("everything", "equal", "equal")]
        parts.append(_change_table("quality against fp32", ("measure", first, second), rows))
    if found.provenance:
        parts.append(_change_table("provenance", ("name", first, second), found.provenance))
    return Group(*(each for part in parts for each in (part, Text())))


def _names(found: BundleDifference) -> tuple[str, str]:
    """Name the bundles by their folders, if those differ and leave room for numbers."""
    first, second = (Path(path).resolve().name for path in (found.first, found.second))
    return (first, second) if first != second and max(len(first), len(second)) <= _LONGEST_NAME else ("first", "second")


def _heading(found: BundleDifference) -> Text:
    if found.equal:
        verdict = "the bundles are equal."
    elif found.same_content:
        verdict = "the content is equal; what differs is below."
    else:
        verdict = "the bundles differ."
    return Text(f"first:  {found.first}\nsecond: {found.second}\n{verdict}")


def _table(title: str, *headings: str, numbers: Iterable[str] = ()) -> Table:
    table = slim_table(title)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in numbers else "left")
    return table


def _change_table(title: str, headings: tuple[str, ...], changes: Iterable[Change]) -> Table:
    table = _table(title, *headings)
    for change in changes:
        table.add_row(Text(change.name), Text(_value(change.first)), Text(_value(change.second)))
    return table


def _differ(change: Change) -> bool:
    return None not in (change.first, change.second) and change.first != change.second


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


# Stages.


def _stage_table(stages: Iterable[StageDifference], first: str, second: str) -> Table:
    table = _table("stages", "stage", "graph", "weights", "nodes")
    for stage in stages:
        if stage.only_in is not None:
            table.add_row(stage.name, f"only in {first if stage.only_in == 'first' else second}", "", "")
            continue
        nodes = ", ".join(f"{change.second - change.first:+d} {change.name}" for change in stage.nodes)
        table.add_row(stage.name, stage.graph, _weights(stage, first, second), nodes or "equal")
    return table


def _weights(stage: StageDifference, first: str, second: str) -> str:
    counts = (
        (len(stage.weights_retyped), "of another type"),
        (len(stage.weights_changed), "with other content"),
        (len(stage.weights_only_first), f"only in {first}"),
        (len(stage.weights_only_second), f"only in {second}"),
    )
    said = [f"{count} {what}" for count, what in counts if count]
    return ", ".join([*said, f"{stage.weights_equal} equal"]) if said else "equal"


# Plans.


def _plan_table(plans: Iterable[PlanDifference], first: str, second: str) -> Table:
    """One column a bundle, one row a number; numbers that are the same in both are there to compare with."""
    table = _table("plans", "stage", "", first, second)
    for plan in plans:
        rows = list(_plan_rows(plan))
        for index, (what, ours, theirs) in enumerate(rows):
            style = "" if ours == theirs else "bold"
            last = index == len(rows) - 1
            table.add_row("" if index else plan.stage, what, Text(ours), Text(theirs), style=style, end_section=last)
    return table


def _plan_rows(plan: PlanDifference) -> Iterator[tuple[str, str, str]]:
    sides = (plan.first, plan.second)
    yield _row("plans for", sides, lambda side: "+".join(side.architectures))
    if plan.equal:
        yield "", "equal", "equal"
    if plan.equal or None in sides:  # what a bundle holds is not the matter of a comparison
        return
    rows: list[tuple[str, str, str]] = []
    counts: list[dict[str, dict[str, int]]] = [{} if side is None else side.layer_counts for side in sides]
    for kind in _KINDS:
        precisions = sorted({*counts[0].get(kind, {}), *counts[1].get(kind, {})})
        for precision in precisions:
            name = _TITLES.get(kind, f"{kind} layers")
            label = name if precision == "all" else f"{name} in {precision}"
            rows.append((label, *(str(each.get(kind, {}).get(precision, 0)) for each in counts)))  # type: ignore[arg-type]
    rows.append(_row("all layers", sides, lambda side: str(sum(sum(n.values()) for n in side.layer_counts.values()))))
    rows.append(_row("parts", sides, lambda side: str(side.parts)))
    rows.append(_row("weights", sides, lambda side: console.format_bytes(side.weight_bytes)))
    for profile in dict.fromkeys(name for side in sides if side for name in side.activation_bytes):
        rows.append(_row(f"activations, {profile}", sides, lambda side, name=profile: _activations(side, name)))
    rows.append(_row("plan", sides, lambda side: console.format_bytes(side.plan_bytes)))
    rows.append(_row("built in", sides, lambda side: f"{side.build_seconds:.1f} s"))
    rows.append(_row("backend", sides, lambda side: side.backend))
    yield from rows


def _row(what: str, sides: tuple[PlanSummary | None, PlanSummary | None], show: Any) -> tuple[str, str, str]:
    first, second = ("-" if side is None else show(side) for side in sides)
    return what, first, second


def _activations(side: PlanSummary, profile: str) -> str:
    size = side.activation_bytes.get(profile)
    return "-" if size is None else console.format_bytes(size)


# Layers and weights by the hundred.


def _folded_table(title: str, what: str, changes: Iterable[tuple[str, Change]], first: str, second: str) -> Table:
    """Group changes by stage and by what became what."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for stage, change in changes:
        groups.setdefault((stage, change.first or "-", change.second or "-"), []).append(change.name)
    table = _table(title, "stage", first, second, what, "which", numbers=(what,))
    for (stage, ours, theirs), names in groups.items():
        table.add_row(stage, ours, theirs, str(len(names)), Text(fold_names(names)))
    return table


def fold_names(names: Iterable[str]) -> str:
    """Write names that differ by numbers only as one: ``double.*.image.q (20), final.proj``."""
    originals = list(names)
    patterns = Counter(_pattern(name) for name in originals)
    alone = {_pattern(name): name for name in originals}
    said = (alone[pattern] if count == 1 else f"{pattern} ({count})" for pattern, count in patterns.items())
    return ", ".join(said)


def _pattern(name: str) -> str:
    return re.sub(r"(?<![A-Za-z])\d+", "*", name)
