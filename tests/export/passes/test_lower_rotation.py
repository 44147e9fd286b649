"""LowerRotationPass: a rotation in halves against float64, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PostconditionError

from reelforge.export.lower import lower
from reelforge.export.passes.lower_rotation import LowerRotationPass
from reelforge.runtime.recipe import Backend, Target

HEADS, WIDTH = 3, 8


def rotation_model(
    tokens: int | str, batch: int = 1, sign: str = "Sub", axis: int = 1, table: tuple[int | str, ...] | None = None
) -> ir.Model:
    """``x`` rotated by the tables ``cos`` and ``sin``, as a transformer block is captured.

    Args:
        tokens: Of ``x``.
        batch: Of ``x``.
        sign: Between the products of the first half.
        axis: Along which tables are repeated.
        table: Their shape; as many rows as tokens by default.
    """
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["cos", "one"], ["c"], "b.c"),
        node("Unsqueeze", ["sin", "one"], ["s"], "b.s"),
        node("Split", ["x"], ["a", "b"], "b.split", axis=3, num_outputs=2),
        node("Mul", ["a", "c"], ["ac"], "b.ac"),
        node("Mul", ["b", "s"], ["bs"], "b.bs"),
        node("Mul", ["b", "c"], ["bc"], "b.bc"),
        node("Mul", ["a", "s"], ["as"], "b.as"),
        node(sign, ["ac", "bs"], ["first"], "b.first"),
        node("Add", ["bc", "as"], ["second"], "b.second"),
        node("Concat", ["first", "second"], ["y"], "b.Concat", axis=-1),
    ]
    info = helper.make_tensor_value_info
    inputs = [
        info("x", TensorProto.FLOAT, [batch, tokens, HEADS, WIDTH]),
        *(info(name, TensorProto.FLOAT, table or [tokens, WIDTH // 2]) for name in ("cos", "sin")),
    ]
    outputs = [info("y", TensorProto.FLOAT, [batch, tokens, HEADS, WIDTH])]
    graph = helper.make_graph(nodes, "rotation", inputs, outputs, [numpy_helper.from_array(np.array([axis]), "one")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feed: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


@pytest.mark.parametrize("tokens", [1, 2, 57])
def test_rotates_as_in_float64(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((1, tokens, HEADS, WIDTH)).astype(np.float32)
    angles = rng.uniform(-4, 4, (tokens, WIDTH // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    model = rotation_model("tokens")
    lower(model, Target(Backend.CPU))
    assert operators(model).count("RotaryEmbedding") == 1
    assert not {"Split", "Mul", "Concat"} & set(operators(model))
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    c, s = (table.astype(np.float64)[:, None] for table in (cos, sin))
    expected = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    np.testing.assert_allclose(run(model, {"x": x, "cos": cos, "sin": sin}), expected, rtol=0, atol=4e-7 * 4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (rotation_model("tokens", batch=2), "is not one video's tokens"),
        (rotation_model("tokens", sign="Add"), "made by Add, not by Sub"),
        (rotation_model(HEADS, axis=0), "is not one of tokens, the same for all heads"),
        (rotation_model("tokens", table=(HEADS,)), "is not one of tokens, the same for all heads"),
    ],
)
def test_leaves_alone_what_is_another_thing(model: ir.Model, reason: str) -> None:
    before = operators(model)
    step = LowerRotationPass()
    assert not step(model).modified
    assert operators(model) == before
    assert reason in step.refused["b.Concat"]


def test_a_rotation_that_is_left_is_noticed() -> None:
    with pytest.raises(PostconditionError, match=r"b\.Concat still rotates in pieces"):
        LowerRotationPass().ensures(rotation_model("tokens"))
