"""A profile of a bundle for ONNX Runtime's CUDA provider, on stand-ins: the GPU's name, memory, peak, roofline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.recipe import Backend, Target
from reelforge.runtime.request import Request
from reelforge.tools.profiling import gpu_peak, machine_peak
from reelforge.tools.profiling.report_html import report
from reelforge.tools.profiling.roofline import stage_points
from reelforge.tools.profiling.schema import Profile
from reelforge.tools.profiling.session import ProfileRequest, profile_bundle
from reelforge.tools.profiling.terminal import show
from reelforge.tools.profiling.trace import trace_of
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.test_onnxruntime_providers import CUDA, FakeOnnxRuntime
from tests.tools.profiling.test_gpu_peak import FakeOnnxRuntime as FakeProbes

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=3)


class Gpu(FakeOnnxRuntime):
    """Runs stages, whose graphs are files, and probes, whose graphs are bytes."""

    def __init__(self, lacks: tuple[str, ...] = ()) -> None:
        super().__init__(CUDA)
        self.probes = FakeProbes(lacks)

    def InferenceSession(self, source: Any, settings: Any, providers: list[Any]) -> Any:
        if isinstance(source, bytes):
            return self.probes.InferenceSession(source, settings, providers)
        return super().InferenceSession(source, settings, providers)


Measure = Callable[..., Profile]


@pytest.fixture
def measure(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.setattr(machine_peak, "_PROBE_S", 0.01)
    monkeypatch.setattr(gpu_peak, "_SIZE", 64)
    monkeypatch.setattr(gpu_peak, "_ELEMENTS", 1 << 12)
    opened = Bundle.open(tiny_bundle)
    bundle = Bundle(opened.path, replace(opened.manifest, target=Target(Backend.CUDA)))

    def run(cuda: FakeCuda | None, lacks: tuple[str, ...] = (), **changes: Any) -> Profile:
        asked = ProfileRequest(
            bundle, REQUEST, EngineOptions(threads=1, device=1), cold=False, warmup=0, repeats=1, **changes
        )
        with installed(monkeypatch, {"onnxruntime": Gpu(lacks), "cuda.bindings.runtime": cuda}):
            return profile_bundle(asked, lambda _: None)

    return run


def test_the_gpu_is_named_and_its_memory_shown(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = FakeCuda(devices=2)
    cuda.allocate = cuda._allocate(cuda.device, 123_000_000)  # type: ignore[attr-defined]
    found = measure(cuda, peak=False)
    assert found.complete
    assert found.machine.gpu == "Fake GPU"
    assert (found.work.provider, found.work.threads) == ("cuda", None)
    assert found.warm is not None
    assert {phase.device_bytes for phase in found.warm.memory if phase.phase != "text"} == {123_000_000}
    assert found.layers is not None
    assert "launches and not its kernels" in found.layers.source
    page = report(found)
    assert "Fake GPU; " in page
    assert "GPU memory in use" in page
    assert "warm, GPU" in page
    assert "in use of the GPU" in page
    assert "Roofline" not in page  # nothing was measured, and nothing is made up
    from rich.console import Console

    show(found, Console(width=200))
    assert "decoding" in capsys.readouterr().out
    counters = [event for event in trace_of(found)["traceEvents"] if event["name"] == "GPU memory in use"]
    assert {event["args"]["in use"] for event in counters} == {123_000_000}


def test_the_roof_is_measured_and_stages_lie_below_it(measure: Measure) -> None:
    found = measure(FakeCuda(devices=2))
    assert found.peak is not None
    assert found.peak.measured
    assert found.peak.name == "Fake GPU"
    assert {"fp32", "int8"} <= set(found.peak.flops)
    assert {work.stage for work in found.stage_work} >= {"llm", "clip", "refiner", "modulation", "dit", "vae_decoder"}
    assert found.warm is not None
    points = stage_points(found.warm.stages, found.stage_work, found.peak)
    assert [point.words for point in points if point.rate <= 0] == []
    assert len(points) == len(found.stage_work)
    page = report(found)
    assert "A dot is a stage" in page
    assert "Whole stages: operations by the planner" in page
    json.dumps(trace_of(found))


def test_a_peak_that_cannot_be_measured_costs_no_profile(measure: Measure) -> None:
    found = measure(FakeCuda(devices=2), lacks=("MatMul", "MatMulInteger"))
    assert found.complete
    assert found.peak is None
    assert any(note.startswith("There is no peak: the peak of Fake GPU cannot be measured") for note in found.noise)
    assert "Roofline" not in report(found)


def test_without_cuda_python_the_gpu_stays_nameless_and_that_is_said(measure: Measure) -> None:
    found = measure(None, peak=False)
    assert found.complete
    assert found.machine.gpu is None
    assert [note for note in found.noise if "could not be asked for its name" in note] == [found.noise[-1]]
    assert all(phase.device_bytes is None for phase in found.warm.memory)  # type: ignore[union-attr]
