"""One generation, measured: what the pipeline records, the steps as its events show them, frames into a file.

The module runs pipelines; it does not decide how often, and makes no sense of the numbers (see ``summary``).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from reelforge.runtime.events import Frames, Progress
from reelforge.runtime.request import Request
from reelforge.runtime.video import VideoWriter
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.nvtx_ranges import NO_RANGES, Ranges
from reelforge.tools.profiling.recorder import LoadMeter, MemorySampler, Recorder
from reelforge.tools.profiling.schema import Kind, RunRecord


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C during a run; ``record`` is what there was until then."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__("a run was interrupted")
        self.record = record


def measure_run(
    pipeline: ProfilingPipeline,
    request: Request,
    temperature: str,
    folder: Path,
    ranges: Ranges = NO_RANGES,
    recorder: Recorder | None = None,
    sampler: MemorySampler | None = None,
) -> RunRecord:
    """Generate a video and return what happened.

    Args:
        pipeline: It records into the run's recorder from now on.
        request: What to generate.
        temperature: ``cold`` or ``warm``, for the record.
        folder: Where the video goes, which is removed again.
        ranges: Where spans are announced besides.
        recorder: Of a run that has begun before, with the imports; None begins now.
        sampler: Of such a run, sampling already.

    Raises:
        InterruptedRun: On Ctrl-C, with the record so far.
        ReelforgeError: As :meth:`Pipeline.stream`.
    """
    load = LoadMeter()
    recorder = recorder or Recorder(ranges)
    pipeline.recorder = recorder
    recorder.enter("text")
    samples = sampler or MemorySampler(recorder)
    complete = False
    try:
        with nullcontext() if sampler else samples:
            _generate(pipeline, request, recorder, folder)
        complete = True
    except KeyboardInterrupt as error:
        raise InterruptedRun(_record(recorder, samples, temperature, pipeline, load, complete)) from error
    return _record(recorder, samples, temperature, pipeline, load, complete)


def _record(
    recorder: Recorder,
    sampler: MemorySampler,
    temperature: str,
    pipeline: ProfilingPipeline,
    load: LoadMeter,
    complete: bool,
) -> RunRecord:
    return RunRecord(
        temperature=temperature,
        bundle=pipeline.bundle.name,
        total_ms=recorder.now_ms(),
        spans=tuple(recorder.spans),
        memory=tuple(sampler.samples),
        other_load=load.other_cores(),
        complete=complete,
    )


def _generate(pipeline: ProfilingPipeline, request: Request, recorder: Recorder, folder: Path) -> None:
    shape = pipeline.resolve(request).shape
    path = folder / ("profiled.png" if shape.frames == 1 else "profiled.mp4")
    rate = pipeline.spec.defaults.frames_per_second
    writer = VideoWriter(path, shape.height, shape.width, shape.frames, rate)
    finished, skipped = False, 0
    try:
        events = pipeline.stream(request)
        while True:
            started = recorder.now_ms()
            event = next(events, None)
            if event is None:
                break
            if isinstance(event, Progress) and event.phase == "sampling":
                _add_step(recorder, event.step, started, event.skipped > skipped)
                skipped = event.skipped
            elif isinstance(event, Frames):
                with recorder.span("encode frames", Kind.ENCODE):
                    writer.write(event.pixels)
        finished = True
    finally:
        failure = None if finished else KeyboardInterrupt("the run was not finished")
        with recorder.span("finish file", Kind.ENCODE):
            writer.__exit__(None if failure is None else type(failure), failure, None)
        path.unlink(missing_ok=True)


def _add_step(recorder: Recorder, step: int, started_ms: float, skipped: bool) -> None:
    """Record the step that has just ended: from when it was asked for, or from when its engine was there."""
    end = recorder.now_ms()
    for span in reversed(recorder.spans):
        if span.end_ms < started_ms:
            break
        if span.kind is Kind.LOAD or span.name.endswith("begin loop"):
            started_ms = max(started_ms, span.end_ms)
            break
    name, kind = (f"step {step}, skipped", Kind.SKIPPED_STEP) if skipped else (f"step {step}", Kind.STEP)
    recorder.add(name, kind, "dit", started_ms, end)
