"""LowerIntegerConvolutionPass: quantised convolutions of videos become ONNX Runtime's integer convolution.

A ``Conv`` of dequantised codes has the numbers of 8 bits and the speed of fp32. ``QLinearConv`` multiplies the codes
and gives codes of the result, whose range calibration has observed. On one thread of a Zen 4 core (single operators,
the smallest of 5 runs) 128 channels take 21 ms instead of 98 in fp32, 32 channels 15 instead of 33, and 16 channels as
long as in fp32. Whole decoders are in ``benchmarks/runtime.md``.

What a convolution of few channels loses is that each of its 27 taps reads few bytes. So the columns that a row of taps
reads are put side by side as channels before: with 16 channels 15 to 17 ms instead of 31, with 32 channels 32 instead
of 44. Padding by the edge and nearest upsampling copy values, and may as well copy codes: the activation is quantised
before them, and they take a quarter of the memory.

For ONNX Runtime's CPU provider alone, which lays channels out last by itself. Its own operator of that kind, in domain
``com.microsoft``, is as fast, and was wrong in an emulator of a processor without VNNI: only the standard one is made
exact there (see ``runtime.engines.onnxruntime_library``), and only if it shares no constant. What stays as it was
carries its reason in ``refused``. The pass does not know how codes or ranges were made. A bias of more than 2^31
products of its scales, which a channel of nearly no weights could have, is cut off there.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from reelforge.calibration.number_formats import unsigned_codes
from reelforge.export.passes.editing import GraphEditor, replace_output
from reelforge.export.passes.quantised_operands import LowerQuantisedPass, QuantisedOperands, quantised_operands

INTEGER_CONVOLUTION = "QLinearConv"
NARROW_CHANNELS = 32
"""Up to which columns are put side by side; wider convolutions gain nothing by it."""

_UINT8, _INT8 = ir.TensorType(ir.DataType.UINT8), ir.TensorType(ir.DataType.INT8)
_CHANNELS, _COLUMNS = 1, 4  # axes
_END = 2**62
_BIAS_LIMIT = 2147483520.0  # the largest fp32 number below 2**31


class LowerIntegerConvolutionPass(LowerQuantisedPass):
    """Replace every ``Conv`` of dequantised uint8 videos and int8 stored weights whose output has a range.

    Args:
        output_ranges: By layer, the lowest and the highest value that codes of the output stand for. None of these
            layers may stay.
    """

    left = "is still a convolution of dequantised codes"

    def __init__(self, output_ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(output_ranges)
        self.output_ranges = output_ranges

    def concerns(self, node: ir.Node) -> bool:
        """See :class:`LoweringPass`."""
        return node.op_type == "Conv" and node.domain in ("", "ai.onnx")

    def find(self, node: ir.Node) -> QuantisedOperands | str:
        """See :class:`LoweringPass`."""
        found = quantised_operands(node)
        if isinstance(found, str):
            return found
        if found.codes.shape is None or len(found.codes.shape) != 5:
            return "it is no convolution of videos"
        if any(_numbers(node, name, usual) - {usual} for name, usual in _PLAIN):
            return "it pads, strides, dilates or has groups"
        if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() != "NOTSET":
            return "it pads by itself"
        return found if node.name in self.output_ranges else "the range of its output is not known"

    def lower(self, graph: ir.Graph, node: ir.Node, found: QuantisedOperands) -> None:
        """See :class:`LoweringPass`."""
        _lower(graph, node, found, self.output_ranges[str(node.name)])


_PLAIN = (("pads", 0), ("strides", 1), ("dilations", 1), ("group", 1))


def _numbers(node: ir.Node, name: str, usual: int) -> set[int]:
    if name not in node.attributes:
        return {usual}
    attribute = node.attributes[name]
    return {attribute.as_int()} if attribute.type == ir.AttributeType.INT else set(attribute.as_ints())


def _lower(graph: ir.Graph, conv: ir.Node, found: QuantisedOperands, output_range: tuple[float, float]) -> None:
    if found.codes.shape is None:
        raise AssertionError(f"the codes of {conv.name} have no shape")
    out_channels, in_channels, *kernel = found.codes.shape.numpy()
    name = str(conv.name)
    conv.name = f"{name}.replaced"
    if not conv.outputs[0].is_graph_output():
        conv.outputs[0].name = f"{name}.replaced"
    editor = GraphEditor(graph, conv, name)
    scale, zero_point = found.value_scale, found.value_zero_point
    video = _codes(graph, conv, found)
    weight = found.codes
    if kernel[2] > 1 and in_channels <= NARROW_CHANNELS:
        video = _columns_as_channels(editor, video, kernel[2])
        turned = editor.emit(
            "Transpose", [weight], {"perm": [0, 4, 1, 2, 3]}, kind=_INT8, name=f"{weight.name}.columns"
        )
        shape = [out_channels, kernel[2] * in_channels, *kernel[:2], 1]
        weight = editor.emit("Reshape", [turned, editor.constant(shape)], kind=_INT8, shape=shape)
    output_scale, output_zero_point = unsigned_codes(*output_range)
    result_pair = (
        editor.constant([output_scale], ir.DataType.FLOAT, scalar=True),
        editor.constant([output_zero_point], ir.DataType.UINT8, scalar=True),
    )
    weight_pair = (found.weight_scale, _zero_point(graph, name))
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    inputs = [video, scale, zero_point, weight, *weight_pair, *result_pair]
    if bias is not None:
        inputs.append(_bias_codes(editor, bias, found))
    codes = editor.emit(INTEGER_CONVOLUTION, inputs, kind=_UINT8, name=name)
    kind = conv.outputs[0].type
    replace_output(graph, conv, editor.emit("DequantizeLinear", [codes, *result_pair], kind=kind))


def _zero_point(graph: ir.Graph, layer: str) -> ir.Value:
    """Return the weight's zero point; one per layer, since ONNX Runtime alters it where processors lack VNNI."""
    tensor = ir.tensor(0, dtype=ir.DataType.INT8, name=f"{layer}.weight.zero_point")
    value = ir.Value(name=tensor.name, type=_INT8, shape=ir.Shape([]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _codes(graph: ir.Graph, conv: ir.Node, found: QuantisedOperands) -> ir.Value:
    """Return the activation's codes, made as far before the convolution as values are only copied."""
    reader = found.value_codes.producer()
    value, copying = found.values, []
    while reader is not None:
        node = value.producer()
        alone = not value.is_graph_output() and {use.node for use in value.uses()} == {reader}
        if node is None or not alone or not _copies(node) or node.inputs[0] is None:
            break
        copying.append(node)
        reader, value = node, node.inputs[0]
    if not copying:
        return found.value_codes
    name = f"{conv.name}.QuantizeLinear"
    codes = ir.Value(name=name, type=_UINT8, shape=value.shape)
    pair = [found.value_scale, found.value_zero_point]
    nodes = [ir.Node("", "QuantizeLinear", [value, *pair], outputs=[codes], name=name)]
    for node in reversed(copying):
        first = node.inputs[0]
        inputs = [codes if own is first else own for own in node.inputs]
        name = f"{node.name}.uint8"
        codes = ir.Value(name=name, type=_UINT8, shape=node.outputs[0].shape)
        nodes.append(ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=[codes], name=name))
    graph.insert_before(conv, nodes)
    return codes


def _copies(node: ir.Node) -> bool:
    """Whether every element of a node's output is one of its first input's."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else ""
    if node.op_type == "Concat":  # frames that are repeated
        return all(value is node.inputs[0] for value in node.inputs)
    return (node.op_type, mode) in _COPYING


_COPYING = {
    ("Pad", "edge"),
    ("Resize", "nearest"),
    *((name, "") for name in ("Reshape", "Slice", "Squeeze", "Unsqueeze")),
}


def _columns_as_channels(editor: GraphEditor, video: ir.Value, width: int) -> ir.Value:
    """Return ``[1, width * C, T, H, W - width + 1]``: a column's channels, then those of the columns to its right."""
    shifted = [
        editor.emit(
            "Slice",
            [
                video,
                editor.constant([offset]),
                editor.constant([offset - width + 1 if offset < width - 1 else _END]),
                editor.constant([_COLUMNS]),
            ],
            kind=_UINT8,
        )
        for offset in range(width)
    ]
    return editor.emit("Concat", shifted, {"axis": _CHANNELS}, kind=_UINT8)


def _bias_codes(editor: GraphEditor, bias: ir.Value, found: QuantisedOperands) -> ir.Value:
    """Return the bias as int32 in steps of both operands' scales; a constant, which ONNX Runtime computes once."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    step = editor.emit("Mul", [found.weight_scale, found.value_scale], kind=kind)
    exact = editor.emit("Round", [editor.emit("Div", [bias, step], kind=kind)], kind=kind)
    limits = [editor.constant([limit], ir.DataType.FLOAT, scalar=True) for limit in (-_BIAS_LIMIT, _BIAS_LIMIT)]
    return editor.cast(editor.emit("Clip", [exact, *limits], kind=kind), ir.TensorType(ir.DataType.INT32))
