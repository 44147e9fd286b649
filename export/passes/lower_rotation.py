"""LowerRotationPass: the rotation of queries and keys in halves becomes one ``RotaryEmbedding``.

``(a, b) -> (a cos - b sin, b cos + a sin)`` is captured as a split, four products, a difference, a sum and a
concatenation; ONNX Runtime computes the operator of opset 23 in one pass over the tensor. It wants tokens before heads
flattened, ``[B, S, h * d]``, and tables ``[B, S, d/2]``: here with one video per call. What does not match carries its
reason in ``refused`` and stays as it is. The pass does not know what the tables hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.attention_pattern import UnmatchedError, rotation_of
from reelforge.export.passes.editing import GraphEditor

ROTATION = "RotaryEmbedding"


class LowerRotationPass(InPlacePass):
    """Replace rotations of ``[1, S, h, d]`` by ``RotaryEmbedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Lower each rotation."""
        lowered = 0
        for node in list(model.graph):
            if node.op_type == "Concat" and len(node.inputs) == 2:
                found = _rotated(node)
                if isinstance(found, str):
                    self.refused[node.name or ""] = found
                    continue
                _lower(model.graph, node, found)
                lowered += 1
        return PassResult(model, modified=bool(lowered))

    def ensures(self, model: ir.Model) -> None:
        """No rotation is left that could be one operator."""
        for node in model.graph:
            if node.op_type == "Concat" and len(node.inputs) == 2 and not isinstance(_rotated(node), str):
                raise PostconditionError(f"{node.name} still rotates in pieces")


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
