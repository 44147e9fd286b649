"""8-bit layers in ONNX Runtime against the same arithmetic in float64: quantised operands, their product, the bias.

Tolerance, element by element: ``(K + 6) * 2**-24 * (|a| @ |w| + |bias|)`` for a sum of K products in fp32 in any order,
plus the rounding of each dequantised operand, of their scales' product and of the bias. It is about 1e-6 of the output;
one code's difference in one activation is 1e-2 of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import PostconditionError, PreconditionError, common

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import EightBit, lower
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.quantise_layers import (
    ActivationScales,
    IntegerInputs,
    QuantisedLayer,
    QuantiseLayersPass,
)
from reelforge.runtime.recipe import Backend, Target
from tests.export.passes.layer_model import (
    IN,
    LARGEST,
    OUT,
    ROWS,
    around_zero,
    dequantised_operands,
    layers_model,
    operators,
    quantised_layer,
    quantised_weight,
    random_array,
    run,
)

WEIGHT, BIAS, X = random_array(0, OUT, IN), random_array(1, OUT), random_array(2, ROWS, IN)
CPU = Target(Backend.CPU)
STORED = (np.float32, np.float16, ml_dtypes.bfloat16)


def activation_scale(x: NDArray[np.float32], kind: str) -> float:
    """A scale that the largest tenth of the values exceeds, so that saturation is compared too."""
    return float(np.quantile(np.abs(x), 0.9)) / LARGEST[kind]


def convolve(x: NDArray[np.float64], weight: NDArray[np.float64], pads: int) -> NDArray[np.float64]:
    """Return ``[batch, out, ...]`` of a convolution with stride 1 and ``pads`` on every side."""
    axes = tuple(range(2, x.ndim))
    padded = np.pad(x, [(0, 0), (0, 0), *[(pads, pads)] * len(axes)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=axes)
    kernel_axes = tuple(range(windows.ndim - len(axes), windows.ndim))
    result = np.tensordot(windows, weight, axes=((1, *kernel_axes), tuple(range(1, weight.ndim))))
    return np.asarray(np.moveaxis(result, -1, 1))


def product(x: NDArray[np.float64], weight: NDArray[np.float64], pads: int = 0) -> NDArray[np.float64]:
    return x @ weight.T if weight.ndim == 2 else convolve(x, weight, pads)


def require_equal(
    received: NDArray[np.float32],
    x: NDArray[np.float32],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    scale: float,
    kind: str,
    pads: int = 0,
) -> None:
    a, w = dequantised_operands(x, weight, scale, kind)
    b = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    b = b.reshape(-1, *[1] * (weight.ndim - 2))
    expected, magnitude = product(a, w, pads) + b, product(np.abs(a), np.abs(w), pads) + np.abs(b)
    assert received.shape == expected.shape
    assert 1 < expected.std() < 100  # a comparison of zeros would prove nothing
    terms = int(np.prod(weight.shape[1:]))
    assert (np.abs(received - expected) <= (terms + 6) * 2.0**-24 * magnitude).all()


def quantised(
    proto: onnx.ModelProto, layers: dict[str, QuantisedLayer], inputs: IntegerInputs = IntegerInputs.UNSIGNED
) -> ir.Model:
    """Return the model after the pass, checked; FP8 activations as the casts that ONNX Runtime needs."""
    model = ir.from_proto(proto)
    assert QuantiseLayersPass(layers, inputs)(model).modified == bool(layers)
    check_graph(graph_bytes(model), "quantised")
    LowerFloat8Pass()(model)
    check_graph(graph_bytes(model), "lowered")
    return model


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("int8", IntegerInputs.SIGNED), ("int8", IntegerInputs.UNSIGNED), ("fp8", IntegerInputs.UNSIGNED)],
)
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("stored", STORED)
def test_gemm(kind: str, inputs: IntegerInputs, bias: NDArray[np.float32] | None, stored: Any) -> None:
    weight = WEIGHT.astype(stored)
    bias = None if bias is None else bias.astype(stored)
    scale = activation_scale(X, kind)
    layers = {"fc": quantised_layer(weight, scale, kind)}
    model = quantised(layers_model({"fc": (weight, bias)}), layers, inputs)
    assert list(model.graph.initializers["fc.weight"].shape or ()) == [OUT, IN]
    require_equal(run(graph_bytes(model), X)["fc.y"], X, weight, bias, scale, kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize(("kernel", "pads"), [((3,), 0), ((3, 3), 1), ((1, 3, 3), 0), ((1, 1, 1), 0)])
def test_conv(kind: str, bias: NDArray[np.float32] | None, kernel: tuple[int, ...], pads: int) -> None:
    weight = random_array(3, OUT, IN, *kernel).astype(ml_dtypes.bfloat16)
    x = random_array(4, 2, IN, *[5] * len(kernel))
    scale = activation_scale(x, kind)
    attributes = {"kernel_shape": kernel, "pads": [pads] * 2 * len(kernel)}
    proto = layers_model(
        {"conv": (weight, bias)}, ("n", IN, *[f"size{axis}" for axis in range(len(kernel))]), attributes=attributes
    )
    model = quantised(proto, {"conv": quantised_layer(weight, scale, kind)})
    require_equal(run(graph_bytes(model), x)["conv.y"], x, weight, bias, scale, kind, pads)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_float_weight_is_replaced(kind: str) -> None:
    proto = layers_model({"fc": (WEIGHT.astype(np.float16), BIAS), "other": (WEIGHT, None)})
    model = quantised(proto, {"fc": quantised_layer(WEIGHT, 0.01, kind)})
    weight, scale = model.graph.initializers["fc.weight"], model.graph.initializers["fc.weight.scale"]
    codes, scales = quantised_weight(WEIGHT, kind)
    assert weight.const_value is not None
    assert scale.const_value is not None
    assert weight.const_value.numpy().tobytes() == codes.tobytes()
    assert weight.dtype == {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}[kind]
    np.testing.assert_array_equal(scale.const_value.numpy(), scales)
    (dequantised,) = (node for node in model.graph if node.inputs and node.inputs[0] is weight)
    assert dequantised.attributes["axis"].as_int() == 0  # ONNX Runtime would take any axis for a QGemm
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert not [node for node in casts if node.inputs[0] is not None and node.inputs[0].is_initializer()]
    assert model.graph.initializers["other.weight"].dtype == ir.DataType.FLOAT
    assert [value.name for value in model.graph.outputs] == ["fc.y", "other.y"]
    assert "fc" in {node.name for node in model.graph if node.op_type == "Gemm"}


def test_a_weight_without_a_value_becomes_its_codes() -> None:
    """So does the compiler assemble a stage: the float weight is in no file of the bundle."""
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    model.graph.initializers["fc.weight"].const_value = None
    QuantiseLayersPass({"fc": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.SIGNED)(model)
    require_equal(run(graph_bytes(model), X)["fc.y"], X, WEIGHT, None, 0.02, "int8")


@pytest.mark.parametrize("bias", [None, BIAS])
def test_int8_products_are_computed_in_8_bits(tmp_path: Path, bias: NDArray[np.float32] | None) -> None:
    """After the target's whole list of passes no float product is left."""
    model = ir.from_proto(layers_model({"fc": (WEIGHT, bias)}))
    lower(model, CPU, EightBit({"fc": quantised_layer(WEIGHT, 0.02, "int8")}))
    file = tmp_path / "optimised.onnx"
    y = run(graph_bytes(model), X, file)["fc.y"]
    optimised = operators(onnx.load(file))
    assert optimised == ["QuantizeLinear", "MatMulIntegerToFloat"]
    require_equal(y, X, WEIGHT, bias, 0.02, "int8")


