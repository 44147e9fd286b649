"""DecomposeTopKAttentionPass: attention that chooses its key blocks, as a choice and ``BlockSparseAttention``.

The choice is in standard operators that every target has; every list of a query block of the image has the same
length, so ``block_start`` is arithmetic and nothing has a shape that depends on numbers, but for ``kept_blocks``. Runs
before the passes that lower ``BlockSparseAttention``, for all targets.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor, replace_output
from reelforge.export.portable import DOMAIN
from reelforge.export.portable_sparse import BLOCK_SPARSE_OP, TOP_K_OP

_FLOAT, _INT32 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT32)
_INT64, _BOOL = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)
_FIRST = 3e38
"""Score of a block for itself: above all products of fp32 activations, and finite, as compilers like it."""


class DecomposeTopKAttentionPass(InPlacePass):
    """Replace ``reelforge::TopKAttention``; the new node has its name with the other operator's at the end."""

    def call(self, model: ir.Model) -> PassResult:
        """Replace every node; operands are those of ``portable_sparse.top_k_attention``."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, TOP_K_OP)]
        for node in found:
            _replace(node, model.graph)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No node that chooses is left."""
        if any((node.domain, node.op_type) == (DOMAIN, TOP_K_OP) for node in model.graph):
            raise PostconditionError(f"{TOP_K_OP} is still in the graph")


def _replace(node: ir.Node, graph: ir.Graph) -> None:
    query, key, value, gather, kept, counts = (operand for operand in node.inputs if operand is not None)
    index, start = _Choice(GraphEditor(graph, node, f"{node.name}.choice"), node, gather).lists(query, key, kept)
    name = str(node.name).replace(TOP_K_OP, BLOCK_SPARSE_OP)
    output = ir.Value(name=name, type=query.type, shape=node.outputs[0].shape)
    operands = [query, key, value, index, start, counts]
    attributes = list(node.attributes.values())
    sparse = ir.Node(DOMAIN, BLOCK_SPARSE_OP, operands, attributes, outputs=[output], name=name)
    graph.insert_before(node, sparse)
    replace_output(graph, node, output)


