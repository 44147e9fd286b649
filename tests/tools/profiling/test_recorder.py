"""What records: spans, memory, other load, NVTX ranges, the processor's peak."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reelforge.runtime.errors import RequestError
from reelforge.tools.profiling import machine_peak
from reelforge.tools.profiling.nvtx_ranges import NO_RANGES, open_ranges
from reelforge.tools.profiling.recorder import LoadMeter, MemorySampler, Recorder, resident_bytes
from reelforge.tools.profiling.schema import Kind

BLOCK = 64 << 20


def test_spans_nest_and_survive_errors() -> None:
    recorder = Recorder()

    def fail() -> None:
        with recorder.span("outer", Kind.LOAD, "dit"):
            with recorder.span("inner", Kind.HOST):
                time.sleep(0.002)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    inner, outer = recorder.spans
    assert (inner.name, outer.name, outer.stage) == ("inner", "outer", "dit")
    assert inner.duration_ms >= 2
    assert outer.start_ms <= inner.start_ms <= inner.end_ms <= outer.end_ms


def test_memory_is_seen_in_its_phase() -> None:
    recorder = Recorder()
    with MemorySampler(recorder) as sampler:
        recorder.enter("small")
        recorder.enter("large")
        block = np.ones(BLOCK, np.uint8)
        recorder.enter("after")
        del block
    small, large = (max(s.anonymous_bytes for s in sampler.samples if s.phase == name) for name in ("small", "large"))
    assert large - small > 0.9 * BLOCK
    assert [s.at_ms for s in sampler.samples] == sorted(s.at_ms for s in sampler.samples)


def test_long_runs_keep_their_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([*range(1, 40), 1000, *range(1, 1000)])
    monkeypatch.setattr("reelforge.tools.profiling.recorder.resident_bytes", lambda: (next(sizes), 0))
    monkeypatch.setattr("reelforge.tools.profiling.recorder._INTERVAL_S", 0.0005)
    monkeypatch.setattr("reelforge.tools.profiling.recorder._MAX_SAMPLES", 16)
    with MemorySampler(Recorder()) as sampler:
        time.sleep(0.3)
    assert len(sampler.samples) <= 20
    assert max(sample.anonymous_bytes for sample in sampler.samples) >= 1000


def test_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "absent") is None
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t1 kB\n")
    assert resident_bytes(tmp_path / "status") is None
    (tmp_path / "status").write_text("RssAnon:\t3 kB\nRssFile:\t2 kB\nRssShmem:\t1 kB\n")
    assert resident_bytes(tmp_path / "status") == (3072, 3072)
    assert machine_peak.processor(tmp_path / "absent")


def test_our_own_work_is_no_other_load() -> None:
    meter = LoadMeter()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    other = meter.other_cores()
    assert other is None or other >= 0


def test_no_ranges_without_being_asked() -> None:
    before = set(sys.modules)
    with Recorder().span("a", Kind.RUN):
        NO_RANGES.push("b")
        NO_RANGES.pop()
    assert "nvtx" not in set(sys.modules) - before


def test_ranges_have_the_spans_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    domain = SimpleNamespace(
        get_event_attributes=lambda message: message,
        push_range=lambda attributes: calls.append(("push", attributes)),
        pop_range=lambda: calls.append(("pop", "")),
    )
    domains: list[str] = []
    fake = SimpleNamespace(get_domain=lambda name: domains.append(name) or domain)
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    recorder = Recorder(open_ranges())
    with recorder.span("load dit", Kind.LOAD, "dit"), recorder.span("dit 1", Kind.RUN, "dit"):
        pass
    assert domains == ["reelforge"]
    assert calls == [("push", "load dit"), ("push", "dit 1"), ("pop", ""), ("pop", "")]


def test_the_real_package_takes_them() -> None:
    pytest.importorskip("nvtx")
    recorder = Recorder(open_ranges())
    with recorder.span("dit 1", Kind.RUN, "dit"):
        pass


def test_ranges_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(RequestError, match="pip install reelforge"):
        open_ranges()


def test_the_peak_of_two_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_peak, "_PROBE_S", 0.02)
    monkeypatch.setattr(machine_peak, "_COPY_BYTES", 1 << 20)
    first = machine_peak.measure_peak(1)
    assert first.measured
    assert first.bandwidth > 1e8
    assert all(1e8 < rate < 1e15 for rate in first.flops.values())
    high = machine_peak.Peak(first.name, {"fp32": 1e16, "int8": 1.0}, 1e16, True, "")
    better = machine_peak.measure_peak(1, high)
    assert better.flops["fp32"] == 1e16
    assert better.flops["int8"] > 1e8
    assert better.bandwidth == 1e16
