"""What tests share because it is slow to make: tiny checkpoints, one bundle, and traces of the stages' parts.

Each is made once per test session, by whichever worker of pytest-xdist comes first; ``tests/conftest.py`` has the
fixtures. Traces are remembered on disk, so that a test that builds a bundle pays for weights and graphs only;
``test_build_engine.py`` holds a build without the memory against the shared bundle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from reelforge.export import stage_compiler
from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildEvents, BuildRequest, CalibrationRequest
from reelforge.export.capture import Trace, capture_part
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.stage import Part, Value
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.recipe import EVERY_STAGE, Backend, Precision, Target

CPU = Target(Backend.CPU)
STAGES = ("llm", "clip", "refiner", "modulation", "dit", "vae_decoder")
"""Those with weights of their own."""

ALL_STAGES = (*STAGES[:-1], "guidance", "step_change", "step_reuse", "input_change", "vae_decoder")


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this test session share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` against all other processes."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return ``folder``, made by whoever comes first."""
    with locked(folder):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@dataclass(frozen=True)
class TraceMemory:
    """``capture_part`` with a memory on disk: a part of the same kind and size is traced once."""

    folder: Path

    def __call__(self, part: Part, values: dict[str, Value], precision: Precision) -> Trace:
        read = {port.value: values[port.value] for port in part.input_ports}
        text = repr((part.build, part.inputs, read, precision))
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.onnx"
        with locked(path):
            if path.exists():
                graph = ir.load(path).graph
                about = json.loads(path.with_suffix(".json").read_text())
                return Trace(graph, about["inputs"], tuple(about["parameters"]))
            trace = capture_part(part, values, precision)
            about = {"inputs": trace.inputs, "parameters": trace.parameters}
            path.with_suffix(".json").write_text(json.dumps(about))
            unfinished = path.with_suffix(".unfinished")
            ir.save(ir.Model(trace.graph, ir_version=11), unfinished)
            unfinished.rename(path)
            return trace

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let builds in this process take their traces from here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_compiler, "capture_part", self)
            yield


def build(
    checkpoint: Path,
    output: Path,
    *stages: str,
    precision: Precision | Mapping[str, Precision] = Precision.FP32,
    batch: int = 1,
    numerics: Numerics = Numerics.DIFFUSERS,
    prompt_template: Path | None = None,
    verify: bool = False,
    calibration: CalibrationRequest | None = None,
    kept: Mapping[str, tuple[str, ...]] | None = None,
    attention: Precision | None = None,
    events: BuildEvents | None = None,
) -> Manifest:
    """Build a bundle of ``stages`` (all by default)."""
    request = BuildRequest(
        checkpoint=checkpoint,
        output=output,
        target=CPU,
        precision={EVERY_STAGE: precision} if isinstance(precision, Precision) else precision,
        stages=stages,
        batch=batch,
        numerics=numerics,
        prompt_template=prompt_template,
        verify=verify,
        calibration=calibration or CalibrationRequest(),
        kept=kept or {},
        attention=attention,
    )
    return build_bundle(request, events)
