"""FP8 products that ONNX Runtime would fuse and then refuse: they get a bias of zeros, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PostconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.passes.guard_float8 import GuardFloat8Pass
from reelforge.export.passes.quantise_layers import QuantiseLayersPass
from tests.export.passes.layer_model import IN, OUT, ROWS, layers_model, quantised_layer, random_array, run

WEIGHT, BIAS, X = random_array(0, OUT, IN), random_array(1, OUT), random_array(2, ROWS, IN)


def model_of(kinds: dict[str, str], biased: tuple[str, ...] = ()) -> ir.Model:
    """A graph of 8-bit layers: name -> format."""
    layers = {name: (WEIGHT, BIAS if name in biased else None) for name in kinds}
    model = ir.from_proto(layers_model(layers))
    QuantiseLayersPass({name: quantised_layer(WEIGHT, 0.01, kind) for name, kind in kinds.items()})(model)
    return model


def operand_counts(model: ir.Model) -> dict[str, int]:
    return {str(node.name): len(node.inputs) for node in model.graph if node.op_type == "Gemm"}


def test_only_fp8_products_without_bias_are_guarded() -> None:
    model = model_of({"a": "fp8", "b": "int8", "c": "fp8", "d": "int8", "e": "fp8"}, biased=("c", "d"))
    assert operand_counts(model) == {"a": 2, "b": 2, "c": 3, "d": 2, "e": 2}
    assert GuardFloat8Pass()(model).modified
    assert operand_counts(model) == {"a": 3, "b": 2, "c": 3, "d": 2, "e": 3}
    check_graph(graph_bytes(model), "guarded")
    guarded = [node.inputs[2] for node in model.graph if node.name in ("a", "e")]
    assert guarded[0] is guarded[1]  # layers of one width share the zeros
    assert guarded[0] is not None
    assert guarded[0].const_value is not None
    np.testing.assert_array_equal(guarded[0].const_value.numpy(), np.zeros(OUT, np.float32))
    assert [value.name for value in model.graph.outputs] == [f"{name}.y" for name in "abcde"]


def test_the_result_stays_the_same() -> None:
    """Bit for bit that of a layer whose own bias is zeros; and a float layer beside it is left alone."""
    model = model_of({"a": "fp8"})
    GuardFloat8Pass()(model)
    own = ir.from_proto(layers_model({"a": (WEIGHT, np.zeros(OUT, np.float32))}))
    QuantiseLayersPass({"a": quantised_layer(WEIGHT, 0.01, "fp8")})(own)
    received, expected = (run(graph_bytes(each), X)["a.y"] for each in (model, own))
    assert np.abs(expected).max() > 1
    np.testing.assert_array_equal(received, expected)


def test_guarding_twice_changes_nothing() -> None:
    model = model_of({"a": "fp8", "b": "int8"})
    GuardFloat8Pass()(model)
    once = graph_bytes(model)
    assert not GuardFloat8Pass()(model).modified
    assert graph_bytes(model) == once


def test_float_graphs_are_left_alone() -> None:
    model = ir.from_proto(layers_model({"fc": (WEIGHT, None)}))
    before = graph_bytes(model)
    assert not GuardFloat8Pass()(model).modified
    assert graph_bytes(model) == before


def test_a_weight_without_shape_is_a_defect() -> None:
    model = model_of({"a": "fp8"})
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    with pytest.raises(AssertionError, match="a: a dequantised weight has no shape"):
        GuardFloat8Pass()(model)


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match="a would be fused to QGemm"):
        GuardFloat8Pass().ensures(model_of({"a": "fp8"}))
