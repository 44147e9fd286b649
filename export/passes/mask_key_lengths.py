"""MaskKeyLengthsPass: attention over a prefix of the keys as ``Attention`` with one row of mask per video.

For compilers whose parser reads opset 24's ``nonpad_kv_seqlen`` and then forgets it (TensorRT-RTX 1.7 does: the plan
attends to padding, and nothing is said). The mask is [B, 1, 1, S] in the operands' type, 0 or :data:`MASKED`; a fused
kernel takes it as it is. (A mask of booleans becomes eight kernels there.) The pass does not know where the lengths
come from.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.layers import attention_name
from reelforge.export.portable import DOMAIN, KEY_LENGTHS_OP

MASKED = -30000.0
"""Added to the logit of a key that does not count: a number of fp16, whose exponential beside any other logit is 0."""


class MaskKeyLengthsPass(InPlacePass):
    """Replace ``reelforge::AttentionWithKeyLengths`` by ``Attention`` with a mask."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; operands are [B, h, S, d], lengths int64 [B]."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, KEY_LENGTHS_OP)]
        for node in found:
            _lower(node, model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No portable node is left, and no attention has key lengths."""
        for node in model.graph:
            if (node.domain, node.op_type) == (DOMAIN, KEY_LENGTHS_OP):
                raise PostconditionError(f"{KEY_LENGTHS_OP} is still in the graph")
            if node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
                raise PostconditionError(f"{node.name} has key lengths")


def _lower(node: ir.Node, graph: ir.Graph) -> None:
    query, key, value, lengths = node.inputs
    if query is None or key is None or lengths is None or query.type is None:
        raise AssertionError(f"{node.name}: an operand or its type is missing")
    editor = GraphEditor(graph, node)
    first, step = (editor.constant([number], scalar=True) for number in (0, 1))
    keys = editor.emit("Squeeze", [editor.emit("Shape", [key], {"start": 2, "end": 3})])
    positions = editor.emit("Range", [first, keys, step])
    visible = editor.emit("Less", [positions, editor.emit("Unsqueeze", [lengths, editor.constant([1, 2, 3])])])
    zero, masked = (editor.constant([number], query.type.dtype, scalar=True) for number in (0.0, MASKED))
    mask = editor.emit("Where", [visible, zero, masked], kind=query.type)
    editor.replace(editor.emit("Attention", [query, key, value, mask], kind=query.type, name=attention_name(node)))
