"""LowerFrameCausalAttentionPass: the VAE's attention as a loop over frames, for backends that run ONNX control flow.

Each iteration attends the queries of one frame to the keys of all frames up to it, so the largest score matrix is one
frame wide and no mask exists. The pass does not know tile sizes: the number of frames is read from the query.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.portable import DOMAIN, FRAME_CAUSAL_OP


class LowerFrameCausalAttentionPass(InPlacePass):
    """Replace ``reelforge::FrameCausalAttention`` by ``Loop`` over ``Attention``."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; q, k, v are [B, T, P, D] with a fixed D."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, FRAME_CAUSAL_OP)]
        for node in found:
            _lower(node, model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No portable node is left."""
        if any((node.domain, node.op_type) == (DOMAIN, FRAME_CAUSAL_OP) for node in model.graph):
            raise PostconditionError(f"{FRAME_CAUSAL_OP} is still in the graph")


def _lower(node: ir.Node, graph: ir.Graph) -> None:
    query, key, value = (operand for operand in node.inputs if operand is not None)
    width = None if query.shape is None else query.shape[3]
    if not isinstance(width, int):
        raise AssertionError(f"{node.name}: the channel count of the query is not fixed")
    outer = GraphEditor(graph, node)
    frames = outer.emit("Shape", [query], {"start": 1, "end": 2})
    trips = outer.emit("Squeeze", [frames])
    body = _body(outer, query, key, value, width)
    always = outer.constant([True], ir.DataType.BOOL, scalar=True)
    looped = outer.emit("Loop", [trips, always], {"body": body}, kind=query.type)
    result = outer.emit("Transpose", [looped], {"perm": [1, 0, 2, 3]}, kind=query.type)
    outer.replace(result)


def _body(outer: GraphEditor, query: ir.Value, key: ir.Value, value: ir.Value, width: int) -> ir.Graph:
    """One iteration: frame ``i`` of the query against frames 0..i."""
    index = ir.Value(name=f"{outer.name}.frame", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    condition = ir.Value(name=f"{outer.name}.go_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    body = ir.Graph([index, condition], [], nodes=[], name=f"{outer.name}.body")
    inner = GraphEditor(body, None, f"{outer.name}.body")
    axis, zero, one = (outer.constant(numbers) for numbers in ([1], [0], [1]))
    flat = outer.constant([0, 1, -1, width])
    go_on = inner.emit("Identity", [condition])
    row = inner.emit("Gather", [query, index], {"axis": 1}, kind=query.type)
    frame = inner.emit("Unsqueeze", [row, axis], kind=query.type)
    last = inner.emit("Unsqueeze", [index, zero])
    end = inner.emit("Add", [last, one])
    visible = [
        inner.emit("Reshape", [inner.emit("Slice", [operand, zero, end, axis], kind=query.type), flat], kind=query.type)
        for operand in (key, value)
    ]
    attended = inner.emit("Attention", [frame, *visible], kind=query.type)
    out = inner.emit("Squeeze", [attended, axis], kind=query.type)
    body.outputs.extend([go_on, out])
    return body
