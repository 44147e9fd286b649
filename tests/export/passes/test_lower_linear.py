"""Linear layers as one Gemm: equal results, weights read as they are stored, and reasons where it does not apply."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError, common

from reelforge.export.passes.lower_linear import LowerLinearPass

IN, OUT = 5, 3
RANDOM = np.random.default_rng(0)
WEIGHT, BIAS = RANDOM.standard_normal((OUT, IN)).astype(np.float32), RANDOM.standard_normal(OUT).astype(np.float32)
TRANSPOSE = helper.make_node("Transpose", ["fc.weight"], ["wt"], perm=[1, 0])
PRODUCT = helper.make_node("MatMul", ["x", "wt"], ["xw"], name="fc.MatMul")


def model(
    nodes: list[onnx.NodeProto],
    outputs: dict[str, list[int | str]],
    initializers: dict[str, np.ndarray] | None = None,
    x: tuple[int | str, ...] = ("batch", "tokens", IN),
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    stored = {"fc.weight": WEIGHT, "fc.bias": BIAS} if initializers is None else initializers
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(proto)


def lower(proto: onnx.ModelProto) -> tuple[ir.Model, LowerLinearPass]:
    """Return the model after the pass, and with what it leaves unused removed."""
    result, graph_pass = ir.from_proto(proto), LowerLinearPass()
    graph_pass(result)
    common.RemoveUnusedNodesPass()(result)
    return result, graph_pass


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": x})
    return results


def require_equal(proto: onnx.ModelProto, lowered: ir.Model, x: np.ndarray, atol: float = 2e-6) -> None:
    for before, after in zip(run(proto, x), run(ir.to_proto(lowered), x), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=0, atol=atol)


def kinds(lowered: ir.Model) -> list[str]:
    return [node.op_type for node in lowered.graph]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(2, 5),
    sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    bias=st.sampled_from(["none", "right", "left"]),
    known=st.booleans(),
)
def test_equal_results_for_any_rank(rank: int, sizes: list[int], bias: str, known: bool) -> None:
    leading: list[int | str] = [*sizes[: rank - 2], f"d{rank}"] if known else [f"d{i}" for i in range(rank - 1)]
    nodes = [TRANSPOSE, PRODUCT]
    if bias != "none":
        operands = ["xw", "fc.bias"] if bias == "right" else ["fc.bias", "xw"]
        nodes.append(helper.make_node("Add", operands, ["y"], name="fc.Add"))
    proto = model(nodes, {nodes[-1].output[0]: [*leading, OUT]}, x=(*leading, IN))
    lowered, graph_pass = lower(proto)
    assert kinds(lowered).count("Gemm") == 1
    assert not {"MatMul", "Transpose", "Add"} & set(kinds(lowered))
    assert graph_pass.refused == {}
    shape = (*sizes[: rank - 2], 3, IN) if known else (*sizes[: rank - 1], IN)
    require_equal(proto, lowered, RANDOM.standard_normal(shape).astype(np.float32))


def test_the_product_is_named_after_its_layer_and_reads_the_weight_as_stored() -> None:
    add = helper.make_node("Add", ["xw", "fc.bias"], ["y"])
    lowered, _ = lower(model([TRANSPOSE, PRODUCT, add], {"y": ["batch", "tokens", OUT]}))
    (gemm,) = (node for node in lowered.graph if node.op_type == "Gemm")
    assert gemm.name == "fc"
    assert [value.name for value in gemm.inputs[1:]] == ["fc.weight", "fc.bias"]
    assert gemm.attributes["transB"].as_int() == 1
    assert [value.name for value in lowered.graph.outputs] == ["y"]


def test_products_that_are_graph_outputs_keep_their_names() -> None:
    add = helper.make_node("Add", ["xw", "fc.bias"], ["y"])
    proto = model([TRANSPOSE, PRODUCT, add], {"xw": ["batch", "tokens", OUT], "y": ["batch", "tokens", OUT]})
    lowered, _ = lower(proto)
    assert [value.name for value in lowered.graph.outputs] == ["xw", "y"]
    assert {"Gemm", "Add"} <= set(kinds(lowered))  # the product leaves before its bias, so it stays apart
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


def test_a_product_that_is_used_twice_keeps_its_bias_apart() -> None:
    nodes = [
        TRANSPOSE,
        PRODUCT,
        helper.make_node("Add", ["xw", "fc.bias"], ["a"]),
        helper.make_node("Mul", ["xw", "a"], ["y"]),
    ]
    proto = model(nodes, {"y": ["batch", "tokens", OUT]})
    lowered, _ = lower(proto)
    assert kinds(lowered).count("Add") == 1
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


@pytest.mark.parametrize("shape", [(4, OUT), (2, 4, OUT), (4, 1), (1,), ()])
def test_only_a_vector_of_the_layer_s_width_is_its_bias(shape: tuple[int, ...]) -> None:
    """Rows are flattened for the product, so that anything with a row axis (positions) would no longer fit."""
    stored = {"fc.weight": WEIGHT, "table": RANDOM.standard_normal(shape).astype(np.float32)}
    proto = model(
        [TRANSPOSE, PRODUCT, helper.make_node("Add", ["xw", "table"], ["y"])], {"y": [2, 4, OUT]}, stored, x=(2, 4, IN)
    )
    lowered, _ = lower(proto)
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


def test_a_residual_is_no_bias() -> None:
    square = RANDOM.standard_normal((IN, IN)).astype(np.float32)
    proto = model(
        [TRANSPOSE, PRODUCT, helper.make_node("Add", ["x", "xw"], ["y"])],
        {"y": ["batch", "tokens", IN]},
        {"fc.weight": square},
    )
    lowered, _ = lower(proto)
    assert kinds(lowered).count("Add") == 1
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


def test_a_weight_that_serves_two_layers() -> None:
    again = helper.make_node("MatMul", ["z", "wt"], ["zw"], name="again.MatMul")
    nodes = [TRANSPOSE, PRODUCT, helper.make_node("Sin", ["x"], ["z"]), again]
    outputs: dict[str, list[int | str]] = {"xw": ["batch", "tokens", OUT], "zw": ["batch", "tokens", OUT]}
    proto = model(nodes, outputs)
    lowered, _ = lower(proto)
    assert kinds(lowered).count("Gemm") == 2
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_weights_stored_in_another_type(stored: type) -> None:
    """The cast stands between the stored weight and its use; the transpose disappears all the same."""
    nodes = [
        helper.make_node("Cast", ["fc.weight"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["fc.bias"], ["b32"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["w32"], ["wt"], perm=[1, 0]),
        PRODUCT,
        helper.make_node("Add", ["xw", "b32"], ["y"]),
    ]
    weights = {"fc.weight": WEIGHT.astype(stored), "fc.bias": BIAS.astype(stored)}
    proto = model(nodes, {"y": ["batch", "tokens", OUT]}, weights)
    lowered, _ = lower(proto)
    assert sorted(kinds(lowered)) == sorted(["Cast", "Cast", "Reshape", "Gemm", "Shape", "Concat", "Reshape"])
    assert next(node.name for node in lowered.graph if node.op_type == "Gemm") == "fc"
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


def test_refusals_carry_their_reason() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "plain"], ["a"], name="plain.MatMul"),
        helper.make_node("Transpose", ["a"], ["at"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "at"], ["y"], name="scores.MatMul"),
    ]
    proto = model(nodes, {"y": ["batch", "tokens", "tokens"]}, {"plain": np.ascontiguousarray(WEIGHT.T)})
    lowered, graph_pass = lower(proto)
    assert graph_pass.refused == {
        "plain.MatMul": "the second operand is not a transposed tensor",
        "scores.MatMul": "the second operand is computed, not a stored weight",
    }
    assert kinds(lowered) == ["MatMul", "Transpose", "MatMul"]
    require_equal(proto, lowered, RANDOM.standard_normal((2, 4, IN)).astype(np.float32))


def test_the_postcondition() -> None:
    untouched = ir.from_proto(model([TRANSPOSE, PRODUCT], {"xw": ["batch", "tokens", OUT]}))
    with pytest.raises(PostconditionError, match=r"fc\.MatMul still multiplies by a transposed weight"):
        LowerLinearPass().ensures(untouched)


def test_layers_that_come_as_gemm_are_named_too() -> None:
    """The exporter writes two-dimensional layers as Gemm; receipts and profiles look layers up by name."""
    nodes = [
        helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], name="Block.fc.Gemm", transB=1),
        helper.make_node("Neg", ["y"], ["out"]),
    ]
    proto = model(nodes, {"out": ["tokens", OUT]}, x=("tokens", IN))
    lowered, _ = lower(proto)
    assert [node.name for node in lowered.graph if node.op_type == "Gemm"] == ["fc"]
    require_equal(proto, lowered, RANDOM.standard_normal((4, IN)).astype(np.float32))
