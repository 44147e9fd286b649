"""DeferScalesPass: 8-bit products of bare codes, their scales applied behind them in fp32; the form TensorRT-RTX wants.

TensorRT-RTX never puts a scale per channel into the product's kernel: it multiplies codes and leaves the rest to the
kernel that follows. With fp32 scales that product's result is stored in fp32, twice the bytes of the largest tensors of
a transformer; with half-precision scales the scales lose digits, and in fp16 the sums overflow. So codes are
dequantised by a power of two only, whose sums fit fp16 whatever they are, the product's result is in the stage's
precision, and the real scales, of the activation and of each output channel, are one fp32 factor of what follows:

    ``Cast(x_codes * 2^-8 @ w_codes * 2^-8) * (weight_scale * activation_scale * 2^16) + bias``

Numerically it is the graph that it replaces with one rounding of the product to the stage's precision, which a layer in
that precision has as well. The pass does not know how scales or codes were made.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor, replace_output
from reelforge.export.passes.layers import stored_value

CODE_SCALE = 2.0**-8
"""Of either operand: 448 * 448 * 2^-16 summed over 21000 products stays below fp16's largest number."""

_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_CODES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)


class DeferScalesPass(InPlacePass):
    """Move the scales of layers with 8-bit operands behind the product."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite each such layer."""
        found = [node for node in model.graph if _scaled(node)]
        for node in found:
            _defer(model.graph, node)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No product reads codes with a scale per channel."""
        for node in model.graph:
            if _scaled(node):
                raise PostconditionError(f"{node.name} still reads scaled codes")


def _dequantise(value: ir.Value | None) -> ir.Node | None:
    """Return the node that dequantises ``value`` from signed 8 bits, if it does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    return node if node.inputs[0].dtype in _CODES else None


def _scaled(node: ir.Node) -> bool:
    """Whether the node is a layer on 8-bit codes whose weight has a scale per channel."""
    if node.op_type not in ("Gemm", "Conv") or _dequantise(node.inputs[0]) is None:
        return False
    weight = _dequantise(node.inputs[1])
    scale = None if weight is None else weight.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 1


def _defer(graph: ir.Graph, node: ir.Node) -> None:
    activation, weight = _dequantise(node.inputs[0]), _dequantise(node.inputs[1])
    if activation is None or weight is None or activation.inputs[0] is None or weight.inputs[0] is None:
        raise AssertionError(f"{node.name} is not a layer on codes")
    kind, shape = node.outputs[0].type, node.outputs[0].shape
    scale, factors = activation.inputs[1], weight.inputs[1]
    if scale is None or scale.const_value is None or factors is None or factors.shape is None or kind is None:
        raise AssertionError(f"{node.name}: the activation's scale is not a constant, or types are missing")
    editor = GraphEditor(graph, node, f"{node.name}.scales")
    half = editor.constant([CODE_SCALE], kind.dtype, scalar=True)
    operands = [
        editor.emit("DequantizeLinear", [codes, half], kind=kind, shape=_sizes(codes))
        for codes in (activation.inputs[0], weight.inputs[0])
    ]
    product = ir.Value(name=f"{node.name}.codes", type=kind, shape=shape)
    graph.insert_before(
        node, ir.Node("", node.op_type, operands, node.attributes.values(), outputs=[product], name=node.name)
    )
    combined = float(scale.const_value.numpy()) / CODE_SCALE**2
    factor = editor.emit(
        "Mul",
        [factors, editor.constant([combined], ir.DataType.FLOAT, scalar=True)],
        kind=_FLOAT,
        shape=_sizes(factors),
    )
    exact = editor.cast(product, _FLOAT)
    result = editor.emit("Mul", [exact, _per_channel(editor, node, factor)], kind=_FLOAT, shape=_sizes(product))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = editor.cast(stored_value(node.inputs[2]) or node.inputs[2], _FLOAT)
        result = editor.emit("Add", [result, _per_channel(editor, node, bias)], kind=_FLOAT, shape=_sizes(product))
    replace_output(graph, node, editor.cast(result, kind))
    for unused in (activation, weight):
        if not unused.outputs[0].uses():
            graph.remove(unused, safe=True)


def _per_channel(editor: GraphEditor, node: ir.Node, vector: ir.Value) -> ir.Value:
    """Shape ``vector`` [channels] so that it multiplies or shifts the node's output channels."""
    rank = 0 if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if node.op_type == "Gemm":
        return vector
    if rank < 3 or vector.shape is None:
        raise AssertionError(f"{node.name}: the rank of a convolution's output is not known")
    sizes = [-1, *[1] * (rank - 2)]
    return editor.emit("Reshape", [vector, editor.constant(sizes)], kind=_FLOAT)


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
