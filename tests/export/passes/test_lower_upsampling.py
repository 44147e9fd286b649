"""LowerUpsamplingPass: the same elements as numpy repeats, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.export.lower import lower
from reelforge.export.passes.lower_upsampling import LowerUpsamplingPass
from reelforge.runtime.recipe import Backend, Target

CHANNELS = 3
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def model_of(scales: list[float], batch: int = 1, rank: int = 5, **words: str) -> ir.Model:
    shape = [batch, CHANNELS, "frames", "rows", "columns"][:rank]
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "up.Resize", **{**NEAREST, **words})
    graph = helper.make_graph(
        [node],
        "upsampling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CHANNELS, "t", "h", "w"][:rank])],
        [numpy_helper.from_array(np.array(scales, np.float32), "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2), (3, 1, 2), (1, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (4, 8, 6)])
def test_repeats_elements(factors: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    model = lower(model_of([1, 1, *factors]), Target(Backend.CPU))
    check_graph(graph_bytes(model), "upsampling.onnx")
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, *size)).astype(np.float32)
    expected = x
    for axis, factor in zip((2, 3, 4), factors, strict=True):
        expected = expected.repeat(factor, axis)
    session = onnxruntime.InferenceSession(graph_bytes(model), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    for node in model.graph:
        if node.op_type == "Resize":
            scales = node.inputs[2]
            assert scales is not None
            assert scales.const_value is not None
            assert scales.const_value.shape == (4,)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_of([1, 1, 1, 1.5, 2]), "are not whole factors"),
        (model_of([1, 2, 1, 2, 2]), "not of frames, rows and columns"),
        (model_of([1, 1, 2, 2, 2], batch=2), "is not one video"),
        (model_of([1, 1, 2, 2], rank=4), "is not one video"),
        (model_of([1, 1, 1, 2, 2], nearest_mode="ceil"), "not the nearest element before"),
        (model_of([1, 1, 1, 2, 2], mode="linear"), "not the nearest element before"),
    ],
)
def test_leaves_other_things_alone(model: ir.Model, reason: str) -> None:
    step = LowerUpsamplingPass()
    assert not step(model).modified
    assert [node.op_type for node in model.graph] == ["Resize"]
    assert reason in step.refused["up.Resize"]


def test_upsampling_that_is_left_is_noticed() -> None:
    with pytest.raises(PostconditionError, match=r"up\.Resize still upsamples five dimensions"):
        LowerUpsamplingPass().ensures(model_of([1, 1, 1, 2, 2]))