@pytest.mark.parametrize("bias", [None, BIAS])
def test_fp8_products_stay_float_and_load(tmp_path: Path, bias: NDArray[np.float32] | None) -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, bias)}))
    lower(model, CPU, EightBit({"fc": quantised_layer(WEIGHT, 0.01, "fp8")}))
    file = tmp_path / "optimised.onnx"
    y = run(graph_bytes(model), X, file)["fc.y"]
    optimised = operators(onnx.load(file))
    assert "QGemm" not in optimised
    assert optimised.count("Gemm") == 1
    require_equal(y, X, WEIGHT, bias, 0.01, "fp8")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_with_one_input_and_scale_share_its_quantisation(kind: str) -> None:
    weights = {name: random_array(seed, OUT, IN) for seed, name in enumerate("qkv")}
    scales = {"q": 0.02, "k": 0.02, "v": 0.03}
    model = ir.from_proto(layers_model({name: (weight, BIAS) for name, weight in weights.items()}))
    layers = {name: quantised_layer(weights[name], scales[name], kind) for name in weights}
    QuantiseLayersPass(layers, IntegerInputs.UNSIGNED)(model)
    assert operators(model).count("QuantizeLinear") == 3
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    check_graph(graph_bytes(model), "shared")
    assert operators(model).count("QuantizeLinear") == 2
    assert operators(model).count("DequantizeLinear") == 2 + 3
    results = run(graph_bytes(model), X)
    for name, weight in weights.items():
        require_equal(results[f"{name}.y"], X, weight, BIAS, scales[name], kind)


def test_formats_may_be_mixed_in_one_graph() -> None:
    other = random_array(5, OUT, IN)
    proto = layers_model({"a": (WEIGHT, None), "b": (other, None), "c": (WEIGHT, BIAS)})
    model = quantised(proto, {"a": quantised_layer(WEIGHT, 0.02, "int8"), "b": quantised_layer(other, 0.01, "fp8")})
    results = run(graph_bytes(model), X)
    require_equal(results["a.y"], X, WEIGHT, None, 0.02, "int8")
    require_equal(results["b.y"], X, other, None, 0.01, "fp8")
    np.testing.assert_allclose(results["c.y"], X.astype(np.float64) @ WEIGHT.T + BIAS, rtol=0, atol=2e-5)


