"""Which values of a stage's graph are observed: inputs of chosen layers, outputs of convolutions, attention's operands.

Layers that read one value (q, k and v of a block) share one observation, and so does the convolution that makes it. A
convolution's input is observed as it reads, after its padding. The softmax's output is not observed: a probability is
at most 1, and its scale is that of 1. The module runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.observe import ChannelLayout, ObservedTensor
from reelforge.calibration.rules import FoldKind, SmoothingGroup
from reelforge.calibration.scale_file import ScaleKind
from reelforge.export.passes.layers import Layer, attention_nodes, weighted_layers

OPERANDS = (ScaleKind.QUERY, ScaleKind.KEY, ScaleKind.VALUE)

_REARRANGING = ("Cast", "Identity", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class ObservedValue:
    """A value of a graph and what it is for calibration.

    Attributes:
        value: The value.
        tensor: What is observed.
        layers: All layers that read it; one attention for its operands; none for what is only an output.
        outputs_of: The one convolution whose output it is, if codes of that are wanted; else none.
    """

    value: ir.Value
    tensor: ObservedTensor
    layers: tuple[str, ...]
    outputs_of: tuple[str, ...] = ()


def observed_values(
    graph: ir.Graph,
    stage: str,
    layers: Collection[str],
    attention: Collection[str] = (),
    outputs: Collection[str] = (),
) -> tuple[ObservedValue, ...]:
    """Return what to observe in the graph of ``stage``, in execution order.

    Args:
        graph: A lowered graph in high precision.
        stage: Its stage.
        layers: Names of the layers whose inputs are quantised.
        attention: Names of the attentions whose operands are, as :func:`attention_nodes` gives them.
        outputs: Names of those layers of which, if they are convolutions, the output is observed, too.

    Raises:
        CalibrationError: If the graph lacks one of them.
    """
    found = weighted_layers(graph)
    nodes = attention_nodes(graph)
    _require(stage, "layers", layers, found)
    _require(stage, "attentions", attention, nodes)
    readers: dict[ir.Value, list[Layer]] = {}
    for name, layer in found.items():
        if name in layers:
            readers.setdefault(layer.activation, []).append(layer)
    observed = [_of_layers(stage, value, reading) for value, reading in readers.items()]
    for name, node in nodes.items():
        if name in attention:
            observed += [
                _of_attention(stage, name, kind, value)
                for kind, value in zip(OPERANDS, node.inputs, strict=False)
                if value is not None
            ]
    observed = _with_outputs(stage, observed, [layer for name, layer in found.items() if name in outputs])
    order = {value: index for index, value in enumerate(value for node in graph for value in node.outputs)}
    return tuple(sorted(observed, key=lambda item: order.get(item.value, -1)))


def smoothed_attentions(graph: ir.Graph, group: SmoothingGroup) -> set[str]:
    """Return the attentions whose values arrive divided by the group's factors.

    That is so where the group's layers read an attention's output and the factors are folded into the layers that
    compute its values: mixing tokens keeps channels apart.
    """
    if not any(fold.kind is FoldKind.AFFINE and fold.stage == group.stage for fold in group.folds):
        return set()
    layers = weighted_layers(graph)
    names = {node: name for name, node in attention_nodes(graph).items()}
    sources = (_rearranged_from(layers[layer].activation) for layer in group.layers if layer in layers)
    return {names[node] for node in sources if node is not None and node in names}


def _of_layers(stage: str, value: ir.Value, layers: list[Layer]) -> ObservedValue:
    first = layers[0]
    layout = ChannelLayout.SECOND if first.node.op_type == "Conv" else ChannelLayout.LAST
    if first.weight.shape is None or any(layer.weight.shape is None for layer in layers):
        raise AssertionError(f"the weight of {first.name} has no shape")
    channels = first.weight.shape.numpy()[1]
    tensor = ObservedTensor(stage, first.name, ScaleKind.ACTIVATION, channels, layout)
    return ObservedValue(value, tensor, tuple(layer.name for layer in layers))


def _with_outputs(stage: str, observed: list[ObservedValue], layers: list[Layer]) -> list[ObservedValue]:
    """Add the outputs of convolutions among ``layers``; what is observed already is observed once."""
    convolutions = {layer.node.outputs[0]: layer for layer in layers if layer.node.op_type == "Conv"}
    result = []
    for item in observed:
        made_by = convolutions.pop(item.value, None)
        result.append(item if made_by is None else replace(item, outputs_of=(made_by.name,)))
    for value, layer in convolutions.items():
        if layer.weight.shape is None:
            raise AssertionError(f"the weight of {layer.name} has no shape")
        channels = layer.weight.shape.numpy()[0]
        tensor = ObservedTensor(stage, layer.name, ScaleKind.OUTPUT, channels, ChannelLayout.SECOND)
        result.append(ObservedValue(value, tensor, (), (layer.name,)))
    return result


def _of_attention(stage: str, name: str, kind: ScaleKind, value: ir.Value) -> ObservedValue:
    sizes = [] if value.shape is None else list(value.shape)
    if len(sizes) == 4 and isinstance(sizes[1], int) and isinstance(sizes[3], int):
        tensor = ObservedTensor(stage, name, kind, sizes[1] * sizes[3], ChannelLayout.HEADS)
    elif len(sizes) == 3 and isinstance(sizes[2], int):
        tensor = ObservedTensor(stage, name, kind, sizes[2], ChannelLayout.LAST)
    else:
        raise AssertionError(f"the {kind.value} of {name} has the shape {sizes}")
    return ObservedValue(value, tensor, (name,))


def _rearranged_from(value: ir.Value) -> ir.Node | None:
    """Return the node that computed what only was rearranged on its way to ``value``."""
    node = value.producer()
    while node is not None and node.op_type in _REARRANGING and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _require(stage: str, what: str, wanted: Collection[str], found: Iterable[str]) -> None:
    known = list(found)
    missing = sorted(set(wanted) - set(known))
    if missing:
        raise CalibrationError(
            f"stage {stage!r} has no {what} that could be observed under {len(missing)} of the names asked for.",
            received=", ".join(_shortened(missing)),
            expected="names such as " + (", ".join(_shortened(known)) or "none: this graph has no such layers"),
            fix="calibrate a bundle that was built in fp32 or fp16",
        )


def _shortened(names: list[str]) -> Iterator[str]:
    yield from names[:3]
    if len(names) > 3:
        yield "..."
