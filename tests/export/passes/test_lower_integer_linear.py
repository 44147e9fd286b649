"""LowerIntegerLinearPass: integer products against the same codes in float64, what they take along, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import EightBit, lower
from reelforge.export.passes.lower_integer_linear import LowerIntegerLinearPass
from reelforge.export.passes.lower_linear import LowerLinearPass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantiseLayersPass
from reelforge.runtime.recipe import Backend, Target
from tests.export.passes.layer_model import (
    IN,
    OUT,
    dequantised_operands,
    layers_model,
    operators,
    quantised_layer,
    random_array,
    run,
)

WEIGHT, BIAS = random_array(0, OUT, IN), random_array(1, OUT)
SCALE = 0.02
CPU = Target(Backend.CPU)


def linear_model(shape: tuple[int | str, ...], *names: str, bias: bool = True) -> ir.Model:
    """Layers that read ``x`` of any rank, as they are captured: a product with a transposed weight, and its bias."""
    nodes, tensors, outputs = [], [], []
    for name in names:
        tensors += [numpy_helper.from_array(WEIGHT, f"{name}.weight"), numpy_helper.from_array(BIAS, f"{name}.bias")]
        product = f"{name}.product" if bias else f"{name}.y"
        nodes += [
            helper.make_node("Transpose", [f"{name}.weight"], [f"{name}.t"], f"{name}.t", perm=[1, 0]),
            helper.make_node("MatMul", ["x", f"{name}.t"], [product], f"{name}.MatMul"),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, f"{name}.bias"], [f"{name}.y"], f"{name}.Add"))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [*shape[:-1], OUT]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "linear", [x], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def eight_bit(*names: str, kind: str = "int8") -> EightBit:
    return EightBit({name: quantised_layer(WEIGHT, SCALE, kind) for name in names})


def expected(x: NDArray[np.float32], bias: bool) -> NDArray[np.float64]:
    """From the codes on in float64."""
    a, w = dequantised_operands(x.reshape(-1, IN), WEIGHT, SCALE, "int8")
    return (a @ w.T + (BIAS.astype(np.float64) if bias else 0.0)).reshape(*x.shape[:-1], OUT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (("rows", IN), (5, IN)),
        ((1, "tokens", IN), (1, 9, IN)),
        (("batch", "tokens", IN), (2, 3, IN)),
        ((2, "tokens", 3, IN), (2, 4, 3, IN)),
    ],
)
def test_computes_the_layer(shape: tuple[int | str, ...], size: tuple[int, ...], bias: bool) -> None:
    """Sums of 24 products of codes are exact; the scales' product, the scaling and the bias round in fp32."""
    model = lower(linear_model(shape, "fc", bias=bias), CPU, eight_bit("fc"))
    assert operators(model).count("MatMulIntegerToFloat") == 1
    check_graph(graph_bytes(model), "linear.onnx")
    x = random_array(3, *size)
    received, exact = run(graph_bytes(model), x)["fc.y"], expected(x, bias)
    np.testing.assert_allclose(received, exact, rtol=4 * 2.0**-24, atol=4 * 2.0**-24 * np.abs(exact).max())


def test_layers_of_one_input_share_its_codes_and_nothing_is_reshaped(tmp_path: Path) -> None:
    """As ONNX Runtime executes it: the transposed weights are constants, and there is one product per layer."""
    model = lower(linear_model((1, "tokens", IN), "q", "k", "v"), CPU, eight_bit("q", "k", "v"))
    x = random_array(4, 1, 6, IN)
    for y in run(graph_bytes(model), x, tmp_path / "optimised.onnx").values():
        np.testing.assert_allclose(y, expected(x, True), rtol=1e-6, atol=1e-5)
    optimised = operators(onnx.load(tmp_path / "optimised.onnx"))
    assert sorted(optimised) == ["MatMulIntegerToFloat"] * 3 + ["QuantizeLinear"]


def test_keeps_the_layer_s_name() -> None:
    """Profiles and receipts show layers by it."""
    model = lower(linear_model((1, "tokens", IN), "fc"), CPU, eight_bit("fc"))
    assert [node.name for node in model.graph if node.op_type == "MatMulIntegerToFloat"] == ["fc"]


def test_a_bias_with_rows_of_its_own_is_added_outside() -> None:
    table = random_array(5, 4, OUT)
    model = linear_model((4, IN), "fc", bias=False)
    (product,) = model.graph.outputs
    product.name = "plain"
    stored = ir.Value(name="table", const_value=ir.tensor(table), shape=ir.Shape(table.shape))
    stored.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(stored)
    add = ir.node("Add", [product, stored], name="table.Add")
    model.graph.append(add)
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = "fc.y", product.type, product.shape
    model.graph.outputs[0] = add.outputs[0]
    lower(model, CPU, eight_bit("fc"))
    x = random_array(6, 4, IN)
    np.testing.assert_allclose(run(graph_bytes(model), x)["fc.y"], expected(x, False) + table, rtol=1e-6, atol=1e-5)
    assert "Add" in operators(model)


