"""FP8 activations as casts: the numbers of the Q/DQ pairs, in graphs that ONNX Runtime takes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import EightBit, lower
from reelforge.export.passes.lower_float8 import LowerFloat8Pass
from reelforge.export.passes.quantise_layers import IntegerInputs, QuantiseLayersPass
from reelforge.runtime.recipe import Backend, Target
from tests.export.passes.layer_model import (
    IN,
    OUT,
    ROWS,
    layers_model,
    operators,
    quantised_layer,
    random_array,
    run,
)

WEIGHT, BIAS, X = random_array(0, OUT, IN), random_array(1, OUT), random_array(2, ROWS, IN)


def model_of(kinds: dict[str, str], biased: tuple[str, ...] = ()) -> ir.Model:
    """A graph of 8-bit layers: name -> format."""
    layers = {name: (WEIGHT, BIAS if name in biased else None) for name in kinds}
    model = ir.from_proto(layers_model(layers))
    quantised = {name: quantised_layer(WEIGHT, 0.01, kind) for name, kind in kinds.items()}
    QuantiseLayersPass(quantised, IntegerInputs.SIGNED)(model)
    return model


def pair_model(kind: int, scale: float, *, output: str = "y") -> ir.Model:
    """A graph of one Q/DQ pair and, unless the pair itself is the output, a node behind it."""
    zero = helper.make_tensor("zero", kind, [], [0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], "a.QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["numbers"], "a.DequantizeLinear"),
        helper.make_node("Identity", ["numbers"], ["y"], "leave"),
    ]
    graph = helper.make_graph(
        nodes if output == "y" else nodes[:2],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float32(scale), "scale"), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.7])
@pytest.mark.parametrize("output", ["y", "numbers"])
def test_the_numbers_are_those_of_fp8(scale: float, output: str) -> None:
    """Bit for bit those of ml_dtypes: every code, ties, subnormals, saturation on both sides, either zero."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    between = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate([codes, between, np.nextafter(between, np.float32(np.inf)), [449, 463, 465, 1e9, -1e9, 1e-9]])
    x = (x * np.float32(scale)).astype(np.float32)
    model = pair_model(TensorProto.FLOAT8E4M3FN, scale, output=output)
    LowerFloat8Pass()(model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(model))
    check_graph(graph_bytes(model), "lowered")
    quotient = np.clip(x / np.float32(scale), -448, 448)
    expected = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(run(graph_bytes(model), x)[output], expected)


def test_int8_pairs_and_weights_are_left_alone() -> None:
    model = model_of({"a": "fp8", "b": "int8"}, biased=("b",))
    assert LowerFloat8Pass()(model).modified
    assert operators(model).count("QuantizeLinear") == 1  # of b
    assert operators(model).count("DequantizeLinear") == 3  # of b's input and of both weights
    int8 = pair_model(TensorProto.INT8, 0.1)
    before = graph_bytes(int8)
    assert not LowerFloat8Pass()(int8).modified
    assert graph_bytes(int8) == before


def test_lowering_twice_changes_nothing() -> None:
    model = model_of({"a": "fp8", "b": "int8"})
    LowerFloat8Pass()(model)
    once = graph_bytes(model)
    assert not LowerFloat8Pass()(model).modified
    assert graph_bytes(model) == once


def test_layers_with_one_input_still_share_its_casts() -> None:
    """After the target's whole list of passes."""
    names = ("q", "k", "v")
    model = ir.from_proto(layers_model(dict.fromkeys(names, (WEIGHT, None))))
    lower(model, Target(Backend.CPU), EightBit({name: quantised_layer(WEIGHT, 0.01, "fp8") for name in names}))
    assert operators(model).count("Div") == 1
    assert operators(model).count("Cast") == 2
    results = run(graph_bytes(model), X)
    np.testing.assert_array_equal(results["q.y"], results["v.y"])


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match=r"a\.DequantizeLinear.* would be fused to an integer operator"):
        LowerFloat8Pass().ensures(model_of({"a": "fp8"}))
