"""LowerFloat8Pass: FP8 activations as casts, for ONNX Runtime's CPU provider.

ONNX Runtime 1.31 fuses Q/DQ pairs around a product to integer operators whatever their 8-bit type, moves them through
reshapes to do so, and then refuses its own nodes. So ``QuantizeLinear -> DequantizeLinear`` of an activation becomes
``Div -> Cast (saturating) -> Cast -> Mul``, which is what the two operators are defined as: the same numbers, and a
product in fp32. Weights keep their ``DequantizeLinear``. The pass is for that provider alone; others compute in FP8.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor

_FLOAT8 = ir.DataType.FLOAT8E4M3FN


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
            quotient = editor.emit("Div", [value, scale], kind=value.type)
            codes = editor.emit("Cast", [quotient], {"to": int(_FLOAT8), "saturate": 1}, kind=ir.TensorType(_FLOAT8))
            numbers = editor.emit("Cast", [codes], {"to": int(ir.DataType.FLOAT)}, kind=value.type)
            product = editor.emit("Mul", [numbers, back], kind=value.type)
            for output in (quotient, codes, numbers, product):
                output.shape = value.shape
            editor.replace(product)
            if not quantise.outputs[0].uses():
                model.graph.remove(quantise, safe=True)
        return PassResult(model, modified=bool(pairs))

    def ensures(self, model: ir.Model) -> None:
        """No activation is quantised to FP8."""
        for node in model.graph:
            if _pair(node) is not None:
                raise PostconditionError(f"{node.name} would be fused to an integer operator")


def _pair(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return the pair that ``node`` ends, if it dequantises an FP8 activation."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].dtype != _FLOAT8:
        return None
    quantise = node.inputs[0].producer()
    return (quantise, node) if quantise is not None and quantise.op_type == "QuantizeLinear" else None
