"""LowerFloat8Pass: FP8 activations as casts, for ONNX Runtime's CPU provider.

ONNX Runtime 1.31 fuses Q/DQ pairs around a product to integer operators whatever their 8-bit type, moves them through
reshapes to do so, and then refuses its own nodes. So ``QuantizeLinear -> DequantizeLinear`` of an activation becomes
``Div -> Cast (saturating) -> Cast -> Mul``, which is what the two operators are defined as: the same numbers, and a
product in the precision of the layer. Weights keep their ``DequantizeLinear``. The pass is for that provider alone;
others compute in FP8.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor

_FLOAT8 = ir.DataType.FLOAT8E4M3FN
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


class LowerFloat8Pass(InPlacePass):
    """Replace FP8 Q/DQ pairs of activations by division, casts and multiplication."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower each pair."""
        pairs = [pair for node in model.graph if (pair := _pair(node)) is not None]
        for quantise, dequantise in pairs:
            value, scale, back = quantise.inputs[0], quantise.inputs[1], dequantise.inputs[1]
            if value is None or back is None:
                raise AssertionError(f"{quantise.name} has no input, or {dequantise.name} no scale")
            editor = GraphEditor(model.graph, dequantise, str(quantise.name).removesuffix(".QuantizeLinear"))
            quotient = editor.emit("Div", [editor.cast(value, _FLOAT), scale], kind=_FLOAT, shape=_sizes(value))
            codes = editor.emit("Cast", [quotient], {"to": int(_FLOAT8), "saturate": 1}, kind=ir.TensorType(_FLOAT8))
            numbers = editor.cast(codes, back.type)
            product = editor.emit("Mul", [numbers, back], kind=back.type)
            for output in (codes, numbers, product):
                output.shape = value.shape
            product = editor.cast(product, dequantise.outputs[0].type)
            editor.replace(product)
            if not quantise.outputs[0].uses():
                model.graph.remove(quantise, safe=True)
        return PassResult(model, modified=bool(pairs))

    def ensures(self, model: ir.Model) -> None:
        """No activation is quantised to FP8."""
        for node in model.graph:
            if _pair(node) is not None:
                raise PostconditionError(f"{node.name} would be fused to an integer operator")


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]


def _pair(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return the pair that ``node`` ends, if it dequantises an FP8 activation."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].dtype != _FLOAT8:
        return None
    quantise = node.inputs[0].producer()
    return (quantise, node) if quantise is not None and quantise.op_type == "QuantizeLinear" else None
