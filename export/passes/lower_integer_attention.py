"""LowerIntegerAttentionPass: chosen attentions in 8-bit integers, made of what ONNX Runtime's CPU provider has.

Queries become uint8 around 128, keys and values int8 around zero, with calibrated scales: the pair of types that its
products are fast on. The logits come out of the product in fp32, and so does the softmax. Probabilities become uint8
with a scale per row, the row's largest over 255: a row that looks at everything, each of whose probabilities is far
below 1/255, keeps as many codes as one that looks at a single token. What is summed is multiplied by the row's scale.

Queries are taken in blocks of :data:`ROWS` by a ``Scan``, so that a block's logits are still in the processor's cache
when the softmax reads them, and no logits exist for all pairs of tokens: a block has ``heads * ROWS * tokens`` of them.
The last block is filled up with rows of zeros, which are cut off again. The pass does not know how scales were found.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from reelforge.export.passes.editing import GraphEditor, permutation_of
from reelforge.export.passes.layers import attention_nodes
from reelforge.export.passes.lower_integer_linear import CONTRIB_DOMAIN, INTEGER_PRODUCT
from reelforge.export.passes.quantise_attention import AttentionScales

ROWS = 128
"""Queries of a block; 64 and 256 were as fast within noise, all queries at once a quarter slower."""

LARGEST_CODE = 255
ZERO_POINT = 128

_BY_HEAD = [0, 2, 1, 3]
_FLOAT, _UINT8, _INT8 = (ir.TensorType(kind) for kind in (ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8))


class LowerIntegerAttentionPass(InPlacePass):
    """Replace ``attentions`` by integer products around a softmax.

    Args:
        attentions: Scales by the attention's name, for codes from -127 to 127; every one must be in the graph, in fp32,
            without a mask, and over ``[B, h, S, d]`` with fixed ``h`` and ``d``.
    """

    def __init__(self, attentions: Mapping[str, AttentionScales]) -> None:
        super().__init__()
        self.attentions = attentions

    def requires(self, model: ir.Model) -> None:
        """Every attention is in the graph, and is one that the products compute."""
        found = attention_nodes(model.graph)
        missing = sorted(set(self.attentions) - set(found))
        if missing:
            raise PreconditionError(f"{model.graph.name} has no attentions {', '.join(missing[:5])}")
        for name in self.attentions:
            reason = _refused(found[name])
            if reason is not None:
                raise PreconditionError(f"{name} cannot be computed in integers: {reason}")

    def call(self, model: ir.Model) -> PassResult:
        """Lower each attention."""
        found = attention_nodes(model.graph)
        for name, scales in self.attentions.items():
            _lower(model.graph, found[name], scales)
        if self.attentions:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return PassResult(model, modified=bool(self.attentions))

    def ensures(self, model: ir.Model) -> None:
        """None of them is left in high precision."""
        left = sorted(set(self.attentions) & set(attention_nodes(model.graph)))
        if left:
            raise PostconditionError(f"{', '.join(left)} are still computed in high precision")


def _refused(node: ir.Node) -> str | None:
    """Return why the products cannot stand for a node."""
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) != 1:
        return "it has a mask, key lengths or a cache"
    if any(node.attributes[name].as_int() for name in ("is_causal",) if name in node.attributes):
        return "it is causal"
    if "softcap" in node.attributes and node.attributes["softcap"].as_float():
        return "its logits are capped"
    for value in node.inputs[:3]:
        if value is None or value.shape is None or len(value.shape) != 4 or value.dtype != ir.DataType.FLOAT:
            return "an operand is not fp32 by batch, heads, tokens and channels"
        if not isinstance(value.shape[1], int) or not isinstance(value.shape[3], int):
            return "heads and channels are not fixed"
    heads, widths = ({value.shape[axis] for value in node.inputs[:3]} for axis in (1, 3))  # type: ignore[union-attr,index]
    return None if len(heads) == len(widths) == 1 else "queries, keys and values differ in heads or channels"


def _lower(graph: ir.Graph, node: ir.Node, scales: AttentionScales) -> None:
    query, key, value = (operand for operand in node.inputs[:3] if operand is not None)
    shape = query.shape
    if shape is None:
        raise AssertionError(f"{node.name} has a query without a shape")
    heads, width = int(shape[1]), int(shape[3])  # type: ignore[arg-type]
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else width**-0.5
    last = _restored(node)
    editor = GraphEditor(graph, last or node, str(node.name))
    codes = [
        _codes(editor, operand, number, kind)
        for operand, number, kind in (
            (query, scales.query, _UINT8),
            (key, scales.key, _INT8),
            (value, scales.value, _INT8),
        )
    ]
    keys = editor.emit("Transpose", [codes[1]], {"perm": [0, 2, 3, 1]}, kind=_INT8)
    values = editor.emit("Transpose", [codes[2]], {"perm": _BY_HEAD}, kind=_INT8)

    tokens = editor.emit("Shape", [codes[0]], {"start": 1, "end": 2})
    key_count = editor.emit("Shape", [codes[1]], {"start": 1, "end": 2})
    first, axis = editor.constant([0]), editor.constant([1])
    missing = editor.emit("Mod", [editor.emit("Neg", [tokens]), editor.constant([ROWS])])
    padding = editor.emit("Concat", [first, missing], {"axis": 0})
    filled = editor.emit(
        "Pad", [codes[0], padding, editor.constant([ZERO_POINT], ir.DataType.UINT8, scalar=True), axis], kind=_UINT8
    )
    blocks = editor.emit("Reshape", [filled, editor.constant([0, -1, ROWS, heads, width])], kind=_UINT8)
    by_block = editor.emit("Transpose", [blocks], {"perm": [1, 0, 3, 2, 4]}, kind=_UINT8)

    flat = editor.emit("Concat", [editor.constant([-1]), key_count], {"axis": 0})
    by_row = editor.emit("Concat", [editor.constant([-1, heads, ROWS]), key_count], {"axis": 0})
    body = _body(editor, keys, values, (flat, by_row), (scales.query * scale, scales.key, scales.value))
    attended = editor.emit("Scan", [by_block], {"body": body, "num_scan_inputs": 1}, kind=_FLOAT)
    in_order = editor.emit("Transpose", [attended], {"perm": [1, 0, 3, 2, 4]}, kind=_FLOAT)
    joined = editor.emit("Reshape", [in_order, editor.constant([0, -1, heads, width])], kind=_FLOAT)
    result = editor.emit("Slice", [joined, first, tokens, axis], kind=_FLOAT)
    if last is None:
        result = editor.emit("Transpose", [result], {"perm": _BY_HEAD}, kind=_FLOAT)
    editor.replace(result)
    if last is not None:
        graph.remove(node, safe=True)


def _body(
    outer: GraphEditor,
    keys: ir.Value,
    values: ir.Value,
    shapes: tuple[ir.Value, ir.Value],
    scales: tuple[float, float, float],
) -> ir.Graph:
    """One block: queries ``[B, h, ROWS, d]`` against keys ``[B, h, d, S]`` and values ``[B, h, S, d]``.

    Args:
        outer: Of the graph that the block belongs to.
        keys: Codes.
        values: Codes.
        shapes: Of probabilities: ``[B * h * ROWS, S]``, since scales per row want rows on the first axis, and back.
        scales: Of queries with the softmax's factor, of keys, of values.
    """
    queries = ir.Value(name=f"{outer.name}.block", type=_UINT8)
    body = ir.Graph([queries], [], nodes=[], name=f"{outer.name}.body")
    inner = GraphEditor(body, None, f"{outer.name}.body")

    def number(value: float) -> ir.Value:
        return outer.constant([value], ir.DataType.FLOAT, scalar=True)

    def product(left: ir.Value, right: ir.Value, scale: ir.Value, right_scale: ir.Value, zero_point: int) -> ir.Value:
        zero_points = [
            outer.constant([zero_point], ir.DataType.UINT8, scalar=True),
            outer.constant([0], ir.DataType.INT8, scalar=True),
        ]
        operands = [left, right, scale, right_scale, *zero_points]
        return inner.emit(INTEGER_PRODUCT, operands, kind=_FLOAT, domain=CONTRIB_DOMAIN)

    logits = product(queries, keys, number(scales[0]), number(scales[1]), ZERO_POINT)
    probabilities = inner.emit("Softmax", [logits], {"axis": -1}, kind=_FLOAT)
    largest = inner.emit("ReduceMax", [probabilities, outer.constant([-1])], {"keepdims": 1}, kind=_FLOAT)
    row_scales = inner.emit("Mul", [largest, number(1 / LARGEST_CODE)], kind=_FLOAT)
    rows = inner.emit("Reshape", [probabilities, shapes[0]], kind=_FLOAT)
    per_row = inner.emit("Reshape", [row_scales, outer.constant([-1])], kind=_FLOAT)
    row_codes = inner.emit("QuantizeLinear", [rows, per_row], {"axis": 0}, kind=_UINT8)
    codes = inner.emit("Reshape", [row_codes, shapes[1]], kind=_UINT8)
    sums = product(codes, values, number(1.0), number(scales[2]), 0)
    body.outputs.append(inner.emit("Mul", [sums, row_scales], kind=_FLOAT))
    return body


def _codes(editor: GraphEditor, operand: ir.Value, scale: float, kind: ir.TensorType) -> ir.Value:
    """Return the codes of ``operand`` as ``[B, S, h, d]``: what is transposed afterwards is a quarter as large."""
    producer = operand.producer()
    tokens_first = operand
    if producer is not None and producer.op_type == "Transpose":
        source = producer.inputs[0]
        if source is not None and permutation_of(producer) == _BY_HEAD:
            tokens_first = source
    zero = ZERO_POINT if kind is _UINT8 else 0
    pair = [
        editor.constant([scale], ir.DataType.FLOAT, scalar=True),
        editor.constant([zero], kind.dtype, scalar=True),
    ]
    codes = editor.emit("QuantizeLinear", [tokens_first, *pair], kind=kind)
    return codes if tokens_first is not operand else editor.emit("Transpose", [codes], {"perm": _BY_HEAD}, kind=kind)


def _restored(node: ir.Node) -> ir.Node | None:
    """Return the transpose to ``[B, S, h, d]`` that alone reads a node's output, if there is one."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or uses[0].node.op_type != "Transpose":
        return None
    return uses[0].node if permutation_of(uses[0].node) == _BY_HEAD else None
