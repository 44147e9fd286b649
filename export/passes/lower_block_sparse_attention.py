"""LowerBlockSparseAttentionPass: attention over lists of key blocks as the standard ``Attention`` under a mask.

For backends without a kernel that visits lists: the result is the same, nothing is saved, and the S x S mask limits it
to short sequences. A list becomes a row of a block mask through prefix sums: key block k is listed between two places
of ``block_index`` if its count has grown between them. All attentions of a graph read the same lists, so the pass that
removes equal subexpressions leaves one mask, which each cuts to its length. The module does not know where lists come
from.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.layers import attention_name
from reelforge.export.portable import DOMAIN
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP

_INT32, _BOOL = ir.TensorType(ir.DataType.INT32), ir.TensorType(ir.DataType.BOOL)
_END = 2**31 - 1


class LowerBlockSparseAttentionPass(InPlacePass):
    """Replace ``reelforge::BlockSparseAttention`` by ``Attention`` with a mask of booleans."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; operands are those of ``portable_sparse.block_sparse_attention``."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, BLOCK_SPARSE_OP)]
        for node in found:
            _lower(node, model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No portable node is left."""
        if any((node.domain, node.op_type) == (DOMAIN, BLOCK_SPARSE_OP) for node in model.graph):
            raise PostconditionError(f"{BLOCK_SPARSE_OP} is still in the graph")


def _lower(node: ir.Node, graph: ir.Graph) -> None:
    query, key, value, index, start, counts = (operand for operand in node.inputs if operand is not None)
    query_block, key_block = (node.attributes[name].as_int() for name in ("query_block", "key_block"))
    editor = GraphEditor(graph, node)
    blocks = editor.emit("Shape", [counts], {"start": 1, "end": 2})
    tokens = editor.emit("Shape", [query], {"start": 2, "end": 3})
    listed = _listed(editor, index, start, blocks)
    padded = editor.emit("Mul", [blocks, editor.constant([key_block])])
    visible = editor.emit(
        "And",
        [_by_token(editor, listed, padded, query_block, key_block), _counting(editor, counts, key_block)],
        kind=_BOOL,
    )
    starts, ends = editor.constant([0, 0]), editor.emit("Concat", [tokens, tokens], {"axis": 0})
    mask = editor.emit("Slice", [visible, starts, ends, editor.constant([2, 3])], kind=_BOOL)
    editor.replace(editor.emit("Attention", [query, key, value, mask], kind=query.type, name=attention_name(node)))


def _listed(editor: GraphEditor, index: ir.Value, start: ir.Value, blocks: ir.Value) -> ir.Value:
    """Return which key blocks each query block visits, bool [h, Q, K]."""
    zero, one = (editor.constant([number], ir.DataType.INT32, scalar=True) for number in (0, 1))
    count = editor.cast(editor.emit("Squeeze", [blocks]), _INT32)
    numbers = editor.emit("Range", [zero, count, one], kind=_INT32)
    entry = editor.emit("Unsqueeze", [index, editor.constant([1])], kind=_INT32)
    is_block = editor.cast(editor.emit("Equal", [entry, numbers], kind=_BOOL), _INT32)  # [entries, K]
    sums = editor.emit("CumSum", [is_block, editor.constant([0], scalar=True)], kind=_INT32)
    before = editor.emit("Pad", [sums, editor.constant([1, 0, 0, 0])], kind=_INT32)  # a place's sum is of what it ends
    places = editor.emit("Gather", [before, start], {"axis": 0}, kind=_INT32)  # [h, Q + 1, K]
    axis, second = editor.constant([1]), editor.constant([1])
    ends = editor.emit("Slice", [places, second, editor.constant([_END]), axis], kind=_INT32)
    starts = editor.emit("Slice", [places, editor.constant([0]), editor.constant([-1]), axis], kind=_INT32)
    return editor.emit("Greater", [ends, starts], kind=_BOOL)


def _by_token(editor: GraphEditor, listed: ir.Value, padded: ir.Value, query_block: int, key_block: int) -> ir.Value:
    """Return the same for every token of the padded sequence, bool [h, Q * query_block, K * key_block]."""
    apart = editor.emit("Unsqueeze", [listed, editor.constant([2, 4])], kind=_BOOL)
    repeated = editor.emit("Expand", [apart, editor.constant([1, 1, query_block, 1, key_block])], kind=_BOOL)
    shape = editor.emit("Concat", [editor.constant([0]), padded, padded], {"axis": 0})
    return editor.emit("Reshape", [repeated, shape], kind=_BOOL)


def _counting(editor: GraphEditor, counts: ir.Value, key_block: int) -> ir.Value:
    """Return which keys count, bool [B, 1, 1, K * key_block]."""
    places = editor.constant(list(range(key_block)), ir.DataType.INT32)
    limit = editor.emit("Unsqueeze", [counts, editor.constant([2])], kind=_INT32)
    counting = editor.emit("Less", [places, limit], kind=_BOOL)
    return editor.emit("Reshape", [counting, editor.constant([0, 1, 1, -1])], kind=_BOOL)
