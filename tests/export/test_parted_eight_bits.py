"""Head, body and tail of a transformer in 8 bits: codes, scales and kernels are the whole's, and are stored once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildEvents, BuildRequest, CalibrationRequest
from reelforge.export.partition import partition
from reelforge.export.planner.checkpoint import plan_checkpoint
from reelforge.export.planner.plan import PlanOptions
from reelforge.export.stage_compiler import StageCompiler
from reelforge.plugins.attention_choice import ATTENTION_PLUGINS
from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.manifest import Manifest, WeightEntry
from reelforge.runtime.recipe import Precision, Target
from reelforge.runtime.step_cache.settings import PARTS, StepCache
from tests.bundles import CPU, TraceMemory, once, session_folder
from tests.checkpoints import make_diffusers_checkpoint
from tests.export.quantised_builds import SHAPE, STEPS
from tests.export.stage_graphs import StageGraphs, stage_graphs
from tests.export.tiny_stages import FAMILY

CODES = {Precision.INT8: "I8", Precision.FP8: "F8_E4M3"}

pytestmark = pytest.mark.usefixtures("remembered_traces")


def weights_of(manifest: Manifest, *stages: str) -> list[WeightEntry]:
    found = [entry for entry in manifest.stages if entry.name in stages]
    assert len(found) == len(stages)
    return sorted((weight for entry in found for weight in entry.weights), key=lambda weight: weight.name)


@pytest.fixture(scope="module")
def parted(
    tiny_checkpoint: Path, prompts: Path, trace_memory: TraceMemory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision], Path]:
    """Return what builds a bundle in parts for the CPU: calibrated, smoothed, with attention in 8 bits; once each."""
    calibration = CalibrationRequest(prompts=prompts, steps=STEPS, shape=SHAPE, smoothing=0.5, min_psnr_db=0.0)

    def build(precision: Precision) -> Path:
        def make(path: Path) -> None:
            with trace_memory.used():
                asked = BuildRequest(
                    tiny_checkpoint,
                    path,
                    CPU,
                    {"*": precision},
                    attention=precision,
                    parted=True,
                    calibration=calibration,
                )
                build_bundle(asked)

        return once(session_folder(tmp_path_factory) / f"parted.{precision.value}", make)

    return build


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_parts_are_the_whole_bit_for_bit(parted: Callable[[Precision], Path], precision: Precision) -> None:
    """What is calibrated and judged is the whole; the parts have its codes, and compute the same bits."""
    path = parted(precision)
    manifest = Bundle.open(path).manifest
    assert manifest.quality is not None
    whole = weights_of(manifest, "dit")
    assert {weight.dtype for weight in whole} >= {CODES[precision], "F32"}
    assert weights_of(manifest, *PARTS) == whole, "each weight is in one part, with its scale, in the whole's file"
    assert {entry.path for entry in manifest.files if "dit_" in entry.path} == {f"{part}.onnx" for part in PARTS}
    request = Request("a ball", SHAPE.height, SHAPE.width, SHAPE.frames, steps=4, seed=3)
    with Pipeline.open(path, threads=1) as pipeline:
        expected = pipeline.generate(request)
        for text in ("fbcache:0", "easycache:0,reuse=tokens"):
            cached = replace(request, step_cache=StepCache.parse(text))
            np.testing.assert_array_equal(pipeline.generate(cached), expected)
        skipping = replace(request, step_cache=StepCache.parse("fbcache:9,warmup=2"))
        assert not np.array_equal(pipeline.generate(skipping), expected)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageGraphs]:
    """Of a checkpoint with heads of 64 channels, for which there are plugins."""
    checkpoint = once(
        session_folder(tmp_path_factory) / "wide_heads",
        lambda path: make_diffusers_checkpoint(path, seed=1, head_dim=64),
    )
    with stage_graphs(checkpoint, tmp_path_factory.mktemp("parted")) as made:
        yield made


def test_a_body_for_tensorrt_that_is_cut_again_has_plugins(graphs: StageGraphs) -> None:
    """The rotary tables that pass between its parts are those that the head made; head, body and tail as they are: see
    ``test_plugin_graphs.py``."""
    body = next(stage for stage in FAMILY.stages(graphs.tiny.spec, parted=True) if stage.name == "dit_body")
    rules = {name: rule.attentions for name, rule in graphs.tiny.rules.items()}
    compiler = StageCompiler(Target.parse("trt:sm90"), graphs.tiny.resolved, BuildEvents(), rules)
    sizes = {name: math.prod(shape) for name, shape in body.parameter_shapes().items()}
    parts = partition(body, sizes, sum(sizes.values()) // 2)
    assert len(parts) > 1
    for part in parts:
        nodes = [node.op_type for node in compiler.graph(part, Precision.BF16, None, graphs.weights("dit")).graph]
        blocks = sum(one.repeat for one in part.parts if one.path.startswith(("double", "single")))
        assert nodes.count(ATTENTION_PLUGINS["sm90"].dense) == blocks
        assert "Attention" not in nodes


def test_plans_of_parts_are_those_that_the_planner_counts(
    tiny_checkpoint: Path, parted: Callable[[Precision], Path], tmp_path: Path
) -> None:
    """Really compiled, in FP8 with FP8 attention; the whole has no plans of its own but the parts' in a row."""
    asked = BuildRequest(
        tiny_checkpoint,
        tmp_path / "b",
        Target.parse("rtx:sm89"),
        {"dit": Precision.FP8},
        attention=Precision.FP8,
        shapes=(replace(SHAPE, height=64, width=96),),
        stages=("dit", *PARTS),
        parted=True,
        calibration=CalibrationRequest(scales=parted(Precision.FP8) / "scales.safetensors", gated=False),
    )
    manifest = build_bundle(asked)
    Bundle.open(tmp_path / "b")
    whole = manifest.stage("dit")
    assert whole is not None
    of_parts = [plan for entry in manifest.stages if entry.name in PARTS for plan in entry.plans]
    assert [plan.path for plan in whole.plans] == [plan.path for plan in of_parts]
    assert [plan.path.split(".")[0] for plan in whole.plans] == [f"plans/{part}" for part in PARTS]
    (planned,) = [
        build for build in plan_checkpoint(asked, PlanOptions(host_bytes=8 << 30)).plan.builds if build.stage == "dit"
    ]
    assert planned.parts == len(whole.plans) == 3
    on_disk = sum((tmp_path / "b" / plan.path).stat().st_size for plan in whole.plans)
    assert planned.plan_bytes == pytest.approx(on_disk, rel=0.5)
