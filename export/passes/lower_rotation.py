"""LowerRotationPass: the rotation of queries and keys in halves becomes one ``RotaryEmbedding``.

``(a, b) -> (a cos - b sin, b cos + a sin)`` is captured as a split, four products, a difference, a sum and a
concatenation; ONNX Runtime computes the operator of opset 23 in one pass over the tensor. It wants tokens before heads
flattened, ``[B, S, h * d]``, and tables ``[B, S, d/2]``: here with one video per call. What does not match carries its
reason in ``refused`` and stays as it is. The pass does not know what the tables hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from reelforge.export.passes.attention_pattern import UnmatchedError, rotation_of
from reelforge.export.passes.editing import GraphEditor
from reelforge.export.passes.lowering import LoweringPass

ROTATION = "RotaryEmbedding"


class LowerRotationPass(LoweringPass["_Rotated"]):
    """Replace rotations of ``[1, S, h, d]`` by ``RotaryEmbedding``."""

    left = "still rotates in pieces"

    def concerns(self, node: ir.Node) -> bool:
        """See :class:`LoweringPass`."""
        return node.op_type == "Concat" and len(node.inputs) == 2

    def find(self, node: ir.Node) -> _Rotated | str:
        """See :class:`LoweringPass`."""
        return _rotated(node)

    def lower(self, graph: ir.Graph, node: ir.Node, found: _Rotated) -> None:
        """See :class:`LoweringPass`."""
        _lower(graph, node, found)


@dataclass(frozen=True)
class _Rotated:
    """What is rotated, ``[1, S, heads, channels]``, and the tables ``[S, channels / 2]``."""

    value: ir.Value
    cos: ir.Value
    sin: ir.Value
    heads: int
    channels: int


def _rotated(node: ir.Node) -> _Rotated | str:
    """Return what a concatenation rotates; or why it is left alone."""
    try:
        value, cos, sin = rotation_of(node.outputs[0], "it")
    except UnmatchedError as error:
        return str(error)
    sizes = [] if value.shape is None else list(value.shape)
    if len(sizes) != 4 or sizes[0] != 1:
        return f"{sizes} is not one video's tokens, heads and channels"
    heads, channels = sizes[2:]
    if not isinstance(heads, int) or not isinstance(channels, int):
        return "heads and channels are not fixed"
    if value.dtype != ir.DataType.FLOAT:
        return "it is not in fp32"
    return _Rotated(value, cos, sin, heads, channels)


def _lower(graph: ir.Graph, node: ir.Node, found: _Rotated) -> None:
    editor = GraphEditor(graph, node, f"{node.name}.rotation")
    kind = found.value.type
    # Every rotation gets tables of its own here: equal expressions are merged at the end of the list of passes.
    tables = [editor.emit("Unsqueeze", [table, editor.constant([0])], kind=kind) for table in (found.cos, found.sin)]
    flat = editor.emit("Reshape", [found.value, editor.constant([1, -1, found.heads * found.channels])], kind=kind)
    rotated = editor.emit(ROTATION, [flat, *tables], {"num_heads": found.heads}, kind=kind)
    editor.replace(editor.emit("Reshape", [rotated, editor.constant([1, -1, found.heads, found.channels])], kind=kind))
