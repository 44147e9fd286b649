"""A profile as data: the dataclasses of ``profile.json``, which dashboards read (see ``docs/profiling.md``).

Times are milliseconds of one machine's monotonic clock, sizes are bytes. The module knows neither how a number is
measured nor how it is shown. A change that a reader of the file must know about raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reelforge.tools.profiling.schema_work import Comparison, Machine, StageWork, Work

SCHEMA_VERSION = 3


class Kind(enum.Enum):
    """What a span of time was spent on."""

    START = "start"  # the interpreter itself, of a cold run
    IMPORT = "import"
    OPEN = "open"  # the bundle: manifest, sizes, digests
    TOKENISE = "tokenise"
    LOAD = "load"  # an engine, from the bundle's files
    RUN = "run"  # one call of an engine
    STEP = "step"  # one sampling step that was computed, with what the host does around the engine
    SKIPPED_STEP = "skipped_step"  # one that a step cache made of earlier ones, its decision included
    HOST = "host"  # arithmetic of ours: conditioning, blending
    COPY = "copy"  # between host and device
    ENCODE = "encode"  # frames into the video file
    CLOSE = "close"  # an engine gives back what it holds


@dataclass(frozen=True)
class Span:
    """One stretch of time.

    Attributes:
        name: As NVTX ranges and the trace call it too: ``dit step 7``, ``load llm``.
        kind: What it was spent on.
        stage: The stage that it belongs to; empty if none.
        start_ms: From the beginning of its run.
        duration_ms: Its length.
        bytes: That were copied; 0 for anything else.
    """

    name: str
    kind: Kind
    stage: str
    start_ms: float
    duration_ms: float
    bytes: int = 0

    @property
    def end_ms(self) -> float:
        """When it ended."""
        return self.start_ms + self.duration_ms


@dataclass(frozen=True)
class MemorySample:
    """The process' resident memory at a moment; ``device_bytes`` is what is in use of the GPU, None without one."""

    at_ms: float
    phase: str
    anonymous_bytes: int
    file_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """One generation.

    Attributes:
        temperature: ``cold`` (a new process) or ``warm``.
        bundle: Name of the bundle.
        total_ms: From the first span to the end.
        spans: In the order in which they ended; some lie within others.
        memory: Samples, in order.
        other_load: Processor cores that other programs kept busy meanwhile, on average; None where it is not known.
        complete: False if the run was interrupted: the spans are what there was until then.
    """

    temperature: str
    bundle: str
    total_ms: float
    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...]
    other_load: float | None
    complete: bool


@dataclass(frozen=True)
class Timing:
    """Several measurements of the same thing.

    Attributes:
        count: How many.
        median_ms: Their median.
        p95_ms: Below it are 95 % of them.
        min_ms: The smallest.
        max_ms: The largest.
        spread: Distance of the quartiles over the median; 0 for a single one.
    """

    count: int
    median_ms: float
    p95_ms: float
    min_ms: float
    max_ms: float
    spread: float


@dataclass(frozen=True)
class StageTiming:
    """One stage.

    Attributes:
        stage: Its name.
        calls: Per video.
        run: All calls of one video together.
        call: Single calls.
        load: Of its engine, whenever that was loaded, warm-up included; None if it never was.
        share: Of the time of all stages' calls: without loading, the host and the file.
    """

    stage: str
    calls: int
    run: Timing
    call: Timing
    load: Timing | None
    share: float


@dataclass(frozen=True)
class PhaseMemory:
    """Largest resident memory during a phase; kinds of memory may peak at different moments."""

    phase: str
    anonymous_bytes: int
    file_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """What several runs at one temperature have in common.

    Attributes:
        temperature: ``cold`` or ``warm``.
        runs: Complete ones that are counted.
        total: Whole runs.
        parts: Named parts of a run: ``import``, ``open``, ``load``, ``tokenise``, ``run``, ``host``, ``encode``, ...
        stages: In pipeline order.
        steps: Single sampling steps of all runs that were computed; None if there were none.
        skipped_steps: Those that a step cache skipped, with what deciding and making up for them took.
        skips: How many it skipped per video.
        step_gaps: From the end of one call of the loop's engine to the beginning of the next.
        tile_gaps: Likewise of the decoder.
        copies: Between host and device, by direction, per video; empty without a GPU.
        copied_bytes: By direction, per video.
        memory: By phase.
    """

    temperature: str
    runs: int
    total: Timing
    parts: dict[str, Timing]
    stages: tuple[StageTiming, ...]
    steps: Timing | None
    skipped_steps: Timing | None
    skips: int
    step_gaps: Timing | None
    tile_gaps: Timing | None
    copies: dict[str, Timing]
    copied_bytes: dict[str, int]
    memory: tuple[PhaseMemory, ...]


