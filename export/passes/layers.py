"""Layers of a lowered graph: the nodes that multiply by a stored weight, by the weight's name.

A layer is a ``Gemm`` or ``Conv`` whose second operand is a stored tensor, possibly cast; it is called after that tensor
(``double.3.image.fc1`` for ``double.3.image.fc1.weight``). Everything about quantisation finds layers here. The module
does not know which layers a model wants in which precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

LAYER_OPERATORS = ("Gemm", "Conv")
_SUFFIX = ".weight"


@dataclass(frozen=True)
class Layer:
    """One layer of a graph.

    Attributes:
        name: The weight's name without ``.weight``.
        node: A ``Gemm`` with ``transB=1`` or a ``Conv``: both keep output channels on the weight's axis 0.
        weight: The stored tensor, before any cast.
    """

    name: str
    node: ir.Node
    weight: ir.Value

    @property
    def activation(self) -> ir.Value:
        """The layer's input: ``[rows, in]`` of a ``Gemm``, ``[batch, in, ...]`` of a ``Conv``."""
        value = self.node.inputs[0]
        if value is None:
            raise AssertionError(f"{self.name} has no input")
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The layer's bias as it computes with it, if it has one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def weighted_layers(graph: ir.Graph) -> dict[str, Layer]:
    """Return the layers of ``graph`` by name, in execution order.

    A weight that two nodes use gives no layer: it could not be replaced for one of them alone.
    """
    found: dict[str, Layer] = {}
    for node in graph:
        if node.op_type not in LAYER_OPERATORS or node.domain not in ("", "ai.onnx"):
            continue
        weight = stored_value(node.inputs[1])
        if weight is None or weight.name is None or not weight.name.endswith(_SUFFIX):
            continue
        if node.op_type == "Gemm" and not _plain_gemm(node):
            continue
        if _used_once(weight):
            name = weight.name.removesuffix(_SUFFIX)
            found[name] = Layer(name, node, weight)
    return found


def attention_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return the attention nodes by the path of their block: ``double.0.attention``."""
    nodes: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type == "Attention" and node.name:
            path, _, last = node.name.rpartition(".")
            # A second attention of a block is numbered after the operator: "...Attention.2".
            name = f"{path}.{last.lower()}" if not last.isdecimal() else f"{path.lower()}.{last}"
            nodes[name] = node
    return nodes


def attention_name(node: ir.Node) -> str:
    """Return what the attention that replaces ``node`` is called, so that :func:`attention_nodes` knows its block."""
    path, _, _ = str(node.name).rpartition(".")
    return f"{path}.Attention" if path else f"{node.name}.Attention"


def stored_value(value: ir.Value | None) -> ir.Value | None:
    """Return the initialiser that ``value`` is, or is a cast of."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return stored_value(producer.inputs[0])
    return value if value.is_initializer() else None


def _used_once(weight: ir.Value) -> bool:
    """Whether one node uses the weight, or its only cast."""
    uses = list(weight.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Cast":
        uses = list(uses[0].node.outputs[0].uses())
    return len(uses) == 1


def _plain_gemm(node: ir.Node) -> bool:
    """Whether the node computes ``x @ W.T + b`` and nothing else."""
    transposed = node.attributes.get("transB")
    others = (node.attributes.get("alpha"), node.attributes.get("beta"), node.attributes.get("transA"))
    return transposed is not None and transposed.as_int() == 1 and all(other is None for other in others)
