"""What a quantised layer multiplies: its operands in a graph, before they are dequantised.

``QuantizeLinear -> DequantizeLinear -> layer <- DequantizeLinear <- codes`` is how ``QuantiseLayersPass`` leaves a
layer; passes that lower such layers to ONNX Runtime's integer operators read it here, and have the same duty: what was
asked to be in INT8 does not stay behind. The module does not know the operators.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.lowering import LoweringPass


@dataclass(frozen=True)
class QuantisedOperands:
    """The operands of one layer with uint8 activations and int8 stored weights.

    Attributes:
        values: The activation in high precision.
        value_codes: Made of it, uint8.
        value_scale: One number.
        value_zero_point: One number.
        codes: The weight's, ``[out, in, ...]`` int8.
        weight_scale: ``[out]``.
    """

    values: ir.Value
    value_codes: ir.Value
    value_scale: ir.Value
    value_zero_point: ir.Value
    codes: ir.Value
    weight_scale: ir.Value


class LowerQuantisedPass(LoweringPass[QuantisedOperands]):
    """Replace layers by operators that multiply their codes.

    Args:
        layers: Names of those that must not stay: what was asked to be in INT8.
    """

    def __init__(self, layers: Collection[str] = ()) -> None:
        super().__init__()
        self.layers = layers

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left that could be lowered, and none of the layers at all."""
        super().ensures(model)
        for node in model.graph:
            name = node.name or ""
            if self.concerns(node) and name in self.layers:
                raise PostconditionError(f"{name} {self.left}: {self.refused.get(name, 'it was not seen')}")


def reads_codes(node: ir.Node) -> bool:
    """Whether both operands of a layer are dequantised."""
    producers = [None if value is None else value.producer() for value in node.inputs[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def quantised_operands(node: ir.Node) -> QuantisedOperands | str:
    """Return what a layer multiplies, or why it is none of uint8 with int8 codes that are stored."""
    activation, weight = (None if value is None else value.producer() for value in node.inputs[:2])
    if activation is None or weight is None or not reads_codes(node):
        return "an operand is in high precision"
    if node.outputs[0].dtype != ir.DataType.FLOAT:
        return "it is not computed in fp32"
    codes, scale = weight.inputs[0], weight.inputs[1]
    if codes is None or scale is None or codes.dtype != ir.DataType.INT8 or not codes.is_initializer():
        return "the weight is not stored in int8"
    axis = weight.attributes.get("axis")  # without one it is the last axis
    per_channel = axis is not None and axis.as_int() == 0
    if not per_channel or codes.shape is None or scale.shape is None or list(scale.shape) != list(codes.shape)[:1]:
        return "the weight has no scale per output channel"
    if not _is_zero(weight.inputs[2] if len(weight.inputs) > 2 else None):
        return "the weight has a zero point"
    value_codes = activation.inputs[0]
    quantise = None if value_codes is None else value_codes.producer()
    if value_codes is None or quantise is None or quantise.op_type != "QuantizeLinear":
        return "the activation is not quantised in the graph"
    if value_codes.dtype != ir.DataType.UINT8 or quantise.attributes or len(quantise.inputs) != 3:
        return "the activation is not quantised to uint8"
    if quantise.inputs[1:] != activation.inputs[1:]:
        return "the activation is dequantised with another scale"
    values, value_scale, value_zero_point = quantise.inputs
    if values is None or value_scale is None or value_zero_point is None:
        return "the activation has no scale"
    if value_scale.shape is None or len(value_scale.shape):
        return "the activation has more than one scale"
    return QuantisedOperands(values, value_codes, value_scale, value_zero_point, codes, scale)


def _is_zero(value: ir.Value | None) -> bool:
    return value is None or (value.const_value is not None and not np.any(value.const_value.numpy()))