@dataclass(frozen=True)
class LayerTiming:
    """One layer of the model, over one call of its stage.

    Attributes:
        stage: Its stage.
        name: Canonical, as weights are named: ``double.17.image.fc1``; of what has no weights ``double.17.attention``.
        words: For people: ``double block 17, image MLP up-projection``.
        block: ``double.17``; empty outside of blocks.
        kind: ``gemm``, ``attention``, ``convolution``, ``norm``, ``quantise``, ``elementwise``, ``layout`` or
            ``other``.
        precision: In which it computes, ``fp32``; empty if it is not known.
        kernels: The backend's operators or kernels.
        call_ms: Median of one call.
        per_video_ms: ``call_ms`` times the calls per video.
        share: Of all layers' time per video.
        flops: Operations of one call, a multiply-add as two; 0 if it has none worth counting.
        bytes: Read and written by one call at least.
    """

    stage: str
    name: str
    words: str
    block: str
    kind: str
    precision: str
    kernels: tuple[str, ...]
    call_ms: float
    per_video_ms: float
    share: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class LayerProfile:
    """Per-layer times.

    Attributes:
        source: What measured them, or why there are none.
        layers: The most expensive first.
        unnamed_share: Of their time that could only be given to a layer by its position.
        profiled_ms: Stage -> one call under the profiler.
        plain_ms: Stage -> one call without it, the median of the warm runs.
    """

    source: str
    layers: tuple[LayerTiming, ...]
    unnamed_share: float
    profiled_ms: dict[str, float]
    plain_ms: dict[str, float]


@dataclass(frozen=True)
class Peak:
    """What a processor reaches or is said to reach.

    Attributes:
        name: Of the processor.
        flops: Precision -> operations per second.
        bandwidth: Bytes per second, read and written.
        measured: Whether it was measured just now; else it is a document's number.
        source: How, or which document.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    measured: bool
    source: str


@dataclass(frozen=True)
class Advice:
    """Something that would make it faster.

    Attributes:
        about: The layer's or the stage's name.
        action: What to do.
        reason: Why it would help, with the measurement behind it.
        saves_ms: At most, of one video; None if nobody can say.
    """

    about: str
    action: str
    reason: str
    saves_ms: float | None


@dataclass(frozen=True)
class Profile:
    """Everything: the content of ``profile.json``.

    Attributes:
        schema_version: Of this format.
        created: UTC, ISO 8601.
        complete: False if the measurement was interrupted or failed; what is missing is empty.
        missing: What such a measurement did not come to, a sentence each; what failed is the first, with the reason.
        machine: Where.
        work: What.
        warmup: Warm runs that are not counted.
        repeats: Warm runs that were asked for.
        cold: None if there was no cold run.
        warm: None if none was finished.
        runs: All records, among them those of the warm-up and of the other bundle.
        layers: None if they were not asked for.
        peak: None if it was not asked for, or is not known.
        stage_work: What a call of each stage is, by the planner; empty where no stage is known to it.
        advice: What concerns the whole run first, then layer by layer.
        comparison: None if there is no other bundle.
        noise: How far to trust the numbers, a sentence each.
    """

    schema_version: int
    created: str
    complete: bool
    missing: tuple[str, ...]
    machine: Machine
    work: Work
    warmup: int
    repeats: int
    cold: Summary | None
    warm: Summary | None
    runs: tuple[RunRecord, ...]
    layers: LayerProfile | None
    peak: Peak | None
    stage_work: tuple[StageWork, ...]
    advice: tuple[Advice, ...]
    comparison: Comparison | None
    noise: tuple[str, ...]
