"""A profile as a Chrome trace: the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each run is a process with a track per kind of work and counters for memory. Times are microseconds from the run's
beginning. The module knows records only. The format is Google's "Trace Event Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reelforge.tools.profiling.schema import Kind, Profile, RunRecord

_TRACKS = {
    Kind.START: "host",
    Kind.IMPORT: "host",
    Kind.OPEN: "host",
    Kind.TOKENISE: "host",
    Kind.HOST: "host",
    Kind.STEP: "steps",
    Kind.SKIPPED_STEP: "steps",
    Kind.LOAD: "engines",
    Kind.RUN: "engines",
    Kind.CLOSE: "engines",
    Kind.COPY: "copies",
    Kind.ENCODE: "video file",
}
_ORDER = ("host", "steps", "engines", "copies", "video file")


def trace_of(profile: Profile) -> dict[str, Any]:
    """Return the trace as JSON types."""
    events: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for process, record in enumerate(profile.runs, start=1):
        label = f"{record.temperature} {record.bundle}"
        counts[label] = counts.get(label, 0) + 1
        events += _run_events(record, process, f"{label} {counts[label]}")
    if profile.layers is not None:
        events += _layer_events(profile, len(profile.runs) + 1)
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "tool": "reelforge profile",
            "schema_version": profile.schema_version,
            "created": profile.created,
            "complete": profile.complete,
            "bundle": profile.work.bundle,
            "content_digest": profile.work.content_digest,
        },
        "traceEvents": events,
    }


def _run_events(record: RunRecord, process: int, label: str) -> Iterator[dict[str, Any]]:
    yield _name("process_name", process, 0, label)
    for thread, track in enumerate(_ORDER, start=1):
        yield _name("thread_name", process, thread, track)
    for span in record.spans:
        yield {
            "name": span.name,
            "cat": span.kind.value,
            "ph": "X",
            "ts": round(span.start_ms * 1e3, 3),
            "dur": round(span.duration_ms * 1e3, 3),
            "pid": process,
            "tid": _ORDER.index(_TRACKS[span.kind]) + 1,
            "args": {"stage": span.stage, **({"bytes": span.bytes} if span.bytes else {})},
        }
    for sample in record.memory:
        held = {"anonymous": sample.anonymous_bytes, "file-backed": sample.file_bytes}
        yield _counter("resident memory", process, sample.at_ms, held)
        if sample.device_bytes is not None:
            yield _counter("GPU memory in use", process, sample.at_ms, {"in use": sample.device_bytes})


def _counter(name: str, process: int, at_ms: float, values: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": round(at_ms * 1e3, 3), "pid": process, "tid": 0, "args": values}


def _layer_events(profile: Profile, process: int) -> Iterator[dict[str, Any]]:
    """Yield one call of each stage with its layers end to end, the most expensive first: they are medians."""
    assert profile.layers is not None
    yield _name("process_name", process, 0, "layers of one call, by cost")
    ends: dict[str, float] = {}
    for layer in profile.layers.layers:
        if layer.stage not in ends:
            ends[layer.stage] = 0.0
            yield _name("thread_name", process, len(ends), layer.stage)
        yield {
            "name": layer.words,
            "cat": layer.kind,
            "ph": "X",
            "ts": round(ends[layer.stage] * 1e3, 3),
            "dur": round(layer.call_ms * 1e3, 3),
            "pid": process,
            "tid": list(ends).index(layer.stage) + 1,
            "args": {"layer": layer.name, "precision": layer.precision, "kernels": ", ".join(layer.kernels)},
        }
        ends[layer.stage] += layer.call_ms


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
