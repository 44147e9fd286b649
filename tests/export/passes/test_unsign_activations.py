"""UnsignActivationsPass: the same numbers from uint8 activations, and integer kernels that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.unsign_activations import UnsignActivationsPass

SCALE = np.float32(0.02)


def two_products_of_one_activation() -> onnx.ModelProto:
    """``y = x8 @ a8.T`` and ``z = x8 @ b8.T``, int8 throughout, with scales per output channel."""
    random = np.random.default_rng(3)
    arrays = {"s": SCALE, "zero": np.zeros((), np.int8), "zeros": np.zeros(24, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["d"]),
    ]
    for name, output in (("a", "y"), ("b", "z")):
        arrays[name] = random.integers(-127, 128, (24, 32)).astype(np.int8)
        arrays[f"{name}.scale"] = random.uniform(0.001, 0.01, 24).astype(np.float32)
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.scale", "zeros"], [f"{name}.d"], axis=0))
        nodes.append(helper.make_node("Gemm", ["d", f"{name}.d"], [output], transB=1, name=name))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 24]) for name in ("y", "z")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(model: onnx.ModelProto, x: np.ndarray, optimised: Path) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def test_shared_activations(tmp_path: Path) -> None:
    before = two_products_of_one_activation()
    model = ir.from_proto(before)
    assert UnsignActivationsPass()(model).modified
    after: onnx.ModelProto = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    x = np.random.default_rng(4).standard_normal((7, 32)).astype(np.float32)
    x[0, :3] = (100, -100, 127.4 * SCALE)  # saturates at both ends
    expected, received = run(before, x, tmp_path / "before.onnx"), run(after, x, tmp_path / "after.onnx")
    codes = np.clip(np.rint(x / SCALE), -128, 127).astype(np.float64) * np.float64(SCALE)
    for name, one, other in zip("ab", expected, received, strict=True):
        weight = {item.name: numpy_helper.to_array(item) for item in before.graph.initializer}
        exact = codes @ (weight[name] * weight[f"{name}.scale"][:, None].astype(np.float64)).T
        np.testing.assert_allclose(other, exact, rtol=1e-5, atol=1e-5)  # fp32 after exact integer sums
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)
    nodes = onnx.load(tmp_path / "after.onnx").graph.node
    assert [node.op_type for node in nodes].count("QGemm") == 2
    assert not UnsignActivationsPass()(model).modified


def test_weights_stay_int8_and_float8_stays_what_it_is() -> None:
    proto = two_products_of_one_activation()
    next(item for item in proto.graph.initializer if item.name == "zero").CopyFrom(
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    )
    model = ir.from_proto(proto)
    assert not UnsignActivationsPass()(model).modified
    model = ir.from_proto(two_products_of_one_activation())
    UnsignActivationsPass()(model)
    weights = [node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()]  # type: ignore[union-attr]
    assert [node.inputs[0].dtype for node in weights] == [ir.DataType.INT8] * 2  # type: ignore[union-attr]


def test_the_postcondition_sees_int8() -> None:
    with pytest.raises(PostconditionError, match="quantises to int8"):
        UnsignActivationsPass().ensures(ir.from_proto(two_products_of_one_activation()))
