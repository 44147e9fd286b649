"""Profiling plans, on the stand-ins for CUDA and TensorRT: copies, steps, layers by receipts. No GPU takes part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.receipt import LayerRecord
from reelforge.tools.profiling import layers_tensorrt
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.measure import measure_run
from reelforge.tools.profiling.recorder import Recorder
from reelforge.tools.profiling.schema import Kind
from reelforge.tools.profiling.summary import of_kind, summarise
from tests.runtime.fake_bundle import write_fake_bundle
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_tensorrt import FakeRtxContext, FakeTensorRt, add_plans

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=5, seed=3)
LAYERS = ("double.0.image.q+double.0.image.k", "attention_7", "reformat_9")


class Machine:
    def __init__(self, bundle: Bundle) -> None:
        self.cuda = FakeCuda()
        self.library = FakeTensorRt(self.cuda)
        self.bundle = add_plans(bundle, self.library)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_fake_bundle(tmp_path / "cpu.bundle")
    made = Machine(Bundle.open(tmp_path / "cpu.bundle"))
    with ExitStack() as stack:
        modules = {"cuda.bindings.runtime": made.cuda, made.library.__name__: made.library}
        stack.enter_context(installed(monkeypatch, modules))
        yield made


def test_a_profiled_video_is_the_same_video(machine: Machine, tmp_path: Path) -> None:
    expected = Pipeline.open(tmp_path / "cpu.bundle", threads=1).generate(REQUEST)
    with ProfilingPipeline(machine.bundle, None, Recorder()) as pipeline:
        assert np.array_equal(pipeline.generate(REQUEST), expected)
        assert pipeline.device_name
    assert machine.cuda.leaks() == {}


def test_copies_and_steps(machine: Machine, tmp_path: Path) -> None:
    with ProfilingPipeline(machine.bundle, None, Recorder()) as pipeline:
        record = measure_run(pipeline, REQUEST, "warm", tmp_path)
    assert machine.cuda.leaks() == {}
    found = summarise([record])
    assert found is not None
    assert [(stage.stage, stage.calls) for stage in found.stages][-2] == ("dit", 5)
    assert found.steps is not None
    assert found.steps.count == 5
    assert set(found.copies) == {"copy to device", "copy to host"}
    # The latents come back after every step.
    latents = next(span for span in of_kind(record, Kind.COPY) if span.name == "copy to host" and span.bytes)
    assert latents.bytes > 0
    assert found.copied_bytes["copy to host"] > 5 * 4
    assert all(span.duration_ms >= 0 for span in record.spans)
    assert any(sample.device_bytes for sample in record.memory)


class ProfiledContext(FakeRtxContext):
    """Reports three layers per execution, as the library does, if it has a profiler."""

    profiler: Any = None
    enqueue_emits_profile = False

    def execute_async_v3(self, stream: int) -> bool:
        done = super().execute_async_v3(stream)
        if self.profiler is not None:
            assert self.enqueue_emits_profile
            for number, name in enumerate(LAYERS, start=1):
                self.profiler.report_layer_time(name, float(number))
        return done


class FakeProfiler:
    """``IProfiler``."""

    def __init__(self) -> None:
        self.initialised = True


@pytest.fixture
def with_layers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(FakeTensorRt, "IProfiler", FakeProfiler, raising=False)
    monkeypatch.setattr("tests.runtime.fake_tensorrt.FakeRtxContext", ProfiledContext)
    records = (
        LayerRecord(LAYERS[0], "gemm", "k", ("FP8",), ("BF16",), ("FP8",), ("double.0.image.q", "double.0.image.k")),
        LayerRecord(LAYERS[1], "attention", "mha", ("BFloat16",), ("BF16",), (), ("double.0.attention",)),
        LayerRecord(LAYERS[2], "reformat", "copy", ("Float",), ("BF16",), (), ()),
    )  # fmt: skip

    class Item:
        def __init__(self, stage: str) -> None:
            self.stage = stage
            self.receipt = type("R", (), {"layers": records})()

    monkeypatch.setattr(
        layers_tensorrt, "read_receipts", lambda bundle: [Item(stage.name) for stage in bundle.manifest.stages]
    )
    return machine


def test_layers_are_the_receipts(with_layers: Machine) -> None:
    stages, device, peak = layers_tensorrt.profile_plans(with_layers.bundle, EngineOptions(), REQUEST)
    assert device
    assert peak is None  # the stand-in's GPU is in no document
    dit = next(stage for stage in stages if stage.stage == "dit")
    found = {layer.name: layer for layer in dit.layers}
    joined = found["double.0.image.q+k"]
    assert (joined.call_ms, joined.kind, joined.precision) == (1.0, "gemm", "fp8")
    assert joined.words == "double block 0, image query projection and key projection"
    attention = found["double.0.attention"]
    assert (attention.call_ms, attention.kind, attention.precision) == (2.0, "attention", "bf16")
    assert found["double.0.layout"].call_ms == 3.0
    assert dit.call_ms == pytest.approx(6.0)
    assert dit.unnamed_ms == pytest.approx(3.0)


def test_no_profiler_in_runs_that_count(with_layers: Machine, tmp_path: Path) -> None:
    with ProfilingPipeline(with_layers.bundle, None, Recorder()) as pipeline:
        measure_run(pipeline, REQUEST, "warm", tmp_path)
        assert pipeline.device_layers is None


def test_calls_are_told_apart_by_repetition() -> None:
    record = LayerRecord("a", "gemm", "k", ("FP8",), (), (), ("x.q",))
    reports = [("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 4.0)]
    calls = layers_tensorrt.calls_of(reports, {"a": record}, {"x.q": 70})
    assert [[(node.name, node.ms, node.flops) for node in call] for call in calls] == [
        [("x.q", 1.0, 70), ("b", 2.0, 0)],
        [("x.q", 3.0, 70), ("b", 4.0, 0)],
    ]


def test_a_gpus_roof_is_its_documents() -> None:
    peak = layers_tensorrt.document_peak("NVIDIA GeForce RTX 4090")
    assert peak is not None
    assert not peak.measured
    assert peak.source
    assert peak.flops["fp8"] > peak.flops["bf16"]
    assert layers_tensorrt.document_peak("NVIDIA Imaginary 1") is None


@pytest.mark.parametrize(
    ("driver", "table"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name(driver: str, table: str) -> None:
    peak = layers_tensorrt.document_peak(driver)
    assert peak is not None
    assert peak.name == table


def test_the_real_library_has_what_is_called() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert {"profiler", "enqueue_emits_profile"} <= set(dir(library.IExecutionContext))
    assert "report_layer_time" in dir(library.IProfiler)
