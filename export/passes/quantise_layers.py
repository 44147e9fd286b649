"""QuantiseLayersPass: chosen layers read an 8-bit activation and an 8-bit stored weight.

``x -> QuantizeLinear -> DequantizeLinear -> layer`` with one scale per tensor, and ``codes -> DequantizeLinear ->
layer`` with one scale per output channel: the form that backends fuse to 8-bit products. (For ONNX Runtime's CPU
provider ``LowerIntegerLinearPass`` and ``LowerIntegerConvolutionPass`` do it.) The bias of a ``Gemm`` on uint8
is added behind it: without a third input ONNX Runtime fuses ``QGemm``, and with a float bias inside it would compute in
fp32 on dequantised weights. Scales are fp32 whatever the layer computes in; what is dequantised has the layer's type.

The target says which codes the input of an INT8 layer gets. GPUs want int8 around zero. ONNX Runtime's CPU provider has
fast products for uint8 only: version 1.31 makes uint8 of an int8 activation by itself where one product reads it, and
computes slower than fp32 where several do (q, k and v of a block). A zero point costs it nothing, and behind a GELU,
whose values end at -0.17, it doubles the codes in use. The pass does not know how scales or codes were made.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from reelforge.calibration.number_formats import unsigned_codes
from reelforge.export.passes.editing import GraphEditor, output_type
from reelforge.export.passes.layers import Layer, weighted_layers

CODE_TYPES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)


class IntegerInputs(enum.Enum):
    """The codes of an INT8 layer's input."""

    SIGNED = "int8 around zero"
    UNSIGNED = "uint8 with a zero point"


@dataclass(frozen=True)
class ActivationScales:
    """How a layer's input may be quantised.

    Attributes:
        scale: With a zero point of zero.
        range: The lowest and the highest value that codes with another zero point stand for; None for FP8.
    """

    scale: float
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class QuantisedLayer:
    """What one layer becomes.

    Attributes:
        codes: The weight in 8 bits, shaped as before: int8 or float8_e4m3fn.
        weight_scale: fp32 ``[out]``.
        activation: How the layer's input may be quantised.
        output_range: Of an INT8 convolution, the lowest and the highest value that codes of its output stand for; None
            if they are not known.
    """

    codes: ir.TensorProtocol
    weight_scale: ir.TensorProtocol
    activation: ActivationScales
    output_range: tuple[float, float] | None = None


class QuantiseLayersPass(InPlacePass):
    """Insert the Q/DQ pairs of ``layers`` and let their weights be stored codes.

    Args:
        layers: By layer name; every one must be in the graph.
        inputs: What the target wants INT8 layers to read.
    """

    def __init__(self, layers: Mapping[str, QuantisedLayer], inputs: IntegerInputs) -> None:
        super().__init__()
        self.layers = layers
        self.inputs = inputs

    def requires(self, model: ir.Model) -> None:
        """Every layer to quantise is in the graph."""
        missing = sorted(set(self.layers) - set(weighted_layers(model.graph)))
        if missing:
            raise PreconditionError(f"{model.graph.name} has no layers {', '.join(missing[:5])}")

    def call(self, model: ir.Model) -> PassResult:
        """Quantise each layer."""
        found = weighted_layers(model.graph)
        for name, quantised in self.layers.items():
            _quantise(model.graph, found[name], quantised, self.inputs)
        return PassResult(model, modified=bool(self.layers))

    def ensures(self, model: ir.Model) -> None:
        """Each layer's two operands are dequantised."""
        for node in model.graph:
            if node.name in self.layers and node.op_type in ("Gemm", "Conv"):
                for operand in node.inputs[:2]:
                    producer = None if operand is None else operand.producer()
                    if producer is None or producer.op_type != "DequantizeLinear":
                        raise PostconditionError(f"{node.name} has an operand in high precision")


def _quantise(graph: ir.Graph, layer: Layer, quantised: QuantisedLayer, inputs: IntegerInputs) -> None:
    old = layer.node
    editor = GraphEditor(graph, old, layer.name)
    kind = quantised.codes.dtype
    if kind not in CODE_TYPES:
        raise AssertionError(f"{layer.name}: codes of type {kind}")
    input_kind, (scale, zero_point) = kind, (quantised.activation.scale, 0)
    if kind == ir.DataType.INT8 and inputs is IntegerInputs.UNSIGNED:
        if quantised.activation.range is None:
            raise AssertionError(f"{layer.name}: an INT8 layer without the range of its input")
        input_kind, (scale, zero_point) = ir.DataType.UINT8, unsigned_codes(*quantised.activation.range)
    pair = (
        editor.constant([scale], ir.DataType.FLOAT, scalar=True),
        editor.constant([zero_point], input_kind, scalar=True),
    )
    shape = _sizes(layer.activation)
    exact = editor.cast(layer.activation, ir.TensorType(ir.DataType.FLOAT))  # ONNX Runtime wants the scale's type
    eight_bits = editor.emit("QuantizeLinear", [exact, *pair], kind=ir.TensorType(input_kind), shape=shape)
    base = layer.activation.type
    activation = editor.emit("DequantizeLinear", [eight_bits, *pair], output_type(base), kind=base, shape=shape)
    weight_name = str(layer.weight.name)
    _forget_weight(graph, layer)
    codes = _stored(graph, weight_name, quantised.codes)
    scales = _stored(graph, f"{weight_name}.scale", quantised.weight_scale)
    weight = editor.emit(
        "DequantizeLinear",
        [codes, scales, _zeros(graph, quantised.weight_scale.shape.numpy()[0], kind)],
        {"axis": 0, **output_type(base)},
        kind=base,
        shape=quantised.codes.shape.numpy(),
        name=f"{layer.name}.weight.DequantizeLinear",
    )
    inside = old.op_type == "Conv" or input_kind != ir.DataType.UINT8
    bias_inside = [layer.bias] if layer.bias is not None and inside else []
    result = ir.Value(name=layer.name, type=old.outputs[0].type, shape=old.outputs[0].shape)
    output_name = old.outputs[0].name
    old.outputs[0].name = f"{layer.name}.replaced"
    node = ir.Node(
        "", old.op_type, [activation, weight, *bias_inside], old.attributes.values(), outputs=[result], name=layer.name
    )
    graph.insert_before(old, node)
    if layer.bias is not None and not bias_inside:
        result = editor.emit("Add", [result, layer.bias], kind=result.type, shape=_sizes(result))
    editor.replace(result)
    if result.is_graph_output():
        result.name = output_name


def _forget_weight(graph: ir.Graph, layer: Layer) -> None:
    """Remove the float weight and its cast; only this layer uses them."""
    cast = layer.node.inputs[1]
    layer.node.replace_input_with(1, None)
    producer = None if cast is None else cast.producer()
    if producer is not None:
        graph.remove(producer, safe=True)
    graph.initializers.pop(str(layer.weight.name))


def _stored(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _zeros(graph: ir.Graph, channels: int, kind: ir.DataType) -> ir.Value:
    """Return the zero points of ``channels`` channels; ONNX Runtime fuses no pair that leaves them out."""
    name = f"constant.{kind.name.lower()}.zeros.{channels}"
    if name not in graph.initializers:
        _stored(graph, name, ir.tensor(np.zeros(channels, kind.numpy()), dtype=kind, name=name))
    return graph.initializers[name]


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
