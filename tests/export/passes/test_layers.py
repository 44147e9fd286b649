"""Which nodes of a graph are layers: what multiplies by one stored weight of its own, however that is stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from reelforge.export.passes.layers import stored_value, weighted_layers
from tests.export.passes.layer_model import IN, OUT, layers_model, random_array

WEIGHT, BIAS = random_array(0, OUT, IN), random_array(1, OUT)


def graph_of(proto: onnx.ModelProto) -> ir.Graph:
    return ir.from_proto(proto).graph


def one_gemm(second: str, nodes: list[onnx.NodeProto], weight: str = "fc.weight", **attributes: Any) -> ir.Graph:
    """A graph of a Gemm whose second operand is ``second``, made by ``nodes`` from the stored ``weight``."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Gemm", ["x", second], ["y"], "fc", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, weight)],
    )
    return graph_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("weight", [WEIGHT, random_array(2, OUT, IN, 3), random_array(3, OUT, IN, 1, 3, 3)])
def test_a_layer_is_found_under_its_weight_s_name(stored: type, bias: np.ndarray | None, weight: np.ndarray) -> None:
    x = ("n", IN, *["size"] * (weight.ndim - 2))
    graph = graph_of(layers_model({"block.fc": (weight.astype(stored), bias)}, x))
    (layer,) = weighted_layers(graph).values()
    assert layer.name == "block.fc"
    assert layer.weight is graph.initializers["block.fc.weight"]
    assert layer.activation is graph.inputs[0]
    assert layer.activation.shape is not None
    assert layer.activation.shape[1] == IN
    assert layer.node.op_type == ("Gemm" if weight.ndim == 2 else "Conv")
    assert layer.bias is (None if bias is None else graph.initializers["block.fc.bias"])


def test_layers_come_in_execution_order() -> None:
    names = ["z", "a", "m.1", "m.0"]
    assert list(weighted_layers(graph_of(layers_model(dict.fromkeys(names, (WEIGHT, None)))))) == names


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_a_weight_that_two_nodes_use_gives_no_layer(stored: type) -> None:
    """With one cast for both, or none; the other layer is not affected."""
    weight = WEIGHT.astype(stored)
    proto = layers_model({"a": (weight, None), "b": (weight, None), "c": (weight, None)}, weights={"b": "a"})
    assert list(weighted_layers(graph_of(proto))) == ["c"]


def test_a_weight_with_two_casts_gives_no_layer() -> None:
    proto = layers_model({"a": (WEIGHT.astype(np.float16), None), "b": (WEIGHT, None)})
    proto.graph.node.append(helper.make_node("Cast", ["a.weight"], ["again"], "again", to=TensorProto.FLOAT))
    proto.graph.node.append(helper.make_node("Gemm", ["x", "again"], ["y"], "other", transB=1))
    assert list(weighted_layers(graph_of(proto))) == ["b"]


@pytest.mark.parametrize(
    ("nodes", "second", "attributes"),
    [
        ([], "fc.weight", {}),  # input channels first: scales per output channel would be of the wrong axis
        ([], "fc.weight", {"transB": 0}),
        ([], "fc.weight", {"transB": 1, "alpha": 0.5}),
        ([], "fc.weight", {"transB": 1, "beta": 2.0}),
        ([], "fc.weight", {"transB": 1, "transA": 1}),
        ([helper.make_node("Neg", ["fc.weight"], ["negative"], "Neg")], "negative", {"transB": 1}),
    ],
)
def test_what_is_no_layer(nodes: list[onnx.NodeProto], second: str, attributes: dict[str, Any]) -> None:
    assert weighted_layers(one_gemm(second, nodes, **attributes)) == {}


def test_only_weights_are_called_layers() -> None:
    assert weighted_layers(one_gemm("table", [], "table", transB=1)) == {}
    assert list(weighted_layers(one_gemm("fc.weight", [], transB=1))) == ["fc"]
    foreign = one_gemm("fc.weight", [], transB=1)
    for node in foreign:
        node.domain = "elsewhere"
    assert weighted_layers(foreign) == {}


def test_stored_values_are_seen_through_casts_only() -> None:
    cast = helper.make_node("Cast", ["fc.weight"], ["cast"], "Cast", to=TensorProto.FLOAT)
    negative = helper.make_node("Neg", ["cast"], ["negative"], "Neg")
    graph = one_gemm("negative", [cast, negative], transB=1)
    by_name = {output.name: output for node in graph for output in node.outputs}
    assert stored_value(by_name["cast"]) is graph.initializers["fc.weight"]
    assert stored_value(graph.initializers["fc.weight"]) is graph.initializers["fc.weight"]
    assert stored_value(by_name["negative"]) is None
    assert stored_value(graph.inputs[0]) is None
    assert stored_value(None) is None
