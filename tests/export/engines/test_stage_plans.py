"""Real plans of every stage of a tiny model: what they hold is what the recipe says, under every profile.

Compiled by TensorRT-RTX without a GPU; nothing is executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reelforge.export.engines.builder import build_plan
from reelforge.export.engines.check import check_plan
from reelforge.export.engines.expected import expected_of
from reelforge.export.engines.profiles import profiles_for
from reelforge.export.engines.request import Expected, PlanRequest
from reelforge.runtime.manifest import PromptTemplate
from reelforge.runtime.receipt import LayerRecord
from reelforge.runtime.recipe import Precision, Recipe, Target, VideoShape
from tests.bundles import STAGES, TraceMemory
from tests.export.stage_graphs import StageGraphs, stage_graphs

BF16, INT8, FP8 = Precision.BF16, Precision.INT8, Precision.FP8
SHAPES = (VideoShape(64, 96, 9),)
TEMPLATE = PromptTemplate("{}", 7, "test")


@pytest.fixture(autouse=True)
def _traces(trace_memory: TraceMemory) -> Iterator[None]:
    with trace_memory.used():
        yield


def compiled(
    graphs: StageGraphs, name: str, target: str, rtx: Any, base: Precision = BF16
) -> tuple[Expected, tuple[tuple[LayerRecord, ...], ...]]:
    """Compile a stage, check the plan against what is expected of it, and return both; layers by profile."""
    stage, parsed = graphs.stage(name), Target.parse(target)
    recipe = replace(Recipe.uniform(base, STAGES, SHAPES), attention=FP8 if graphs.attention else None)
    model = graphs.graph(name, parsed, base)
    expected = expected_of(model, graphs.plan(name))
    path = graphs.save(model, name)
    request = PlanRequest(
        stage=name,
        graph=str(path),
        inputs=stage.tensor_infos(stage.inputs),
        outputs=stage.tensor_infos(stage.outputs),
        target=parsed,
        profiles=profiles_for(stage, graphs.tiny.spec, recipe, TEMPLATE),
        expected=expected,
        plan=str(path.with_suffix(".plan")),
        receipt=str(path.with_suffix(".json")),
        scratch=str(path.parent),
    )
    built = build_plan(rtx, request)
    built.writer.discard()
    profiles = built.information.profiles
    assert len(profiles) == len(request.profiles)
    check_plan(name, profiles, expected)
    return expected, profiles


def kinds(layers: tuple[LayerRecord, ...]) -> Counter[str]:
    return Counter(layer.kind for layer in layers)


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageGraphs]:
    with stage_graphs(tiny_checkpoint, tmp_path_factory.mktemp("bf16")) as made:
        yield made


@pytest.mark.parametrize(("name", "attentions"), [("llm", 2), ("clip", 2), ("refiner", 2), ("modulation", 0)])
def test_bf16(plain: StageGraphs, rtx: Any, name: str, attentions: int) -> None:
    expected, profiles = compiled(plain, name, "rtx:sm89+sm120", rtx)
    assert Counter(expected.attentions.values()) == ({BF16: attentions} if attentions else {})
    assert not expected.decomposed
    for layers in profiles:
        assert kinds(layers)["attention"] == attentions
        for layer in layers:
            if layer.kind == "gemm":
                assert layer.inputs[0] == "BFloat16"


def test_the_decoder(plain: StageGraphs, rtx: Any) -> None:
    """Convolutions in bf16, its attention as two products, the first of them in fp32."""
    _, profiles = compiled(plain, "vae_decoder", "rtx:sm86", rtx)
    (layers,) = profiles
    convolutions = [layer for layer in layers if layer.kind == "convolution"]
    parameters = plain.stage("vae_decoder").parameter_shapes()
    assert len(convolutions) == sum(len(shape) == 5 for shape in parameters.values())
    assert {layer.inputs[0] for layer in convolutions} == {"BFloat16"}
    assert Counter(layer.inputs[0] for layer in layers if layer.kind == "gemm")["Float"] == 1


@pytest.mark.parametrize(("precision", "target"), [(FP8, "rtx:sm89+sm120"), (INT8, "rtx:sm86")], ids=["fp8", "int8"])
def test_a_step_in_eight_bits(
    tiny_checkpoint: Path, tmp_path: Path, rtx: Any, precision: Precision, target: str
) -> None:
    """All layers of all blocks and, in FP8, all attentions; one profile per shape, and one per picture size."""
    with stage_graphs(tiny_checkpoint, tmp_path, precision, precision is FP8) as graphs:
        expected, profiles = compiled(graphs, "dit", target, rtx)
        spec = graphs.tiny.spec.dit
    assert set(expected.layers.values()) == {precision}
    assert len(expected.layers) == 12 * spec.double_blocks + 6 * spec.single_blocks
    assert set(expected.attentions.values()) == {FP8 if precision is FP8 else BF16}
    assert len(expected.attentions) == spec.double_blocks + spec.single_blocks
    assert len(profiles) == (1 if precision is FP8 else 2)  # pictures of 24 tokens are too small for FP8 attention
    for layers in profiles:
        outside = [layer for layer in layers if layer.kind == "gemm" and layer.inputs[0] == "BFloat16"]
        assert {name for layer in outside for name in layer.nodes} == {"patch_embed", "final.proj"}
        # A product's result is in the stage's precision: in fp32 the largest tensors would be twice as large.
        eight_bit = [layer for layer in layers if layer.kind == "gemm" and layer not in outside]
        assert {output for layer in eight_bit for output in layer.outputs} == {"BFloat16"}


def test_a_text_encoder_in_eight_bits(tiny_checkpoint: Path, tmp_path: Path, rtx: Any) -> None:
    with stage_graphs(tiny_checkpoint, tmp_path, INT8) as graphs:
        expected, _ = compiled(graphs, "llm", "rtx:sm80+sm86+sm89+sm120", rtx)
    assert len(expected.layers) == 7 * graphs.tiny.spec.llm.used_layers
