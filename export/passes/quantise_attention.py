"""QuantiseAttentionPass: queries, keys and values of chosen attentions go through FP8 (E4M3), one scale per tensor.

``q, k, v -> QuantizeLinear -> DequantizeLinear -> Attention``. The softmax's output cannot be reached from outside the
node: a backend whose kernel keeps probabilities in FP8 is told the scale :data:`SOFTMAX_SCALE` when it is built, and
one that has no such kernel (ONNX Runtime's CPU provider) keeps them in fp32, so its numbers show what quantising the
three inputs costs and not more. The pass does not know how scales were found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from reelforge.export.passes.editing import GraphEditor, output_type
from reelforge.export.passes.layers import attention_nodes
from reelforge.runtime.recipe import Precision

_FLOAT = ir.TensorType(ir.DataType.FLOAT)

SOFTMAX_SCALE = 1.0 / 448.0
"""Of the probabilities in E4M3: none exceeds 1, and 1 becomes the format's largest value. Needs no observation."""


@dataclass(frozen=True)
class AttentionScales:
    """Scales of one attention's inputs, as the node sees them: normalised and rotated.

    Attributes:
        query: Of the queries.
        key: Of the keys.
        value: Of the values.
        precision: What the scales are for: FP8, which this pass is about, or INT8, see ``lower_integer_attention``.
    """

    query: float
    key: float
    value: float
    precision: Precision = Precision.FP8


class QuantiseAttentionPass(InPlacePass):
    """Insert the Q/DQ pairs of the inputs of ``attentions``.

    Args:
        attentions: Scales for FP8 by the attention's name; every one must be in the graph.
    """

    def __init__(self, attentions: Mapping[str, AttentionScales]) -> None:
        super().__init__()
        self.attentions = attentions

    def requires(self, model: ir.Model) -> None:
        """Every attention to quantise is in the graph, and its scales are for FP8."""
        others = sorted(name for name, scales in self.attentions.items() if scales.precision is not Precision.FP8)
        if others:
            raise PreconditionError(f"the scales of {', '.join(others[:5])} are for other codes than FP8's")
        missing = sorted(set(self.attentions) - set(attention_nodes(model.graph)))
        if missing:
            raise PreconditionError(f"{model.graph.name} has no attentions {', '.join(missing[:5])}")

    def call(self, model: ir.Model) -> PassResult:
        """Quantise each attention's inputs."""
        found = attention_nodes(model.graph)
        for name, scales in self.attentions.items():
            node = found[name]
            for index, (operand, scale) in enumerate(
                (("query", scales.query), ("key", scales.key), ("value", scales.value))
            ):
                value = node.inputs[index]
                if value is None:
                    raise AssertionError(f"{name} has no {operand}")
                editor = GraphEditor(model.graph, node, f"{name}.{operand}")
                pair = (
                    editor.constant([scale], ir.DataType.FLOAT, scalar=True),
                    editor.constant([0], ir.DataType.FLOAT8E4M3FN, scalar=True),
                )
                kind = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
                codes = editor.emit("QuantizeLinear", [editor.cast(value, _FLOAT), *pair], kind=kind)
                numbers = editor.emit("DequantizeLinear", [codes, *pair], output_type(value.type), kind=value.type)
                codes.shape = numbers.shape = value.shape
                node.replace_input_with(index, numbers)
        return PassResult(model, modified=bool(self.attentions))

    def ensures(self, model: ir.Model) -> None:
        """The three inputs of each attention are dequantised."""
        found = attention_nodes(model.graph)
        for name in self.attentions:
            for value in found[name].inputs[:3]:
                producer = None if value is None else value.producer()
                if producer is None or producer.op_type != "DequantizeLinear":
                    raise PostconditionError(f"{name} has an input in high precision")
