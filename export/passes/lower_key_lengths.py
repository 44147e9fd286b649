"""LowerKeyLengthsPass: attention over a prefix of the keys as opset 24's ``Attention`` with ``nonpad_kv_seqlen``.

Opset 23 can only say this with an S x S mask (its CPU kernel refuses a broadcast row). Only graphs for several videos
per call contain the operator, so only those become opset 24. The pass does not know where the lengths come from.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.layers import attention_name
from reelforge.export.portable import DOMAIN, KEY_LENGTHS_OP


class LowerKeyLengthsPass(InPlacePass):
    """Replace ``reelforge::AttentionWithKeyLengths`` by ``Attention`` of opset 24."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; operands are [B, h, S, d], lengths int64 [B]."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, KEY_LENGTHS_OP)]
        for node in found:
            query, key, value, lengths = node.inputs
            editor = GraphEditor(model.graph, node)
            kind = None if query is None else query.type
            operands = [query, key, value, None, None, None, lengths]
            editor.replace(editor.emit("Attention", operands, kind=kind, name=attention_name(node)))
        if found:
            model.graph.opset_imports[""] = 24
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No portable node is left."""
        if any((node.domain, node.op_type) == (DOMAIN, KEY_LENGTHS_OP) for node in model.graph):
            raise PostconditionError(f"{KEY_LENGTHS_OP} is still in the graph")
