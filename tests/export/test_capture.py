"""What a trace holds: arithmetic named after modules, parameters as inputs, and no weights."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from reelforge.export.capture import OPSET, Trace, capture_part
from reelforge.export.models.hunyuan_video.dit import DoubleBlock
from reelforge.export.models.hunyuan_video.stages import hunyuan_video_stages
from reelforge.export.portable import FRAME_CAUSAL_OP
from reelforge.export.stage import Part, Value
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.recipe import Precision
from reelforge.runtime.spec import ModelSpec
from tests.bundles import TraceMemory
from tests.export.toy_stage import Enter, toy_stage


@pytest.fixture(scope="module")
def spec(tiny_bundle: Path) -> ModelSpec:
    return Bundle.open(tiny_bundle, Check.SIZES).manifest.spec


@pytest.fixture(scope="module")
def traces(trace_memory: TraceMemory, spec: ModelSpec) -> dict[str, Trace]:
    """Every part of every stage of the shared bundle, by stage and path."""
    return {
        f"{stage.name}:{part.path or part.label}": trace_memory(part, stage.values, Precision.FP32)
        for stage in hunyuan_video_stages(spec)
        for part in stage.parts
    }


def test_every_part_is_traced_once(traces: dict[str, Trace]) -> None:
    assert set(traces) == {
        *("llm:LlamaEmbedding", "llm:layers.{i}", "llm:Float32Output"),
        *("clip:embeddings", "clip:encoder.layers.{i}", "clip:ClipPooled"),
        *("refiner:RefinerEmbedding", "refiner:blocks.{i}", "refiner:RefinerOutput"),
        *("modulation:ConditioningVector", "modulation:double.{i}", "modulation:single.{i}", "modulation:final"),
        *("dit:PatchEmbedding", "dit:double.{i}", "dit:JoinStreams", "dit:single.{i}", "dit:final"),
        *("guidance:Guidance", "step_change:StepChange", "step_reuse:StepReuse"),
        "input_change:InputChange",
        "vae_decoder:VaeDecoder",
    }


def test_no_weights_inside(traces: dict[str, Trace], spec: ModelSpec) -> None:
    """Constants are a few numbers each; the largest are the ones that stand for the scale of a norm without one."""
    for name, trace in traces.items():
        sizes = [tensor.const_value.nbytes for tensor in trace.graph.initializers.values()]
        assert all(size <= 4 * spec.dit.width for size in sizes), name
        for node in trace.graph.all_nodes():
            assert not any(attribute.type is ir.AttributeType.TENSOR for attribute in node.attributes.values()), name


def test_parameters_are_the_last_inputs(traces: dict[str, Trace]) -> None:
    trace = traces["dit:double.{i}"]
    names = [value.name for value in trace.graph.inputs]
    assert tuple(names[trace.inputs :]) == trace.parameters
    assert trace.inputs == 5
    assert {"image.q.weight", "text.fc2.bias", "image.q_norm.weight"} <= set(trace.parameters)


def test_nodes_are_named_after_modules(traces: dict[str, Trace], spec: ModelSpec) -> None:
    trace = traces["dit:double.{i}"]
    names = [node.name for node in trace.graph]
    assert len(set(names)) == len(names)
    for stream in ("image", "text"):
        for layer in ("q", "k", "v", "proj", "fc1", "fc2"):
            assert f"{stream}.{layer}.MatMul" in names
        assert f"{stream}.q_norm.RMSNormalization" in names
    parents = {str(name).rpartition(f".{node.op_type}")[0] for name, node in zip(names, trace.graph, strict=True)}
    with torch.device("meta"):
        modules = {name for name, _ in DoubleBlock(spec.dit).named_modules()}
    assert parents <= modules


def test_one_attention_per_block(traces: dict[str, Trace]) -> None:
    expected = {"dit:double.{i}", "dit:single.{i}", "refiner:blocks.{i}", "llm:layers.{i}", "clip:encoder.layers.{i}"}
    counts = {name: Counter(node.op_type for node in trace.graph) for name, trace in traces.items()}
    assert {name for name, kinds in counts.items() if kinds["Attention"]} == expected
    assert all(counts[name]["Attention"] == 1 and not counts[name]["Softmax"] for name in expected)
    assert counts["vae_decoder:VaeDecoder"][FRAME_CAUSAL_OP] == 1


def test_causal_encoders_say_so_in_one_attribute(traces: dict[str, Trace]) -> None:
    for name in ("llm:layers.{i}", "clip:encoder.layers.{i}"):
        (node,) = (node for node in traces[name].graph if node.op_type == "Attention")
        assert node.attributes["is_causal"].as_int() == 1
        assert all(value is None for value in node.inputs[3:])


def test_opset(traces: dict[str, Trace]) -> None:
    assert {trace.graph.opset_imports[""] for trace in traces.values()} == {OPSET} == {23}


@pytest.mark.parametrize(
    ("precision", "dtype"), [(Precision.FP32, ir.DataType.FLOAT), (Precision.FP16, ir.DataType.FLOAT16)]
)
def test_precision_is_the_dtype_of_parameters_and_compute_values(
    trace_memory: TraceMemory, precision: Precision, dtype: ir.DataType
) -> None:
    stage = toy_stage()
    trace = trace_memory(stage.parts[1], stage.values, precision)
    kinds = {value.name: value.dtype for value in trace.graph.inputs}
    assert kinds.pop("input_1") == ir.DataType.FLOAT  # the rows: a boundary of the stage
    assert set(kinds.values()) == {dtype}
    assert [value.dtype for value in trace.graph.outputs] == [dtype, ir.DataType.FLOAT]


def test_nothing_is_allocated_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A part with parameters of 64 GB is traced like any other."""
    width = 1 << 17
    part = Part("", partial(Enter, width), ("x",), ("y",))
    level = logging.getLogger("torch.onnx").level
    trace = capture_part(part, {"x": Value("float32", ("batch", width))}, Precision.FP32)
    assert trace.parameters == ("fc.weight", "fc.bias")
    assert [node.op_type for node in trace.graph] == ["Gemm"]
    assert logging.getLogger("torch.onnx").level == level
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
