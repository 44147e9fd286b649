"""What is expected of a plan, from graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from reelforge.calibration.number_formats import FP8_E4M3, INT8
from reelforge.calibration.weight_stream import WeightQuantisation
from reelforge.export.engines.expected import expected_of
from reelforge.export.engines.request import Expected
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.export.passes.quantise_layers import ActivationScales
from reelforge.export.quantisation import LayerPlan, StagePlan
from reelforge.runtime.recipe import Precision
from tests.export.passes.layer_model import layers_model

HALF, BRAIN, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
SCALES = AttentionScales(0.1, 0.1, 0.1)


def attention(kind: int, heads: int = 2, channels: int = 64, batch: int | str = 1) -> ir.Model:
    shape = [batch, heads, "tokens", channels]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("q", "k", "v", "y")]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], "blocks.0.Attention")
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def layer_plan(number_format: object) -> LayerPlan:
    return LayerPlan(WeightQuantisation(number_format, None, None), ActivationScales(0.1, (-1.0, 1.0)))  # type: ignore[arg-type]


def test_layers_have_the_formats_of_the_plan_and_those_of_another_part_are_left_out() -> None:
    weight = np.ones((3, 4), np.float32)
    model = ir.from_proto(layers_model({"a": (weight, None), "b": (weight, None), "c": (weight, None)}, ("rows", 4)))
    plan = StagePlan(layers={"a": layer_plan(INT8), "b": layer_plan(FP8_E4M3), "elsewhere": layer_plan(INT8)})
    assert expected_of(model, plan) == Expected({"a": Precision.INT8, "b": Precision.FP8})


@pytest.mark.parametrize(("kind", "precision"), [(HALF, Precision.FP16), (BRAIN, Precision.BF16)])
def test_attention_in_its_own_type_or_in_fp8(kind: int, precision: Precision) -> None:
    name = "blocks.0.attention"
    assert expected_of(attention(kind), StagePlan()) == Expected(attentions={name: precision})
    plan = StagePlan(attentions={name: SCALES, "blocks.1.attention": SCALES})
    assert expected_of(attention(kind), plan) == Expected(attentions={name: Precision.FP8})


@pytest.mark.parametrize(
    "model",
    [
        attention(FLOAT),
        attention(HALF, channels=512),
        attention(HALF, channels=8),
        attention(BRAIN, heads=1),
    ],
    ids=["fp32", "wide", "narrow", "one head of one video"],
)
def test_attention_without_a_kernel(model: ir.Model) -> None:
    assert expected_of(model, StagePlan()) == Expected(decomposed=("blocks.0.attention",))


@pytest.mark.parametrize("model", [attention(HALF, channels=12), attention(HALF, channels=256),
                                   attention(BRAIN, heads=1, batch="batch")])  # fmt: skip
def test_attention_at_the_edge_of_the_kernels(model: ir.Model) -> None:
    assert list(expected_of(model, StagePlan()).attentions) == ["blocks.0.attention"]
