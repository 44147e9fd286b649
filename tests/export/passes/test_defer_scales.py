"""Deferred scales: the same numbers as the graph before, in every base precision that ONNX Runtime's CPU computes.

Tolerance in fp32: that of the undeferred graph's own test, twice over, since codes and scales are multiplied in another
order. In fp16 the product is rounded once to 11 bits, and the result once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PassResult, PostconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.passes.defer_scales import CODE_SCALE, DeferScalesPass
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantisedLayer, QuantiseLayersPass
from tests.export.passes.layer_model import (
    IN,
    LARGEST,
    OUT,
    ROWS,
    dequantised_operands,
    layers_model,
    operators,
    quantised_layer,
    random_array,
    run,
)

WEIGHT, BIAS, X = random_array(0, OUT, IN), random_array(1, OUT), random_array(2, ROWS, IN)
KINDS = ("int8", "fp8")


def scale_of(kind: str) -> float:
    return float(np.quantile(np.abs(X), 0.9)) / LARGEST[kind]


def deferred(proto: onnx.ModelProto, layers: dict[str, QuantisedLayer]) -> ir.Model:
    model = ir.from_proto(proto)
    QuantiseLayersPass(layers, IntegerInputs.SIGNED)(model)
    check_graph(graph_bytes(model), "quantised")
    assert DeferScalesPass()(model).modified
    check_graph(graph_bytes(model), "deferred")
    return model


def execute(model: ir.Model, x: NDArray[np.float32] = X) -> NDArray[np.float32]:
    LowerFloat8Pass()(model)
    return run(graph_bytes(model), x)["fc.y"]


def half_model(bias: NDArray[np.float32] | None) -> onnx.ModelProto:
    """``fc`` in fp16 between fp32 boundaries, its bias stored in fp32 and cast."""
    half = TensorProto.FLOAT16
    operands = ["x.half", "fc.weight", *([] if bias is None else ["fc.bias.half"])]
    nodes = [helper.make_node("Cast", ["x"], ["x.half"], to=half)]
    tensors = [numpy_helper.from_array(WEIGHT.astype(np.float16), "fc.weight")]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias, "fc.bias"))
        nodes.append(helper.make_node("Cast", ["fc.bias"], ["fc.bias.half"], to=half))
    nodes.append(helper.make_node("Gemm", operands, ["fc"], "fc", transB=1))
    nodes.append(helper.make_node("Cast", ["fc"], ["fc.y"], to=TensorProto.FLOAT))
    values = [helper.make_tensor_value_info(*value) for value in (("x", 1, ["rows", IN]), ("fc.y", 1, ["rows", OUT]))]
    graph = helper.make_graph(nodes, "half", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_gemm(kind: str, bias: NDArray[np.float32] | None) -> None:
    scale = scale_of(kind)
    received = execute(deferred(layers_model({"fc": (WEIGHT, bias)}), {"fc": quantised_layer(WEIGHT, scale, kind)}))
    a, w = dequantised_operands(X, WEIGHT, scale, kind)
    b = np.zeros(OUT) if bias is None else bias.astype(np.float64)
    assert (a @ w.T).std() > 1
    magnitude = np.abs(a) @ np.abs(w).T + np.abs(b)
    assert (np.abs(received - (a @ w.T + b)) <= 2 * (IN + 6) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_convolution(kind: str, bias: NDArray[np.float32] | None) -> None:
    weight, x = random_array(3, OUT, 4, 3, 3), random_array(4, 2, 4, 3, 3)
    scale = float(np.quantile(np.abs(x), 0.9)) / LARGEST[kind]
    proto = layers_model({"fc": (weight, bias)}, (2, 4, 3, 3))
    received = execute(deferred(proto, {"fc": quantised_layer(weight, scale, kind)}), x)
    a, w = dequantised_operands(x, weight, scale, kind)
    wanted = np.einsum("bcij,ocij->bo", a, w) + (0 if bias is None else bias)
    np.testing.assert_allclose(received[:, :, 0, 0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_half_precision_rounds_the_product_and_the_result(kind: str, bias: NDArray[np.float32] | None) -> None:
    """The bias is added as it is stored, not as the layer in fp16 would have it."""
    x = X.astype(np.float16).astype(np.float32)
    scale = scale_of(kind)
    model = deferred(half_model(bias), {"fc": quantised_layer(WEIGHT, scale, kind)})
    product = next(node for node in model.graph if node.op_type == "Gemm")
    assert product.outputs[0].dtype == ir.DataType.FLOAT16
    a, w = dequantised_operands(x, WEIGHT, scale, kind)
    b = np.zeros(OUT) if bias is None else bias.astype(np.float64)
    rounding = 2.0**-11 * (np.abs(a @ w.T) + np.abs(a @ w.T + b)) + (IN + 6) * 2.0**-23 * (np.abs(a) @ np.abs(w).T)
    assert (np.abs(execute(model, x) - (a @ w.T + b)) <= rounding).all()


def test_sums_of_the_largest_codes_fit_fp16() -> None:
    """14336 is the widest layer of the text encoder; without the factor its sum is 2.9e9."""
    assert np.finfo(np.float16).max > 448 * 448 * 14336 * CODE_SCALE**2
    assert float(np.float16(CODE_SCALE)) == CODE_SCALE
    for code in np.arange(256, dtype=np.uint8).view(ir.DataType.FLOAT8E4M3FN.numpy()):
        assert np.isnan(code) or float(np.float16(float(code) * CODE_SCALE)) == float(code) * CODE_SCALE


def test_what_it_leaves() -> None:
    layer = {"fc": quantised_layer(WEIGHT, 0.02, "int8")}
    model = deferred(layers_model({"fc": (WEIGHT, BIAS)}), layer)
    assert sorted(operators(model)) == sorted(
        ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm", "Mul", "Mul", "Add"]
    )
    assert [node.name for node in model.graph if node.op_type == "Gemm"] == ["fc"]
    assert model.graph.outputs[0].name == "fc.y"
    assert not DeferScalesPass()(model).modified


def test_layers_that_share_an_input_share_its_codes() -> None:
    names = ("fc", "other")
    layers = {name: quantised_layer(WEIGHT, 0.02, "fp8") for name in names}
    model = deferred(layers_model(dict.fromkeys(names, (WEIGHT, None))), layers)
    assert sorted(node.name for node in model.graph if node.op_type == "Gemm") == ["fc", "other"]


def test_a_graph_without_codes_is_left_alone() -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, BIAS)}))
    before = graph_bytes(model)
    assert not DeferScalesPass()(model).modified
    assert graph_bytes(model) == before


def test_unsigned_codes_are_left_alone() -> None:
    """A zero point cannot be deferred."""
    model = ir.from_proto(layers_model({"fc": (WEIGHT, BIAS)}))
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.UNSIGNED)(model)
    assert not DeferScalesPass()(model).modified


def test_the_postcondition() -> None:
    class DoesNothing(DeferScalesPass):
        def call(self, model: ir.Model) -> PassResult:
            return PassResult(model, modified=False)

    model = ir.from_proto(layers_model({"fc": (WEIGHT, BIAS)}))
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.SIGNED)(model)
    with pytest.raises(PostconditionError, match="fc still reads scaled codes"):
        DoesNothing()(model)


def test_an_activation_scale_that_is_computed_is_a_bug_that_is_named() -> None:
    model: Any = ir.from_proto(layers_model({"fc": (WEIGHT, BIAS)}))
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.SIGNED)(model)
    for value in model.graph.initializers.values():
        if value.shape is not None and len(value.shape) == 0 and value.dtype == ir.DataType.FLOAT:
            value.const_value = None
    with pytest.raises(AssertionError, match="fc: the activation's scale is not a constant"):
        DeferScalesPass()(model)
