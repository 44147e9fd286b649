"""The gate of a quantised build for TensorRT executes attention as plugins compute it; only plans are not made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from reelforge.export import build as build_module
from reelforge.export import quantised_build
from reelforge.export.build_request import BuildRequest, CalibrationRequest
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.plugins.schema import NAMESPACE
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import EVERY_STAGE, Precision, Target
from tests.bundles import once, session_folder
from tests.checkpoints import make_diffusers_checkpoint
from tests.export.quantised_builds import SHAPE

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 64 channels, for which there are kernels."""
    folder = session_folder(tmp_path_factory) / "wide_heads"
    return once(folder, lambda path: make_diffusers_checkpoint(path, seed=1, head_dim=64))


def test_the_gate_runs_plugins(
    checkpoint: Path, tmp_path: Path, request_: CalibrationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "find_compiler", lambda target: None)
    monkeypatch.setattr(quantised_build, "add_plans", lambda *arguments: arguments[4])
    measured: list[tuple[onnx.ModelProto, onnx.ModelProto]] = []
    measure = quantised_build.measure_quality

    def spy(reference: Pipeline, candidate: Pipeline, *rest: Any) -> Any:
        measured.append(tuple(onnx.load(pipeline.bundle.path / "dit.onnx", load_external_data=False)
                              for pipeline in (reference, candidate)))  # type: ignore[arg-type]  # fmt: skip
        return measure(reference, candidate, *rest)

    monkeypatch.setattr(quantised_build, "measure_quality", spy)
    output = tmp_path / "b"
    target = Target.parse("trt:sm90")
    request = BuildRequest(
        checkpoint=checkpoint,
        output=output,
        target=target,
        precision={EVERY_STAGE: Precision.FP8},
        shapes=(SHAPE,),
        numerics=Numerics.DIFFUSERS,
        calibration=request_,
    )
    manifest = build_module.build_bundle(request)
    ((reference, candidate),) = measured
    assert not reference.functions
    plugins = [node.op_type for node in candidate.graph.node if node.domain == NAMESPACE]
    assert plugins.count("int8_fp8_attention") == 4
    assert {function.name for function in candidate.functions} == set(plugins)
    assert manifest.quality is not None
    assert manifest.quality.velocity_cosine_worst > 0.98
    shipped = onnx.load(output / "dit.onnx", load_external_data=False)
    assert [node.op_type for node in shipped.graph.node if node.domain == NAMESPACE] == plugins
