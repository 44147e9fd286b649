"""Holds the key tables of a model against a checkpoint's component, strictly both ways.

Every parameter is filled with the shape and a type that are expected, and every stored tensor is used completely or
explained; everything that differs is reported at once. The module knows no model: tables, shapes and explanations
are given.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reelforge.export.checkpoint.component import Component
from reelforge.export.checkpoint.sources import Resolved, Selection, Source, SourceError, resolve
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.runtime.errors import CheckpointError

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_SHOWN = 10


@dataclass(frozen=True)
class Explained:
    """Stored tensors that no stage needs: a regular expression of their whole names, and why."""

    pattern: str
    reason: str


@dataclass
class _Differences:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)
    partly_used: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        result = []
        for title, items in vars(self).items():
            if items:
                result.append(f"{title.replace('_', ' ')} ({len(items)}):")
                result.extend(f"  {item}" for item in items[:_SHOWN])
                if len(items) > _SHOWN:
                    result.append(f"  ... and {len(items) - _SHOWN} more")
        return result


def match_component(
    component: Component,
    tables: Mapping[str, Mapping[str, Source]],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    explained: Sequence[Explained],
) -> dict[str, dict[str, Resolved]]:
    """Resolve every parameter of the stages that share ``component``.

    Args:
        component: The checkpoint's component.
        tables: For each stage, where each of its parameters comes from.
        shapes: For each stage, the shape of each of its parameters.
        explained: Stored tensors that nothing needs.

    Returns:
        For each stage, each parameter as a reference or a conversion, in the order of ``shapes``.

    Raises:
        CheckpointError: Listing everything that differs.
    """
    found = _Differences()
    result: dict[str, dict[str, Resolved]] = {}
    uses: dict[str, list[Selection]] = {}
    for stage, table in tables.items():
        wanted = shapes[stage]
        found.missing += [f"{stage}.{name} has no source" for name in wanted if name not in table]
        found.unexpected += [f"{stage}.{name} is no parameter of the stage" for name in table if name not in wanted]
        result[stage] = {}
        for name, shape in wanted.items():
            if name in table:
                resolved = _resolve(component, f"{stage}.{name}", table[name], shape, uses, found)
                if resolved is not None:
                    result[stage][name] = resolved
    patterns = [re.compile(item.pattern) for item in explained]
    for key, ref in component.tensors.items():
        if key not in uses:
            if not any(pattern.fullmatch(key) for pattern in patterns):
                found.unexpected.append(f"{ref.name} {ref.dtype} {list(ref.shape)}")
        elif not _covered(ref, uses[key]):
            found.partly_used.append(f"{ref.name} {list(ref.shape)} has rows or columns that nothing uses")
    lines = found.lines()
    if lines:
        raise CheckpointError(
            f"the {component.name} in {component.where} does not have the tensors that are expected.",
            received="\n    " + "\n    ".join(lines) + "\n ",
            expected="every parameter filled, and every tensor used or explained",
            fix="check that the checkpoint is complete and that its configuration belongs to it",
        )
    return result


def match(
    component: Component,
    table: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    explained: Sequence[Explained],
) -> dict[str, Resolved]:
    """Resolve a component that serves a single stage; see :func:`match_component`."""
    return match_component(component, {component.name: table}, {component.name: shapes}, explained)[component.name]


def _resolve(
    component: Component,
    parameter: str,
    source: Source,
    shape: tuple[int, ...],
    uses: dict[str, list[Selection]],
    found: _Differences,
) -> Resolved | None:
    ref = component.tensors.get(source.key)
    if ref is None:
        found.missing.append(f"{source.key} for {parameter} {list(shape)}")
        return None
    uses.setdefault(source.key, [])
    if ref.dtype not in WEIGHT_DTYPES:
        advice = " (fp8 weights need their scales; use the 16-bit checkpoint)" if ref.dtype.startswith("F8") else ""
        found.mistyped.append(f"{ref.name} is {ref.dtype}, one of {', '.join(WEIGHT_DTYPES)} is needed{advice}")
    try:
        resolved = resolve(source, component.tensors, shape)
        uses[source.key].append(source.select(ref.shape))
    except SourceError as error:
        found.misshaped.append(f"{ref.name} {error} for {parameter}")
        # A wrong shape is reported once, not again as a tensor that is partly used.
        uses[source.key].append(Selection(np.arange(ref.shape[0] if ref.shape else 1), 0, 1 << 62))
        return None
    return resolved


def _covered(ref: TensorRef, selections: Sequence[Selection]) -> bool:
    """Return whether the selections together use every element of ``ref``."""
    row_count = ref.shape[0] if ref.shape else 1
    width = math.prod(ref.shape[1:])
    edges = {0, width}
    for selection in selections:
        edges |= {min(selection.column_start, width), min(selection.column_stop, width)}
    ordered = sorted(edges)
    for left, right in itertools.pairwise(ordered):
        used = np.zeros(row_count, bool)
        for selection in selections:
            if selection.column_start <= left and right <= selection.column_stop:
                used[selection.rows] = True
        if not used.all():
            return False
    return True