def test_no_layers_change_nothing() -> None:
    proto = layers_model({"fc": (WEIGHT, BIAS)})
    before = graph_bytes(ir.from_proto(proto))
    assert graph_bytes(quantised(proto, {})) == before


def test_layers_that_are_not_in_the_graph() -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    layer = quantised_layer(WEIGHT, 0.02, "int8")
    with pytest.raises(PreconditionError, match=r"layers has no layers gone\.fc1, gone\.fc2"):
        QuantiseLayersPass({"gone.fc2": layer, "fc": layer, "gone.fc1": layer}, IntegerInputs.SIGNED)(model)
    assert operators(model) == ["Gemm"]


def test_a_weight_that_two_layers_share_is_refused() -> None:
    model = ir.from_proto(layers_model({"a": (WEIGHT, None), "b": (WEIGHT, None)}, weights={"b": "a"}))
    with pytest.raises(PreconditionError, match="has no layers a"):
        QuantiseLayersPass({"a": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.SIGNED)(model)


def test_codes_of_another_type_are_a_defect() -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    codes = QuantisedLayer(ir.tensor(WEIGHT), ir.tensor(np.ones(OUT, np.float32)), around_zero(0.02))
    with pytest.raises(AssertionError, match="codes of type FLOAT"):
        QuantiseLayersPass({"fc": codes}, IntegerInputs.SIGNED)(model)


def test_a_missing_range_is_a_defect_where_it_is_needed() -> None:
    layer = replace(quantised_layer(WEIGHT, 0.02, "int8"), activation=ActivationScales(0.02))
    signed = quantised(layers_model({"fc": (WEIGHT, None)}), {"fc": layer}, IntegerInputs.SIGNED)
    require_equal(run(graph_bytes(signed), X)["fc.y"], X, WEIGHT, None, 0.02, "int8")
    with pytest.raises(AssertionError, match="fc: an INT8 layer without the range of its input"):
        quantised(layers_model({"fc": (WEIGHT, None)}), {"fc": layer})


def test_unsigned_codes_span_the_range(tmp_path: Path) -> None:
    """Behind a GELU: each code is used, values beyond the range saturate, and the product is of integers."""
    x = np.maximum(random_array(8, 64, IN), -0.17).astype(np.float32)
    x[0, :2] = (-5, 50)
    lowest, highest = -0.17, 3.0
    weight = random_array(9, OUT, IN)
    activation = ActivationScales(3.0 / 127, (lowest, highest))
    layer = replace(quantised_layer(weight, 1.0, "int8"), activation=activation)
    model = ir.from_proto(layers_model({"fc": (weight, BIAS)}))
    lower(model, CPU, EightBit({"fc": layer}))
    file = tmp_path / "optimised.onnx"
    received = run(graph_bytes(model), x, file)["fc.y"]
    assert operators(onnx.load(file)).count("MatMulIntegerToFloat") == 1
    step = np.float32((highest - lowest) / 255)
    codes = np.clip(np.rint(x / step) + 14, 0, 255)  # 0.17 / step = 13.7
    assert (codes.min(), codes.max()) == (0, 255)
    stored, scales = quantised_weight(weight, "int8")
    operands = (codes - 14) * np.float64(step), stored * scales.astype(np.float64)[:, None]
    expected = operands[0] @ operands[1].T + BIAS
    magnitude = np.abs(operands[0]) @ np.abs(operands[1]).T + np.abs(BIAS)
    assert (np.abs(received - expected) <= 8 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("readers", [1, 3])
def test_products_that_share_their_input_are_computed_in_8_bits(tmp_path: Path, readers: int) -> None:
    """One QuantizeLinear for all: ONNX Runtime has no fast product for int8 codes that several read."""
    weights = {f"l{index}": random_array(index, OUT, IN) for index in range(readers)}
    model = ir.from_proto(layers_model({name: (weight, BIAS) for name, weight in weights.items()}))
    lower(model, CPU, EightBit({name: quantised_layer(weight, 0.02, "int8") for name, weight in weights.items()}))
    file = tmp_path / "optimised.onnx"
    results = run(graph_bytes(model), X, file)
    optimised = onnx.load(file)
    assert operators(optimised).count("QuantizeLinear") == 1
    assert operators(optimised).count("MatMulIntegerToFloat") == readers
    assert not {"Gemm", "MatMul", "DequantizeLinear"} & set(operators(optimised))
    for name, weight in weights.items():
        require_equal(results[f"{name}.y"], X, weight, BIAS, 0.02, "int8")


def test_the_postcondition() -> None:
    untouched = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    with pytest.raises(PostconditionError, match="fc has an operand in high precision"):
        QuantiseLayersPass({"fc": quantised_layer(WEIGHT, 0.02, "int8")}, IntegerInputs.SIGNED).ensures(untouched)
