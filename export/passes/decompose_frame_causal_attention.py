"""DecomposeFrameCausalAttentionPass: the VAE's attention as two products around a masked softmax, without control flow.

For compilers that have no fused kernel for one head of 512 channels, and no loop worth having. Logits are computed in
fp32, whose products of half-precision operands are exact also where a GPU rounds fp32 operands to TF32; a GPU without
fp32 products takes them in the operands' type. The softmax is in fp32 either way, probabilities and their product with
the values in the operands' type. The mask is [T, 1, T, 1], one entry per pair of frames.

The cost: all S x S logits exist at once (``S = T * P``), 4 bytes each and 2 for the probabilities. The largest tile
of the original tiling, 17 frames of 32 x 32, takes 1.8 GB, less than the activations of the decoder's last level. Half
of the arithmetic is masked away. The pass does not know tile sizes: frames and positions are read from the query.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor
from reelforge.export.portable import DOMAIN, FRAME_CAUSAL_OP

MASKED = -1e30
"""Added to a logit that must not count: its exponential is exactly zero, and no infinity enters the arithmetic."""

_FLOAT = ir.TensorType(ir.DataType.FLOAT)


class DecomposeFrameCausalAttentionPass(InPlacePass):
    """Replace ``reelforge::FrameCausalAttention`` by ``MatMul``, ``Softmax`` and ``MatMul``.

    Args:
        logits: Type that queries and keys are multiplied in; None for their own.
    """

    def __init__(self, logits: ir.DataType | None = ir.DataType.FLOAT) -> None:
        super().__init__()
        self.logits = logits

    def call(self, model: ir.Model) -> PassResult:
        """Lower every node; q, k, v are [B, T, P, D] with a fixed D."""
        found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, FRAME_CAUSAL_OP)]
        for node in found:
            _lower(node, model.graph, self.logits)
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No portable node is left."""
        if any((node.domain, node.op_type) == (DOMAIN, FRAME_CAUSAL_OP) for node in model.graph):
            raise PostconditionError(f"{FRAME_CAUSAL_OP} is still in the graph")


def _lower(node: ir.Node, graph: ir.Graph, logits_type: ir.DataType | None) -> None:
    query, key, value = (operand for operand in node.inputs if operand is not None)
    width = None if query.shape is None else query.shape[3]
    if not isinstance(width, int) or query.type is None:
        raise AssertionError(f"{node.name}: type or channel count of the query is not fixed")
    kind = query.type
    exact = ir.TensorType(logits_type or kind.dtype)
    editor = GraphEditor(graph, node)
    tokens = editor.constant([0, -1, width])
    q, k, v = (editor.emit("Reshape", [operand, tokens], kind=kind) for operand in (query, key, value))
    # A power of two goes in before, so that sums over the channels fit fp16; the rest of 1 / sqrt(D) behind, in fp32.
    before = 2.0 ** -round(math.log2(width) / 2)
    scaled = editor.emit("Mul", [editor.cast(q, exact), _number(editor, before, exact)], kind=exact)
    columns = editor.emit("Transpose", [editor.cast(k, exact)], {"perm": [0, 2, 1]}, kind=exact)
    products = editor.emit("MatMul", [scaled, columns], kind=exact)
    rest = _number(editor, width**-0.5 / before, _FLOAT)
    logits = editor.emit("Mul", [editor.cast(products, _FLOAT), rest], kind=_FLOAT)
    sizes = [editor.emit("Shape", [query], {"start": axis, "end": axis + 1}) for axis in range(3)]
    by_frame = editor.emit("Concat", [*sizes, *sizes[1:]], {"axis": 0})
    framed = editor.emit("Reshape", [logits, by_frame], kind=_FLOAT)
    masked = editor.emit("Add", [framed, _mask(editor, sizes[1])], kind=_FLOAT)
    flat = editor.emit("Reshape", [masked, editor.emit("Shape", [products])], kind=_FLOAT)
    probabilities = editor.cast(editor.emit("Softmax", [flat], {"axis": -1}, kind=_FLOAT), kind)
    attended = editor.emit("MatMul", [probabilities, v], kind=kind)
    editor.replace(editor.emit("Reshape", [attended, editor.emit("Shape", [query])], kind=kind))


def _number(editor: GraphEditor, number: float, kind: ir.TypeProtocol) -> ir.Value:
    return editor.constant([number], kind.dtype, scalar=True)


def _mask(editor: GraphEditor, frames: ir.Value) -> ir.Value:
    """Return fp32 [T, 1, T, 1]: 0 where the key's frame is not after the query's, else :data:`MASKED`."""
    first, step = (editor.constant([number], scalar=True) for number in (0, 1))
    index = editor.emit("Range", [first, editor.emit("Squeeze", [frames]), step])
    query = editor.emit("Unsqueeze", [index, editor.constant([1, 2, 3])])
    key = editor.emit("Unsqueeze", [index, editor.constant([1])])
    visible = editor.emit("GreaterOrEqual", [query, key])
    zero, masked = (_number(editor, number, _FLOAT) for number in (0.0, MASKED))
    return editor.emit("Where", [visible, zero, masked], kind=_FLOAT)
