"""The whole measurement: cold run, warm-up, repeats (alternating with another bundle), layers; kept when interrupted.

Each part is put away as soon as it is there, so that Ctrl-C, or an engine that fails, leaves a profile of what was
measured until then, marked as incomplete. The module knows the order of the parts and not how they are shown.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.cuda.driver import Cuda
from reelforge.runtime.engines.engine import EngineOptions, thread_count
from reelforge.runtime.engines.onnxruntime_providers import gpu_provider
from reelforge.runtime.errors import EngineError, ReelforgeError, RequestError
from reelforge.runtime.recipe import Backend
from reelforge.runtime.request import Request, resolve_request
from reelforge.tools.profiling.advice import Facts, advise
from reelforge.tools.profiling.cold import ColdRequest, drop_from_page_cache, start_cold
from reelforge.tools.profiling.compare import compare, require_same_work
from reelforge.tools.profiling.gpu_peak import measure_gpu_peak, open_gpu
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.layers import layer_profile, no_layers
from reelforge.tools.profiling.machine_peak import describe_machine, measure_peak
from reelforge.tools.profiling.measure import InterruptedRun, measure_run
from reelforge.tools.profiling.nvtx_ranges import NO_RANGES, Ranges, open_ranges
from reelforge.tools.profiling.planned_work import planned_stages, planner_missing
from reelforge.tools.profiling.recorder import Recorder
from reelforge.tools.profiling.schema import SCHEMA_VERSION, LayerProfile, Peak, Profile, RunRecord
from reelforge.tools.profiling.schema_work import Machine
from reelforge.tools.profiling.summary import summarise
from reelforge.tools.profiling.trust import noise_notes
from reelforge.tools.profiling.work import describe_work

Tell = Callable[[str], None]
_LAYER_S, _FEWEST, _MOST = 1.0, 3, 25


class UnfinishedProfileError(Exception):
    """A measurement failed after some of its runs were finished.

    Attributes:
        profile: What was measured until then.
        error: What ended it.
    """

    def __init__(self, profile: Profile, error: ReelforgeError) -> None:
        super().__init__(error.where)
        self.profile = profile
        self.error = error


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        bundle: Checked.
        request: One video.
        options: For its engines.
        check: How a cold run opens the bundle.
        warmup: Warm runs that do not count.
        repeats: Warm runs that count, at least one.
        cold: Whether to start with a cold run.
        layers: Whether to profile layers.
        peak: Whether to measure the processor's peak.
        nvtx: Whether to announce NVTX ranges.
        memory_budget: What loaded engines may take between warm runs, as :meth:`Pipeline.open` has it.
        other: A bundle to compare with.
    """

    bundle: Bundle
    request: Request
    options: EngineOptions = field(default_factory=EngineOptions)
    check: Check = Check.FULL
    warmup: int = 1
    repeats: int = 5
    cold: bool = True
    layers: bool = True
    peak: bool = True
    nvtx: bool = False
    memory_budget: int | str | None = None
    other: Bundle | None = None

    def label(self, bundle: Bundle) -> str:
        """Return what a bundle is called: its name, or the other's path where both have the same."""
        same = self.other is not None and bundle is self.other and bundle.name == self.bundle.name
        return str(bundle.path) if same else bundle.name

    def require_possible(self) -> None:
        """Refuse what cannot be measured, before anything is.

        Raises:
            RequestError: If there is nothing to repeat, the bundle does not serve the request, or the other bundle
                would do different work.
        """
        for name, value, least in (("--repeats", self.repeats, 1), ("--warmup", self.warmup, 0)):
            if value < least:
                raise RequestError(
                    f"{name} {value} is not a number of runs that can be measured.",
                    received=value,
                    expected=f"a whole number of at least {least}",
                    fix=f"use {name} {max(least, 1)}, or leave it out",
                )
        ours = resolve_request(self.request, self.bundle.manifest, self.bundle.name)
        if self.other is not None:
            theirs = resolve_request(self.request, self.other.manifest, self.other.name)
            specs = self.bundle.manifest.spec, self.other.manifest.spec
            require_same_work(self.bundle.name, specs[0], ours, self.other.name, specs[1], theirs)


