"""Partition: one stage as several, by blocks, so that small machines can compile it and small GPUs can stream it.

A part of a stage is itself a :class:`Stage`: consecutive blocks with their own inputs and outputs, to be assembled,
lowered and compiled like any other. What passes from part to part is called ``<value>.<part>`` after the part that made
it, and has the stage's precision. Where blocks each collect a row of one output, every part passes its rows on, and the
last one joins them. The module knows bytes of weights; it does not know memory, backends or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reelforge.export.stage import COMPUTE, Part, Stage, Value


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
        stage: What to cut.
        sizes: Bytes by parameter, as they will be stored in a plan.
        limit_bytes: What the weights of one part may take; a single block that exceeds it is a part of its own.

    Returns:
        The parts in the order they run, named ``<stage>.0`` and so on; the stage itself if it need not be cut.
    """
    if not sum(sizes.values()):
        return (stage,)
    units = list(_units(stage, sizes))
    groups = _fill(units, limit_bytes)
    if len(groups) == 1:
        return (stage,)
    cut = [_parts(stage, group) for group in groups]
    rows = _Rows(stage, cut)
    outer = {stage.value_of(name): name for name in stage.inputs}  # value -> what it is called at this point
    stages = []
    for index, parts in enumerate(cut):
        later = [part for following in cut[index + 1 :] for part in following]
        reads, writes = _reads(parts), _writes(parts)
        inputs = {outer[value]: value for value in reads}
        kept = {value: f"{value}.{index}" for value in writes if value in _reads(later)}
        made_again = _writes(later)
        results = {stage.value_of(name): name for name in stage.outputs}
        kept.update({value: name for value, name in results.items() if value in writes and value not in made_again})
        kept.update({value: rows.name(value, index) for value in rows.begun(index)})
        outer.update(kept)
        outputs = {kept[value]: value for value in writes if value in kept}
        stages.append(
            replace(
                stage,
                name=f"{stage.name}.{index}",
                parts=tuple(parts),
                values={**stage.values, **rows.values(index)},
                inputs=(*inputs, *(name for names in rows.earlier(index).values() for name in names)),
                outputs=tuple(outputs),
                aliases={name: value for name, value in {**inputs, **outputs}.items() if name != value},
                earlier=rows.earlier(index),
            )
        )
    return tuple(stages)


class _Rows:
    """The rows of collected values that several parts of a cut stage make.

    Args:
        stage: The stage.
        cut: Its parts.
    """

    def __init__(self, stage: Stage, cut: Sequence[Sequence[Part]]) -> None:
        self._stage = stage
        made: list[dict[str, int]] = []
        for parts in cut:
            ports = [(port.value, part.repeat) for part in parts for port in part.output_ports if port.indexed]
            made.append({value: sum(count for other, count in ports if other == value) for value, _ in ports})
        shared = {value for counts in made for value in counts if sum(value in other for other in made) > 1}
        self._made = [{value: count for value, count in counts.items() if value in shared} for counts in made]

    def name(self, value: str, index: int) -> str:
        """Return what the rows of one part are called between parts."""
        return f"{value}.{index}"

    def begun(self, index: int) -> list[str]:
        """Return the values of which a part makes rows and a later one makes more."""
        return [value for value in self._made[index] if any(value in later for later in self._made[index + 1 :])]

    def earlier(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return the names of the rows that a part joins its own to, by value, if its own are the last."""
        return {
            value: tuple(self.name(value, before) for before in range(index) if value in self._made[before])
            for value in self._made[index]
            if value not in self.begun(index)
        }

    def values(self, index: int) -> dict[str, Value]:
        """Return what a part has to know of rows: those that it passes on, and those that it is given."""
        own = {value: self._rows(value, index) for value in self.begun(index)}
        given = {
            self.name(value, before): self._rows(value, before)
            for value in self.earlier(index)
            for before in range(index)
            if value in self._made[before]
        }
        return {**own, **given}

    def _rows(self, value: str, index: int) -> Value:
        whole = self._stage.values[value]
        return replace(whole, shape=(whole.shape[0], self._made[index][value], *whole.shape[2:]))


def _units(stage: Stage, sizes: Mapping[str, int]) -> Iterator[_Unit]:
    for index, part in enumerate(stage.parts):
        own = part.parameter_shapes()
        bytes_of = [sum(sizes[prefix + name] for name in own) for prefix in part.prefixes()]
        if any(port.indexed and not _divisible(stage, port.value) for port in part.output_ports):
            yield _Unit(index, part.first, part.repeat, sum(bytes_of))
            continue
        for offset, size in enumerate(bytes_of):
            yield _Unit(index, part.first + offset, 1, size)


def _divisible(stage: Stage, value: str) -> bool:
    """Whether the rows of a collected value may be made in several parts: nothing but the stage's caller reads them."""
    read = {port.value for part in stage.parts for port in part.input_ports}
    return value in stage.outputs and value not in read and stage.values[value].dtype != COMPUTE


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
