"""The numbers of graphs that are lowered for plans, in every precision that can be executed without a GPU.

fp32 runs in ONNX Runtime as the graph is written, bf16 in ONNX's own evaluator; the reference is the stage's modules in
PyTorch. What a compiler makes of the graphs on a GPU is not shown here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.runtime.recipe import Backend, Precision, Target
from tests.bundles import STAGES, TraceMemory
from tests.export.stage_graphs import Arrays, StageGraphs, relative, stage_graphs

FP32, FP16, BF16, INT8, FP8 = Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8
RTX, CPU = Target.parse("rtx:sm89+sm120"), Target(Backend.CPU)


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageGraphs]:
    with stage_graphs(tiny_checkpoint, tmp_path_factory.mktemp("plain")) as made:
        yield made


@pytest.fixture(scope="module", params=[INT8, FP8], ids=["int8", "fp8"])
def quantised(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StageGraphs]:
    """FP8 with FP8 attention."""
    folder = tmp_path_factory.mktemp("quantised")
    with stage_graphs(tiny_checkpoint, folder, request.param, request.param is FP8) as made:
        yield made


@pytest.fixture(autouse=True)
def _traces(trace_memory: TraceMemory) -> Iterator[None]:
    with trace_memory.used():
        yield


@pytest.fixture(scope="module")
def wanted(graphs: StageGraphs) -> Callable[[str], Arrays]:
    """The stages in fp32."""
    made: dict[str, Arrays] = {}

    def of(stage: str) -> Arrays:
        if stage not in made:
            made[stage] = graphs.eager(stage)
        return made[stage]

    return of


@pytest.mark.parametrize("stage", STAGES)
def test_in_fp32_the_graph_is_the_stage(graphs: StageGraphs, wanted: Callable[[str], Arrays], stage: str) -> None:
    """The tolerance is that of a bundle's own parity check."""
    received = graphs.run(graphs.graph(stage, RTX, FP32), stage)
    for name, values in wanted(stage).items():
        assert 0.3 < values.std() < 4
        np.testing.assert_allclose(received[name], values, rtol=0, atol=graphs.stage(stage).tolerance["fp32"])


@pytest.mark.parametrize("stage", STAGES)
def test_in_bf16_it_is_as_close_as_pytorch(graphs: StageGraphs, wanted: Callable[[str], Arrays], stage: str) -> None:
    """Errors of the graph and of the modules in the same type, both against fp32."""
    received = graphs.evaluate(graphs.graph(stage, RTX, BF16), stage)
    eager = graphs.eager(stage, torch.bfloat16)
    for name, values in wanted(stage).items():
        assert received[name].dtype == np.float32
        usual = relative(eager[name], values)
        assert usual < 0.02
        assert relative(received[name], values) < 2 * usual


def executable(model: ir.Model) -> ir.Model:
    """Let ONNX Runtime execute FP8 activations; the numbers are the same."""
    LowerFloat8Pass()(model)
    return model


@pytest.mark.parametrize("stage", ["dit", "llm"])
def test_deferred_scales_change_no_number(quantised: StageGraphs, wanted: Callable[[str], Arrays], stage: str) -> None:
    """The plans' graph against the CPU's, whose 8-bit layers have tests of their own."""
    expected = quantised.run(quantised.graph(stage, CPU, FP32), stage)
    received = quantised.run(executable(quantised.graph(stage, RTX, FP32)), stage)
    for name, values in expected.items():
        assert relative(values, wanted(stage)[name]) > 1e-3  # something is quantised
        assert relative(received[name], values) < 1e-5


@pytest.mark.parametrize("stage", ["dit", "llm"])
def test_bf16_costs_little_beside_eight_bits(
    quantised: StageGraphs, wanted: Callable[[str], Arrays], stage: str
) -> None:
    received = quantised.evaluate(quantised.graph(stage, RTX, BF16), stage)
    expected = quantised.run(quantised.graph(stage, CPU, FP32), stage)
    for name, values in wanted(stage).items():
        assert relative(received[name], values) < 1.2 * relative(expected[name], values)


def test_boundaries_are_fp32_whatever_is_inside(graphs: StageGraphs) -> None:
    for stage in STAGES:
        model = graphs.graph(stage, RTX, BF16)
        values = [*model.graph.inputs, *model.graph.outputs]
        assert {value.dtype for value in values} <= {ir.DataType.FLOAT, ir.DataType.INT64}


def test_no_loop_and_no_uint8_for_compilers(quantised: StageGraphs) -> None:
    model = quantised.graph("dit", RTX, BF16)
    kinds = {value.dtype for node in model.graph for value in node.outputs}
    assert ir.DataType.UINT8 not in kinds
    assert {node.domain for node in model.graph.all_nodes()} == {""}


def test_an_architecture_without_fp32_products_has_none_in_the_decoder(graphs: StageGraphs) -> None:
    def products(target: str) -> set[ir.DataType | None]:
        model = graphs.graph("vae_decoder", Target.parse(target), FP16)
        return {node.outputs[0].dtype for node in model.graph if node.op_type in ("MatMul", "Gemm", "Conv")}

    assert products("rtx:sm86") == {ir.DataType.FLOAT, ir.DataType.FLOAT16}
    assert products("rtx:sm75+sm86") == {ir.DataType.FLOAT16}
