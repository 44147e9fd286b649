"""Which operators each target's graphs may have: what ONNX Runtime's CPU provider alone has must reach no other."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from reelforge.export.lower import EightBit, lower
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.runtime.recipe import Backend, Precision, Target
from tests.export.passes.layer_model import quantised_layer, random_array

TARGETS = ("cpu", "cuda", "rtx:sm89", "trt:sm90")
HEADS, WIDTH = 2, 16
FEATURES = HEADS * WIDTH
WEIGHT, BIAS = random_array(0, FEATURES, FEATURES), random_array(1, FEATURES)
ONE_PROVIDER = {"com.microsoft"}
"""Domains of operators that not every backend reads."""


def block() -> ir.Model:
    """Everything that a pass of the CPU's list looks for: layers, a rotation, attention, upsampling of a video."""
    node = helper.make_node
    nodes, tensors = [], []
    for name in "qkv":
        tensors += [numpy_helper.from_array(WEIGHT, f"{name}.weight"), numpy_helper.from_array(BIAS, f"{name}.bias")]
        nodes += [
            node("Transpose", [f"{name}.weight"], [f"{name}.t"], f"{name}.t", perm=[1, 0]),
            node("MatMul", ["x", f"{name}.t"], [f"{name}.product"], f"{name}.MatMul"),
            node("Add", [f"{name}.product", f"{name}.bias"], [f"{name}.flat"], f"{name}.Add"),
            node("Reshape", [f"{name}.flat", "by_head"], [f"{name}.heads"], f"{name}.Reshape"),
        ]
    for name in "qk":
        nodes += [
            node("Unsqueeze", ["cos", "one"], [f"{name}.cos"], f"{name}.cos"),
            node("Unsqueeze", ["sin", "one"], [f"{name}.sin"], f"{name}.sin"),
            node("Split", [f"{name}.heads"], [f"{name}.a", f"{name}.b"], f"{name}.Split", axis=3, num_outputs=2),
            node("Mul", [f"{name}.a", f"{name}.cos"], [f"{name}.ac"], f"{name}.ac"),
            node("Mul", [f"{name}.b", f"{name}.sin"], [f"{name}.bs"], f"{name}.bs"),
            node("Mul", [f"{name}.b", f"{name}.cos"], [f"{name}.bc"], f"{name}.bc"),
            node("Mul", [f"{name}.a", f"{name}.sin"], [f"{name}.as"], f"{name}.as"),
            node("Sub", [f"{name}.ac", f"{name}.bs"], [f"{name}.first"], f"{name}.first"),
            node("Add", [f"{name}.bc", f"{name}.as"], [f"{name}.second"], f"{name}.second"),
            node("Concat", [f"{name}.first", f"{name}.second"], [f"{name}.turned"], f"{name}.Concat", axis=-1),
        ]
    attended = ["q.turned", "k.turned", "v.heads"]
    nodes += [node("Transpose", [each], [f"{each}.t"], f"{each}.t", perm=[0, 2, 1, 3]) for each in attended]
    nodes += [
        node("Attention", [f"{each}.t" for each in attended], ["attended"], "b.Attention"),
        node("Transpose", ["attended"], ["y"], "b.Transpose", perm=[0, 2, 1, 3]),
        node("Resize", ["video", "", "factors"], ["larger"], "up.Resize", mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric"),
    ]  # fmt: skip
    tensors += [
        numpy_helper.from_array(np.array([0, -1, HEADS, WIDTH]), "by_head"),
        numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "factors"),
    ]
    info = helper.make_tensor_value_info
    inputs = [
        info("x", TensorProto.FLOAT, [1, "tokens", FEATURES]),
        *(info(name, TensorProto.FLOAT, ["tokens", WIDTH // 2]) for name in ("cos", "sin")),
        info("video", TensorProto.FLOAT, [1, 3, "frames", "rows", "columns"]),
    ]
    outputs = [
        info("y", TensorProto.FLOAT, [1, "tokens", HEADS, WIDTH]),
        info("larger", TensorProto.FLOAT, [1, 3, "more_frames", "more_rows", "more_columns"]),
    ]
    graph = helper.make_graph(nodes, "block", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def lowered(target: Target, precision: Precision) -> ir.Model:
    layers = {name: quantised_layer(WEIGHT, 0.02, precision.value) for name in "qkv"}
    on_cpu = target.backend is Backend.CPU
    attention = {"b.attention": AttentionScales(0.1, 0.1, 0.1, precision)} if on_cpu else {}
    return lower(block(), target, EightBit(layers, attention))


def operators(model: ir.Model) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()]


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_operators_of_one_provider_reach_no_other_target(target: str, precision: Precision) -> None:
    model = lowered(Target.parse(target), precision)
    assert not {node.domain for node in model.graph.all_nodes()} & ONE_PROVIDER
    assert not set(model.opset_imports) & ONE_PROVIDER
    names = operators(model)
    assert names.count("::Attention") == 1
    assert names.count("::Gemm") + names.count("::MatMul") == 3
    assert "::RotaryEmbedding" not in names  # neither parser was tried with it
    (resize,) = (node for node in model.graph if node.op_type == "Resize")
    scales = resize.inputs[2]
    assert scales is not None
    assert scales.const_value is not None
    assert scales.const_value.shape == (5,)


def test_the_cpu_has_them() -> None:
    """So that the test above looks for what would be there."""
    names = operators(lowered(Target(Backend.CPU), Precision.INT8))
    assert names.count("com.microsoft::MatMulIntegerToFloat") == 3 + 2
    assert names.count("::RotaryEmbedding") == 2
    assert names.count("::Scan") == 1
    assert not {"::Attention", "::Gemm", "::DequantizeLinear", "::Split"} & set(names)
