"""Partition: one stage as several, by blocks, so that small machines can compile it and small GPUs can stream it.

A part of a stage is itself a :class:`Stage`: consecutive blocks with their own inputs and outputs, to be assembled,
lowered and compiled like any other. What passes from part to part is called ``<value>.<part>`` after the part that made
it, and has the stage's precision. The module knows bytes of weights; it does not know memory, backends or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reelforge.export.stage import Part, Stage


@dataclass(frozen=True)
class _Unit:
    """What a cut cannot divide: a part, or one of its repeats."""

    part: int
    first: int
    repeat: int
    size: int


def partition(stage: Stage, sizes: Mapping[str, int], limit_bytes: int) -> tuple[Stage, ...]:
    """Cut a stage into consecutive parts of about equal weight.

    Args:
        stage: What to cut. Blocks that each collect a row of one output stay together.
        sizes: Bytes by parameter, as they will be stored in a plan.
        limit_bytes: What the weights of one part may take; a single block that exceeds it is a part of its own.

    Returns:
        The parts in the order they run, named ``<stage>.0`` and so on; the stage itself if it need not be cut.
    """
    units = list(_units(stage, sizes))
    groups = _fill(units, limit_bytes)
    if len(groups) == 1:
        return (stage,)
    cut = [_parts(stage, group) for group in groups]
    outer = {name: name for name in stage.inputs}  # value -> what it is called between parts at this point
    stages = []
    for index, parts in enumerate(cut):
        later = [part for following in cut[index + 1 :] for part in following]
        reads, writes = _reads(parts), _writes(parts)
        inputs = {outer[value]: value for value in reads}
        kept = {value: f"{value}.{index}" for value in writes if value in _reads(later)}
        made_again = _writes(later)
        kept.update({value: value for value in stage.outputs if value in writes and value not in made_again})
        outer.update(kept)
        outputs = {kept[value]: value for value in writes if value in kept}
        stages.append(
            replace(
                stage,
                name=f"{stage.name}.{index}",
                parts=tuple(parts),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                aliases={name: value for name, value in {**inputs, **outputs}.items() if name != value},
            )
        )
    return tuple(stages)


def _units(stage: Stage, sizes: Mapping[str, int]) -> Iterator[_Unit]:
    for index, part in enumerate(stage.parts):
        own = part.parameter_shapes()
        bytes_of = [sum(sizes[prefix + name] for name in own) for prefix in part.prefixes()]
        if any(port.indexed for port in part.output_ports):
            yield _Unit(index, part.first, part.repeat, sum(bytes_of))
            continue
        for offset, size in enumerate(bytes_of):
            yield _Unit(index, part.first + offset, 1, size)


def _fill(units: Sequence[_Unit], limit_bytes: int) -> list[list[_Unit]]:
    """Return groups of about equal size, as few as the limit allows."""
    total = sum(unit.size for unit in units)
    count = max(1, math.ceil(total / limit_bytes))
    while True:
        groups: list[list[_Unit]] = [[]]
        done = filled = 0
        for unit in units:
            share = total * len(groups) / count
            # A unit goes where its middle lies, so that groups differ by less than one unit.
            if groups[-1] and (done + unit.size / 2 > share or filled + unit.size > limit_bytes) and unit.size:
                groups.append([])
                filled = 0
            groups[-1].append(unit)
            done += unit.size
            filled += unit.size
        if len(groups) <= count:
            return groups
        count = len(groups)


def _parts(stage: Stage, units: Sequence[_Unit]) -> list[Part]:
    """Join consecutive repeats of one part again."""
    joined: list[_Unit] = []
    for unit in units:
        last = joined[-1] if joined else None
        if last is not None and last.part == unit.part and last.first + last.repeat == unit.first:
            joined[-1] = replace(last, repeat=last.repeat + unit.repeat)
        else:
            joined.append(unit)
    return [replace(stage.parts[unit.part], first=unit.first, repeat=unit.repeat) for unit in joined]


def _reads(parts: Sequence[Part]) -> list[str]:
    """Return the values that ``parts`` read before they have made them."""
    made: set[str] = set()
    reads: dict[str, None] = {}
    for part in parts:
        reads.update((port.value, None) for port in part.input_ports if port.value not in made)
        made.update(port.value for port in part.output_ports)
    return list(reads)


def _writes(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(port.value for part in parts for port in part.output_ports))