@dataclass
class _Collected:
    """What there is so far."""

    runs: list[RunRecord] = field(default_factory=list)
    counted: list[RunRecord] = field(default_factory=list)
    other_counted: list[RunRecord] = field(default_factory=list)
    cold: RunRecord | None = None
    peak: Peak | None = None
    layers: LayerProfile | None = None
    gpu: str | None = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def profile_bundle(asked: ProfileRequest, tell: Tell) -> Profile:
    """Measure, and return the profile; an incomplete one after Ctrl-C.

    Args:
        asked: What to measure.
        tell: Told what is going on, a line each.

    Raises:
        RequestError: See :meth:`ProfileRequest.require_possible`, or if the package for NVTX ranges is missing.
        EngineError: If an engine fails before any run was finished.
        UnfinishedProfileError: If one fails later, or the bundle was altered meanwhile.
    """
    asked.require_possible()
    failure: ReelforgeError | None = None
    ranges = open_ranges() if asked.nvtx else NO_RANGES
    got = _Collected()
    with tempfile.TemporaryDirectory(prefix="reelforge-profile-") as folder, ExitStack() as stack:
        measurement = _Measurement(asked, got, tell, ranges, Path(folder), stack)
        parts = list(measurement.parts())
        done = 0
        try:
            for _, part in parts:
                part()
                done += 1
        except InterruptedRun as interrupted:
            got.runs.append(interrupted.record)
            got.missing = _summed_up([name for name, _ in parts[done:]])
        except KeyboardInterrupt:
            got.missing = _summed_up([name for name, _ in parts[done:]])
        except ReelforgeError as error:
            if not got.runs:
                raise
            failure = error
            failed, *rest = (name for name, _ in parts[done:])
            got.missing = [f"{failed} ({error.where.rstrip('.')})", *_summed_up(rest)]
        measurement.meet_gpu()
    profile = _profile(asked, got)
    if failure is not None:
        raise UnfinishedProfileError(profile, failure) from failure
    return profile