class _Choice:
    """Emits the choice of one attention; numbers of the graph are int64 [1] unless said."""

    def __init__(self, editor: GraphEditor, node: ir.Node, gather: ir.Value) -> None:
        self.editor = editor
        self.query_block, self.key_block = (node.attributes[name].as_int() for name in ("query_block", "key_block"))
        slots = editor.emit("Shape", [gather], kind=_INT64)
        self.queries = self._number("Div", slots, self.query_block)  # blocks of nothing but image
        self.keys = self._number("Div", slots, self.key_block)

    def lists(self, query: ir.Value, key: ir.Value, kept: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return ``block_index`` and ``block_start``."""
        edit = self.editor
        tokens, heads = (edit.emit("Shape", [query], {"start": at, "end": at + 1}, kind=_INT64) for at in (2, 1))
        blocks = self._number("Div", self._number("Add", tokens, self.query_block - 1), self.query_block)
        seen = self._number("Div", self._number("Add", tokens, self.key_block - 1), self.key_block)
        with_text = edit.emit("Sub", [blocks, self.queries], kind=_INT64)
        rows, length = self._image_rows(self._best(query, key, kept), seen, heads)
        image_entries = edit.emit("Mul", [self.queries, length], kind=_INT64)
        text_entries = edit.emit("Mul", [with_text, seen], kind=_INT64)
        text = self._repeated(self._range(seen), [heads, with_text, seen])
        entries = [
            edit.emit("Reshape", [part, self._joined(heads, count)], kind=_INT64)
            for part, count in ((rows, image_entries), (text, text_entries))
        ]
        by_head = edit.emit("Concat", entries, {"axis": 1}, kind=_INT64)
        index = edit.cast(edit.emit("Reshape", [by_head, edit.constant([-1])], kind=_INT64), _INT32)
        image_starts = edit.emit("Mul", [self._range(self.queries), length], kind=_INT64)
        text_places = edit.emit("Mul", [self._range(self._number("Add", with_text, 1)), seen], kind=_INT64)
        starts = self._joined(image_starts, edit.emit("Add", [text_places, image_entries], kind=_INT64))
        stride = edit.emit("Add", [image_entries, text_entries], kind=_INT64)
        offsets = edit.emit("Mul", [self._range(heads), stride], kind=_INT64)
        column = edit.emit("Unsqueeze", [offsets, edit.constant([1])], kind=_INT64)
        return index, edit.cast(edit.emit("Add", [column, starts], kind=_INT64), _INT32)

    def _best(self, query: ir.Value, key: ir.Value, kept: ir.Value) -> ir.Value:
        """Return the chosen key blocks of each image query block, int64 [h, queries, kept]."""
        edit = self.editor
        queries = self._pooled(query, self.queries, self.query_block)
        keys = self._pooled(key, self.keys, self.key_block)
        columns = edit.emit("Transpose", [keys], {"perm": [0, 2, 1]}, kind=_FLOAT)
        scores = edit.emit("MatMul", [queries, columns], kind=_FLOAT)
        owner = self._number("Div", self._range(self.keys), self.query_block // self.key_block)
        number = edit.emit("Unsqueeze", [self._range(self.queries), edit.constant([1])], kind=_INT64)
        own = edit.emit("Equal", [owner, number], kind=_BOOL)
        first = edit.constant([_FIRST], ir.DataType.FLOAT, scalar=True)
        ranked = edit.emit("Where", [own, first, scores], kind=_FLOAT)
        count = edit.emit("Reshape", [kept, edit.constant([1])], kind=_INT64)
        name = f"{edit.name}.TopK"
        outputs = [ir.Value(name=f"{name}.{what}", type=kind) for what, kind in (("scores", _FLOAT), ("best", _INT64))]
        top = ir.Node("", "TopK", [ranked, count], [ir.AttrInt64("axis", 2)], outputs=outputs, name=name)
        if edit.anchor is None:
            raise AssertionError("an editor that appends has nothing to choose for")
        edit.graph.insert_before(edit.anchor, top)
        return outputs[1]

    def _image_rows(self, best: ir.Value, seen: ir.Value, heads: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return lists of chosen blocks and all that have text, int64 [h, queries, length], and their length."""
        edit = self.editor
        text = edit.emit("Sub", [seen, self.keys], kind=_INT64)
        always = self._repeated(self._range(seen, self.keys), [heads, self.queries, text])
        rows = edit.emit("Concat", [best, always], {"axis": 2}, kind=_INT64)
        return rows, edit.emit("Shape", [rows], {"start": 2, "end": 3}, kind=_INT64)

    def _pooled(self, x: ir.Value, count: ir.Value, size: int) -> ir.Value:
        """Return the means of whole blocks of x [1, h, S, d], fp32 [h, count, d]."""
        edit = self.editor
        end = self._number("Mul", count, size)
        image = edit.emit("Slice", [x, edit.constant([0]), end, edit.constant([2])], kind=x.type)
        by_head = edit.cast(edit.emit("Squeeze", [image, edit.constant([0])], kind=x.type), _FLOAT)
        width = edit.emit("Shape", [x], {"start": 3, "end": 4}, kind=_INT64)
        shape = self._joined(edit.constant([0]), count, edit.constant([size]), width)
        blocks = edit.emit("Reshape", [by_head, shape], kind=_FLOAT)
        return edit.emit("ReduceMean", [blocks, edit.constant([2])], {"keepdims": 0}, kind=_FLOAT)

    def _number(self, operator: str, value: ir.Value, number: int) -> ir.Value:
        return self.editor.emit(operator, [value, self.editor.constant([number])], kind=_INT64)

    def _range(self, end: ir.Value, first: ir.Value | None = None) -> ir.Value:
        zero, one = (self.editor.constant([number], scalar=True) for number in (0, 1))
        limits = [zero if x is None else self.editor.emit("Squeeze", [x], kind=_INT64) for x in (first, end)]
        return self.editor.emit("Range", [*limits, one], kind=_INT64)

    def _joined(self, *parts: ir.Value) -> ir.Value:
        return self.editor.emit("Concat", parts, {"axis": 0}, kind=_INT64)

    def _repeated(self, row: ir.Value, shape: list[ir.Value]) -> ir.Value:
        return self.editor.emit("Expand", [row, self._joined(*shape)], kind=_INT64)
