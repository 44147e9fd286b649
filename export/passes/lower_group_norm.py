"""LowerGroupNormPass: GroupNorm in two-stage sums, for backends whose own sums lose digits over large tiles.

A group of the VAE's last level spans up to 6.8e7 elements. ONNX Runtime expands ``GroupNormalization`` to one fp32 mean
over all of them; here each picture is summed first and then the pictures, which are few. Everything is fp32 whatever
the operand's type. The pass does not know what is normalised.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


class LowerGroupNormPass(InPlacePass):
    """Replace ``GroupNormalization`` over [B, C, ..., H, W] by means of means, centring and one affine step."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; the channel count must be fixed."""
        found = [node for node in model.graph if node.op_type == "GroupNormalization"]
        for node in found:
            _lower(node, model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No GroupNormalization is left."""
        if any(node.op_type == "GroupNormalization" for node in model.graph):
            raise PostconditionError("GroupNormalization is still in the graph")


def _lower(node: ir.Node, graph: ir.Graph) -> None:
    x, weight, bias = (operand for operand in node.inputs if operand is not None)
    if x.shape is None or not isinstance(x.shape[1], int) or x.type is None:
        raise AssertionError(f"{node.name}: type, rank or channel count of the operand is not fixed")
    channels, rank = x.shape[1], len(x.shape)
    groups = node.attributes["num_groups"].as_int()
    editor = GraphEditor(graph, node)
    picture = editor.constant([rank - 2, rank - 1])
    rest = editor.constant([2, 3])
    grouped = editor.constant([0, groups, channels // groups, -1])
    per_group = editor.constant([0, groups, 1])
    spread = editor.constant([1, 1, channels // groups])
    per_channel = editor.constant([0, channels, *[1] * (rank - 2)])
    vector = editor.constant([1, channels, *[1] * (rank - 2)])

    def mean(value: ir.Value) -> ir.Value:
        """Return the mean of each channel's group, [B, C, 1, ..., 1]."""
        pictures = editor.emit("ReduceMean", [value, picture], {"keepdims": 1}, kind=_FLOAT)
        rows = editor.emit("Reshape", [pictures, grouped], kind=_FLOAT)
        means = editor.emit("ReduceMean", [rows, rest], {"keepdims": 0}, kind=_FLOAT)
        column = editor.emit("Reshape", [means, per_group], kind=_FLOAT)
        repeated = editor.emit("Expand", [column, spread], kind=_FLOAT)
        return editor.emit("Reshape", [repeated, per_channel], kind=_FLOAT)

    def as_float(value: ir.Value) -> ir.Value:
        if value.type == _FLOAT:
            return value
        return editor.emit("Cast", [value], {"to": int(ir.DataType.FLOAT)}, kind=_FLOAT)

    exact = as_float(x)
    centred = editor.emit("Sub", [exact, mean(exact)], kind=_FLOAT)
    variance = mean(editor.emit("Mul", [centred, centred], kind=_FLOAT))
    epsilon = editor.constant([node.attributes["epsilon"].as_float()], ir.DataType.FLOAT)
    deviation = editor.emit("Sqrt", [editor.emit("Add", [variance, epsilon], kind=_FLOAT)], kind=_FLOAT)
    gain = editor.emit("Reshape", [as_float(weight), vector], kind=_FLOAT)
    scale = editor.emit("Div", [gain, deviation], kind=_FLOAT)
    offset = editor.emit("Reshape", [as_float(bias), vector], kind=_FLOAT)
    result = editor.emit("Add", [editor.emit("Mul", [centred, scale], kind=_FLOAT), offset], kind=_FLOAT)
    if x.type != _FLOAT:
        result = editor.emit("Cast", [result], {"to": int(x.type.dtype)}, kind=x.type)
    editor.replace(result)