class _Measurement:
    """Does the parts, one after the other."""

    def __init__(
        self, asked: ProfileRequest, got: _Collected, tell: Tell, ranges: Ranges, folder: Path, stack: ExitStack
    ) -> None:
        self._asked, self._got, self._tell = asked, got, tell
        self._ranges, self._folder, self._stack = ranges, folder, stack
        self._pipelines: dict[str, ProfilingPipeline] = {}
        self._gpu: Cuda | None = None

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield what is to be done: in words for an interrupted profile, and the doing."""
        asked = self._asked
        on_host = asked.bundle.manifest.target.backend is Backend.CPU
        if asked.peak and on_host:
            yield "the machine's peak", self._peak
        if asked.cold:
            yield "the cold run", self._cold
        for number in range(asked.warmup):
            yield f"warm-up run {number + 1} of {asked.warmup}", lambda: self._round(counts=False)
        for number in range(asked.repeats):
            yield f"warm run {number + 1} of {asked.repeats}", lambda: self._round(counts=True)
        if asked.layers:
            yield "the layers", self._layers
        if asked.peak and on_host:  # once more: a disturbance before may have hidden it
            yield "the machine's peak, once more", self._peak
        if asked.peak and asked.bundle.manifest.target.backend is Backend.CUDA:  # of plans' GPUs see _layers
            yield "the GPU's peak", self._gpu_peak

    def _peak(self) -> None:
        self._tell("measuring the processor's peak")
        self._got.peak = measure_peak(thread_count(self._asked.options), self._got.peak)

    def _gpu_peak(self) -> None:
        """Measure it after everything else, which then had the GPU for itself, with engines given back."""
        self._tell("measuring the GPU's peak")
        for pipeline in self._pipelines.values():
            pipeline.close()
        provider = gpu_provider(replace(self._asked.options, provider=None))
        try:
            self._got.peak = measure_gpu_peak(provider, self._got.gpu or "a GPU without a name")
        except EngineError as error:  # the runs are worth showing without it
            self._got.notes.append(f"There is no peak: {error.where} ({error.received})")

    def meet_gpu(self) -> None:
        """Find out which GPU it is, and how its memory can be asked for."""
        if self._asked.bundle.manifest.target.backend is Backend.CPU or self._gpu is not None:
            return
        self._gpu, reason = open_gpu(self._asked.options)
        if self._gpu is not None:
            self._got.gpu = self._gpu.device.name
        elif reason not in self._got.notes:
            self._got.notes.append(reason)

    def _cold(self) -> None:
        self._tell("cold run: a new process")
        asked = self._asked
        drop_from_page_cache(asked.bundle.path)
        request = ColdRequest(
            origin_ns=time.perf_counter_ns(),
            bundle=str(asked.bundle.path.resolve()),
            check=asked.check.value,
            request=to_json(asked.request),
            options=to_json(asked.options),
            folder=str(self._folder),
            ranges=asked.nvtx,
        )
        try:
            code, result, errors = start_cold(request, self._folder)
        except KeyboardInterrupt:
            self._got.cold = self._take_cold(self._folder / "cold.json")
            raise
        if not result:
            raise EngineError(
                f"the cold run of bundle {asked.bundle.name!r} failed.",
                received=f"exit code {code}",
                fix=" ".join(errors.strip().splitlines()[-4:]) or "use --no-cold",
            )
        self._got.cold = self._take_cold(self._folder / "cold.json")
        if self._got.cold is not None and not self._got.cold.complete:
            raise KeyboardInterrupt

    def _take_cold(self, path: Path) -> RunRecord | None:
        if not path.exists():
            return None
        record = from_json(RunRecord, json.loads(path.read_text(encoding="utf-8")))
        self._got.runs.append(record)
        return record

    def _round(self, counts: bool) -> None:
        """Run each bundle once; which of two comes first alternates, so that drifts of the machine cancel."""
        asked, got = self._asked, self._got
        pairs = [(asked.bundle, got.counted)] + ([(asked.other, got.other_counted)] if asked.other else [])
        finished = len(got.counted)
        kind = f"warm run {finished + 1} of {asked.repeats}" if counts else "warm-up run"
        done = []
        for bundle, target in reversed(pairs) if finished % 2 else pairs:
            self._tell(f"{kind}: {asked.label(bundle)}")
            pipeline = self._pipeline(bundle)
            pipeline.keep_inputs = asked.layers and not counts and bundle is asked.bundle
            record = measure_run(pipeline, asked.request, "warm", self._folder, self._ranges)
            pipeline.keep_inputs = False
            record = replace(record, bundle=asked.label(bundle))
            got.runs.append(record)
            done.append((target, record))
        for target, record in done if counts else ():  # a round counts as a whole
            target.append(record)

    def _layers(self) -> None:
        asked, got = self._asked, self._got
        summary = summarise(got.counted)
        assert summary is not None, "layers are profiled after the warm runs"
        plain = {stage.stage: stage.call.median_ms for stage in summary.stages}
        calls = {stage.stage: stage.calls for stage in summary.stages}
        backend = asked.bundle.manifest.target.backend
        if backend is Backend.CUDA:
            got.layers = no_layers("ONNX Runtime's profiler sees a GPU's launches and not its kernels")
            return
        pipeline = self._pipeline(asked.bundle)
        self._tell("profiling layers")
        if backend.has_plans:
            from reelforge.tools.profiling import layers_tensorrt

            stages, _, got.peak = layers_tensorrt.profile_plans(asked.bundle, asked.options, asked.request)
            got.layers = layer_profile(layers_tensorrt.SOURCE, stages, calls, plain)
            return
        from reelforge.tools.profiling import layers_onnxruntime

        if not pipeline.kept:  # without a warm-up nobody has seen the stages' inputs
            pipeline.keep_inputs = True
            pipeline.recorder = Recorder()
            pipeline.generate(asked.request)
            pipeline.keep_inputs = False
        stages = [
            layers_onnxruntime.profile_stage(
                asked.bundle, stage, inputs, asked.options, _layer_repeats(plain.get(stage))
            )
            for stage, inputs in pipeline.kept.items()
        ]
        got.layers = layer_profile(layers_onnxruntime.SOURCE, stages, calls, plain)

    def _pipeline(self, bundle: Bundle) -> ProfilingPipeline:
        key = str(bundle.path)
        if key not in self._pipelines:
            self.meet_gpu()
            gpu = self._gpu if bundle.manifest.target.backend is Backend.CUDA else None
            budget = self._asked.memory_budget
            pipeline = ProfilingPipeline(bundle, self._asked.options, Recorder(self._ranges), budget, gpu)
            self._pipelines[key] = self._stack.enter_context(pipeline)
        return self._pipelines[key]


def _summed_up(missing: Sequence[str]) -> list[str]:
    """Put runs together: ``warm run 4 of 9`` and so on become ``warm runs 4 to 9 of 9``."""
    found: list[str] = []
    for kind, group in groupby(missing, key=lambda name: re.sub(r"\d+ of", "# of", name)):
        names = list(group)
        if len(names) == 1:
            found += names
        else:
            first, last = (re.findall(r"(\d+) of", name)[0] for name in (names[0], names[-1]))
            found.append(kind.replace(" run #", f" runs {first} to {last}"))
    return found


def _layer_repeats(call_ms: float | None) -> int:
    """Return how often a stage is profiled: short calls, which a disturbance moves most, more often."""
    return _FEWEST if not call_ms else min(_MOST, max(_FEWEST, round(_LAYER_S * 1e3 / call_ms)))


def _profile(asked: ProfileRequest, got: _Collected) -> Profile:
    warmups = [one for one in got.runs if one.temperature == "warm" and one.bundle == asked.bundle.name][: asked.warmup]
    warm, cold = summarise(got.counted, warmups), summarise([got.cold] if got.cold else [])
    work = describe_work(asked.bundle, asked.request, asked.options)
    pairs = min(len(got.counted), len(got.other_counted))
    comparison = None
    if asked.other is not None and pairs:
        other = replace(describe_work(asked.other, asked.request, asked.options), bundle=asked.label(asked.other))
        comparison = compare(got.counted[:pairs], got.other_counted[:pairs], other)
    machine: Machine = describe_machine(got.gpu)
    return Profile(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=not got.missing,
        missing=tuple(got.missing),
        machine=machine,
        work=work,
        warmup=asked.warmup,
        repeats=asked.repeats,
        cold=cold,
        warm=warm,
        runs=tuple(got.runs),
        layers=got.layers,
        peak=got.peak,
        stage_work=planned_stages(asked.bundle, asked.request),
        advice=() if warm is None else advise(got.layers, Facts(work, got.peak, warm, cold, machine.cores)),
        comparison=comparison,
        noise=(*noise_notes(machine, got.counted, warm, got.layers), *got.notes, *filter(None, [planner_missing()])),
    )