@pytest.mark.parametrize(
    ("kind", "inputs", "reason"),
    [
        (None, IntegerInputs.UNSIGNED, "an operand is in high precision"),
        ("fp8", IntegerInputs.UNSIGNED, "the bias is inside of the product"),
        ("int8", IntegerInputs.SIGNED, "the bias is inside of the product"),
    ],
)
def test_leaves_alone_what_has_no_fast_product(kind: str | None, inputs: IntegerInputs, reason: str) -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, BIAS)}))
    LowerLinearPass()(model)
    if kind is not None:
        QuantiseLayersPass({"fc": quantised_layer(WEIGHT, SCALE, kind)}, inputs)(model)
    before = operators(model)
    step = LowerIntegerLinearPass()
    assert not step(model).modified
    assert operators(model) == before
    assert step.refused == {"fc": reason}


@pytest.mark.parametrize(
    ("kind", "reason"), [("fp8", "the weight is not stored in int8"), ("int8", "not quantised to uint8")]
)
def test_other_codes(kind: str, reason: str) -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    LowerLinearPass()(model)
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, SCALE, kind)}, IntegerInputs.SIGNED)(model)
    step = LowerIntegerLinearPass()
    step(model)
    assert reason in step.refused["fc"]


def quantised_gemm(dtype: str = "float32", axis: int | None = 0) -> ir.Model:
    """A square layer as :class:`QuantiseLayersPass` leaves it: the type of what is dequantised, the weight's axis."""
    node, kind = helper.make_node, getattr(TensorProto, {"float32": "FLOAT", "float16": "FLOAT16"}[dtype])
    output: dict[str, Any] = {} if dtype == "float32" else {"output_dtype": kind}
    weight = output if axis is None else {**output, "axis": axis}
    tensors = {
        "scale": np.float32(SCALE),
        "zero": np.uint8(128),
        "codes": np.arange(IN * IN, dtype=np.int8).reshape(IN, IN),
        "scales": np.linspace(0.01, 0.5, IN, dtype=np.float32),
    }
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["c"], "q"),
        node("DequantizeLinear", ["c", "scale", "zero"], ["d"], "d", **output),
        node("DequantizeLinear", ["codes", "scales"], ["w"], "w", **weight),
        node("Gemm", ["d", "w"], ["fc.y"], "fc", transB=1),
    ]
    info = helper.make_tensor_value_info
    x, y = info("x", TensorProto.FLOAT, ["rows", IN]), info("fc.y", kind, ["rows", IN])
    stored = [numpy_helper.from_array(np.asarray(values), name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "quantised", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (quantised_gemm("float16"), "it is not computed in fp32"),
        (quantised_gemm(axis=1), "the weight has no scale per output channel"),
        (quantised_gemm(axis=None), "the weight has no scale per output channel"),
    ],
)
def test_numbers_that_the_product_would_not_have(model: ir.Model, reason: str) -> None:
    """It makes fp32, and takes one scale for each of the weight's rows: of a square one a scale per column fits too."""
    before = operators(model)
    step = LowerIntegerLinearPass()
    assert not step(model).modified
    assert operators(model) == before
    assert step.refused == {"fc": reason}


def test_a_square_weight_with_scales_per_row() -> None:
    model = quantised_gemm()
    x = random_array(8, 3, IN)
    wanted = run(graph_bytes(model), x)["fc.y"]
    assert LowerIntegerLinearPass({"fc"})(model).modified
    np.testing.assert_allclose(run(graph_bytes(model), x)["fc.y"], wanted, rtol=1e-6, atol=1e-5)


def test_a_layer_that_should_be_in_integers_and_is_not_fails_the_build() -> None:
    """It would have the right numbers, and be slower than in fp32, without a word."""
    with pytest.raises(PostconditionError, match="fc is still a product of dequantised codes: it is not computed in"):
        LowerIntegerLinearPass({"fc"})(quantised_gemm("float16"))
    LowerIntegerLinearPass({"other"})(quantised_gemm("float16"))


def test_a_product_that_is_left_is_noticed() -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    LowerLinearPass()(model)
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, SCALE, "int8")}, IntegerInputs.UNSIGNED)(model)
    with pytest.raises(PostconditionError, match="fc is still a product of dequantised codes"):
        LowerIntegerLinearPass().ensures(model)
