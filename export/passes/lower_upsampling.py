"""LowerUpsamplingPass: nearest upsampling of videos becomes one of pictures, and a repetition of frames.

ONNX Runtime's CPU provider has a kernel for four dimensions and looks up every element's place for five: 12 times as
slow on the largest picture of a decoder. With whole factors the two are the same copy. What stays carries its reason in
``refused``. The pass does not know what the frames are.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.lowering import LoweringPass


class LowerUpsamplingPass(LoweringPass["_Upsampling"]):
    """Replace nearest ``Resize`` of ``[1, C, T, H, W]`` by whole factors, in four dimensions."""

    left = "still upsamples five dimensions"

    def concerns(self, node: ir.Node) -> bool:
        """See :class:`LoweringPass`."""
        return node.op_type == "Resize"

    def find(self, node: ir.Node) -> _Upsampling | str:
        """See :class:`LoweringPass`."""
        return _upsampling(node)

    def lower(self, graph: ir.Graph, node: ir.Node, found: _Upsampling) -> None:
        """See :class:`LoweringPass`."""
        _lower(graph, node, found)


@dataclass(frozen=True)
class _Upsampling:
    """What is upsampled, and how many times: frames, rows, columns."""

    value: ir.Value
    channels: int
    factors: tuple[int, int, int]


def _upsampling(node: ir.Node) -> _Upsampling | str:
    """Return what a node upsamples, or why it is left alone."""
    words = {name: node.attributes[name].as_string() for name in _NEAREST if name in node.attributes}
    if words != _NEAREST:
        return "it is not the nearest element before"
    value = node.inputs[0]
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or scales is None or scales.const_value is None:
        return "its factors are not stored"
    sizes = [] if value.shape is None else list(value.shape)
    if len(sizes) != 5 or sizes[0] != 1 or not isinstance(sizes[1], int):
        return f"{sizes} is not one video with a fixed number of channels"
    factors = scales.const_value.numpy().tolist()
    if "axes" in node.attributes or len(factors) != 5 or factors[:2] != [1, 1]:
        return "its factors are not of frames, rows and columns"
    if any(factor < 1 or factor != int(factor) for factor in factors):
        return f"{factors} are not whole factors"
    return _Upsampling(value, sizes[1], (int(factors[2]), int(factors[3]), int(factors[4])))


_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _lower(graph: ir.Graph, node: ir.Node, found: _Upsampling) -> None:
    editor = GraphEditor(graph, node)
    kind = found.value.type
    frames, *pictures = found.factors
    first = editor.constant([0])
    flat = editor.emit("Squeeze", [found.value, first], kind=kind)
    scales = editor.constant([1.0, 1.0, *map(float, pictures)], ir.DataType.FLOAT)
    larger = editor.emit("Resize", [flat, None, scales], _NEAREST, kind=kind)
    if frames == 1:
        editor.replace(editor.emit("Unsqueeze", [larger, first], kind=kind))
        return
    single = editor.emit("Unsqueeze", [larger, editor.constant([2])], kind=kind)
    repeated = editor.emit("Concat", [single] * frames, {"axis": 2}, kind=kind)
    # [C, T, factor, H, W] to [1, C, T * factor, H, W]: zeros copy rows and columns.
    editor.replace(editor.emit("Reshape", [repeated, editor.constant([1, found.channels, -1, 0, 0])], kind=kind))
