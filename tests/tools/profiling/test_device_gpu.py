"""Profiling real plans on a real GPU: the library reports layers, events time copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.tools.profiling import layers_tensorrt
from reelforge.tools.profiling.instrument import ProfilingPipeline
from reelforge.tools.profiling.measure import measure_run
from reelforge.tools.profiling.recorder import Recorder
from reelforge.tools.profiling.summary import summarise
from tests.runtime.test_tensorrt_gpu import REQUEST, compiled

pytestmark = pytest.mark.gpu

__all__ = ["compiled"]


@pytest.fixture
def bundle_copy(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return Path(shutil.copytree(fake_bundle, tmp_path / "copy.bundle"))


def test_copies_and_steps(compiled: Bundle, tmp_path: Path) -> None:
    with ProfilingPipeline(compiled, None, Recorder()) as pipeline:
        found = summarise([measure_run(pipeline, REQUEST, "warm", tmp_path)])
    assert found is not None
    assert found.steps is not None
    assert found.steps.count == REQUEST.steps
    assert all(copy.median_ms > 0 for copy in found.copies.values())
    assert set(found.copies) == {"copy to device", "copy to host"}
    assert any(phase.device_bytes for phase in found.memory)


def test_layers(compiled: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_tensorrt, "read_receipts", lambda bundle: ())  # these plans were made without
    stages, device, _ = layers_tensorrt.profile_plans(compiled, EngineOptions(), REQUEST)
    assert device
    assert {stage.stage for stage in stages} == {entry.name for entry in compiled.manifest.stages}
    assert all(stage.call_ms > 0 for stage in stages)
