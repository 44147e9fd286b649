"""What several runs say together: medians of their parts, stages, steps, gaps, copies and memory.

Knows records only. Everything is in milliseconds per video unless it says otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from reelforge.tools.profiling.schema import Kind, PhaseMemory, RunRecord, Span, StageTiming, Summary, Timing
from reelforge.tools.profiling.statistics import timing

PARTS = {
    "start Python": Kind.START,
    "import": Kind.IMPORT,
    "open": Kind.OPEN,
    "tokenise": Kind.TOKENISE,
    "load engines": Kind.LOAD,
    "run engines": Kind.RUN,
    "host arithmetic": Kind.HOST,
    "encode video": Kind.ENCODE,
    "close engines": Kind.CLOSE,
}
"""Names of a run's parts, in the order in which they first happen; what is in none of them is ``between``."""

REMAINDER = "between"
LOOP, DECODER = "dit", "vae_decoder"


def is_loop(stage: str) -> bool:
    """Tell whether a stage is the transformer, or a part of one that was cut (``dit_head``)."""
    return stage == LOOP or stage.startswith(f"{LOOP}_")


def is_decoder(stage: str) -> bool:
    """Tell whether a stage is the decoder."""
    return stage == DECODER


def summarise(records: Sequence[RunRecord], loaded: Sequence[RunRecord] = ()) -> Summary | None:
    """Return what complete runs have in common; None if there is none.

    Args:
        records: The runs that count.
        loaded: Further runs, whose loading of engines counts: the warm-up loads those that stay.
    """
    records = [record for record in records if record.complete]
    if not records:
        return None
    return Summary(
        temperature=records[0].temperature,
        runs=len(records),
        total=timing([record.total_ms for record in records]),
        parts=_parts(records),
        stages=_stages(records, [*loaded, *records]),
        steps=_timing_or_none(span.duration_ms for record in records for span in of_kind(record, Kind.STEP)),
        skipped_steps=_timing_or_none(
            span.duration_ms for record in records for span in of_kind(record, Kind.SKIPPED_STEP)
        ),
        skips=len(of_kind(records[0], Kind.SKIPPED_STEP)),
        step_gaps=_timing_or_none(gap for record in records for gap in gaps(record, is_loop)),
        tile_gaps=_timing_or_none(gap for record in records for gap in gaps(record, is_decoder)),
        copies=_copies(records),
        copied_bytes=_copied_bytes(records[0]),
        memory=_memory(records),
    )


def of_kind(record: RunRecord, kind: Kind) -> list[Span]:
    """Return the spans of one kind, in order."""
    return [span for span in record.spans if span.kind is kind]


def steps_of(record: RunRecord) -> list[Span]:
    """Return the sampling steps, computed and skipped, in order."""
    found = [*of_kind(record, Kind.STEP), *of_kind(record, Kind.SKIPPED_STEP)]
    return sorted(found, key=lambda span: span.start_ms)


def gaps(record: RunRecord, among: Callable[[str], bool]) -> list[float]:
    """Return how long the host let some stages' engines wait between their calls; others' time is not the host's."""
    found: list[float] = []
    seen, waited, end = False, 0.0, 0.0
    for span in sorted(of_kind(record, Kind.RUN), key=lambda span: span.start_ms):
        waited += max(0.0, span.start_ms - end)
        end = span.end_ms
        if among(span.stage):
            if seen:
                found.append(waited)
            seen, waited = True, 0.0
    return found


def stage_ms(record: RunRecord, stage: str) -> float:
    """Return the time of all calls of a stage."""
    return sum(span.duration_ms for span in record.spans if span.kind is Kind.RUN and span.stage == stage)


def _timing_or_none(values: Iterable[float]) -> Timing | None:
    listed = list(values)
    return timing(listed) if listed else None


def _parts(records: Sequence[RunRecord]) -> dict[str, Timing]:
    by_part: dict[str, list[float]] = {}
    for name, kind in PARTS.items():
        sums = [sum(span.duration_ms for span in of_kind(record, kind)) for record in records]
        if any(sums):
            by_part[name] = sums
    rest = [
        max(0.0, record.total_ms - sum(sums[index] for sums in by_part.values()))
        for index, record in enumerate(records)
    ]
    return {name: timing(sums) for name, sums in {**by_part, REMAINDER: rest}.items()}


def _stages(records: Sequence[RunRecord], loaded: Sequence[RunRecord]) -> tuple[StageTiming, ...]:
    names = dict.fromkeys(span.stage for span in records[0].spans if span.kind is Kind.RUN)
    totals = {name: timing([stage_ms(record, name) for record in records]) for name in names}
    everything = sum(total.median_ms for total in totals.values()) or 1.0
    found = []
    for name, total in totals.items():
        calls = [[span.duration_ms for span in of_kind(record, Kind.RUN) if span.stage == name] for record in records]
        loads = [span.duration_ms for one in loaded for span in of_kind(one, Kind.LOAD) if span.stage == name]
        found.append(
            StageTiming(
                stage=name,
                calls=len(calls[0]),
                run=total,
                call=timing([one for each in calls for one in each]),
                load=timing(loads) if loads else None,
                share=total.median_ms / everything,
            )
        )
    return tuple(found)


def _copies(records: Sequence[RunRecord]) -> dict[str, Timing]:
    names = dict.fromkeys(span.name for record in records for span in of_kind(record, Kind.COPY))
    return {
        name: timing(
            [sum(span.duration_ms for span in of_kind(record, Kind.COPY) if span.name == name) for record in records]
        )
        for name in names
    }


def _copied_bytes(record: RunRecord) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for span in of_kind(record, Kind.COPY):
        sizes[span.name] += span.bytes
    return dict(sizes)


def _memory(records: Sequence[RunRecord]) -> tuple[PhaseMemory, ...]:
    samples = [sample for record in records for sample in record.memory]
    phases = dict.fromkeys(sample.phase for sample in samples)
    found = []
    for phase in phases:
        here = [sample for sample in samples if sample.phase == phase]
        device = [sample.device_bytes for sample in here if sample.device_bytes is not None]
        found.append(
            PhaseMemory(
                phase,
                max(sample.anonymous_bytes for sample in here),
                max(sample.file_bytes for sample in here),
                max(device) if device else None,
            )
        )
    return tuple(found)
