"""What the lowering passes build with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from reelforge.export.passes.editing import GraphEditor


@pytest.fixture
def graph() -> ir.Graph:
    return ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="g")


def test_equal_constants_are_one_and_others_are_not(graph: ir.Graph) -> None:
    editor = GraphEditor(graph, None, "n")
    assert editor.constant([1, 2]) is GraphEditor(graph, None, "m").constant([1, 2])
    exact = editor.constant([1e-6], ir.DataType.FLOAT)
    assert exact.name == "constant.float.1e-06"
    assert editor.constant([float(np.float32(1e-6))], ir.DataType.FLOAT) is exact  # what a file gives back
    different = [
        editor.constant([1, 2]),
        editor.constant([1, -2]),
        editor.constant([12]),
        editor.constant([1]),
        editor.constant([1], scalar=True),
        editor.constant([True], ir.DataType.BOOL),
        editor.constant([1.0], ir.DataType.FLOAT),
        editor.constant([1_234_567]),
        editor.constant([1_234_568]),
        exact,
        editor.constant([1.0000001e-6], ir.DataType.FLOAT),
    ]
    assert len({value.name for value in different}) == len(different)
    assert set(graph.initializers) == {value.name for value in different}
    tensors = [value.const_value for value in different]
    assert [tensor.shape.numpy() for tensor in tensors if tensor is not None][:5] == [(2,), (2,), (1,), (1,), ()]


def test_names_are_numbered(graph: ir.Graph) -> None:
    editor = GraphEditor(graph, None, "layer")
    one = editor.constant([1])
    for _ in range(3):
        editor.emit("Identity", [one])
    editor.emit("Abs", [one], name="mine")
    names = [node.name for node in graph]
    assert names[0] == "layer.Identity"
    assert names[3] == "mine"
    assert len(set(names)) == 4


def test_an_editor_that_appends_replaces_nothing(graph: ir.Graph) -> None:
    editor = GraphEditor(graph, None, "n")
    with pytest.raises(AssertionError, match="nothing to replace"):
        editor.replace(editor.emit("Identity", [editor.constant([1])]))
