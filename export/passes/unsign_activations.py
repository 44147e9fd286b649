"""UnsignActivationsPass: INT8 activations as uint8 around 128, for ONNX Runtime's CPU provider.

``q + 128`` in uint8 with the zero point 128 stands for the same number as ``q`` in int8, and saturates at the same
values. ONNX Runtime 1.31 makes the change by itself where one product reads an activation; where several share it (q, k
and v of a block) it keeps int8, for which its ``QGemm`` has no fast kernel, and INT8 becomes slower than fp32. The pass
is for that provider alone: GPUs want symmetric int8.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor


class UnsignActivationsPass(InPlacePass):
    """Give every INT8 activation the type uint8 and the zero point 128."""

    def call(self, model: ir.Model) -> PassResult:
        """Change each ``QuantizeLinear`` and the ``DequantizeLinear`` behind it."""
        found = [node for node in model.graph if _quantises_to_int8(node)]
        for node in found:
            zero = GraphEditor(model.graph, node).constant([128], ir.DataType.UINT8, scalar=True)
            for user in (node, *(use.node for use in node.outputs[0].uses())):
                if user is not node and user.op_type != "DequantizeLinear":
                    raise AssertionError(f"{user.name} reads the codes of {node.name}")
                user.replace_input_with(2, zero)
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No activation is quantised to int8."""
        for node in model.graph:
            if _quantises_to_int8(node):
                raise PostconditionError(f"{node.name} quantises to int8")


def _quantises_to_int8(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    return node.inputs[2].dtype == ir.DataType.INT8
