"""ONNX nodes of the plugins, from their schemas: one node, and the chain that replaces one attention.

TensorRT's parser finds a plugin by the node's operator and domain, and passes inputs and attributes by the names that
were registered. ``onnx_ir`` is imported when it is needed. The module does not look for attentions in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelforge.plugins.registration import OUTPUT_TYPE
from reelforge.plugins.schema import ACTIVATIONS, NAMESPACE, PLUGINS, PV_16BIT, PV_FP8_FP16_ACCUMULATOR, DType

if TYPE_CHECKING:
    import onnx_ir as ir

ONNX_TYPES: Mapping[DType, str] = {
    DType.FLOAT32: "FLOAT",
    DType.FLOAT16: "FLOAT16",
    DType.BFLOAT16: "BFLOAT16",
    DType.INT8: "INT8",
    DType.INT32: "INT32",
    DType.FP8_E4M3: "FLOAT8E4M3FN",
}
"""Names of the members of ``onnx_ir.DataType``."""


def plugin_node(
    plugin: str,
    inputs: Mapping[str, ir.Value],
    activation: DType,
    attributes: Mapping[str, int | float] | None = None,
    name: str = "",
) -> ir.Node:
    """Return one plugin's node, with typed outputs of known rank.

    Args:
        plugin: A key of PLUGINS.
        inputs: Its inputs by the schema's names.
        activation: The type of its 16-bit tensors.
        attributes: Those that differ from the defaults.
        name: The node's name, and the prefix of its outputs' names.

    Raises:
        ValueError: If inputs or attributes are not the schema's, or an input has another type.
    """
    import onnx_ir as ir

    schema = PLUGINS[plugin]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{plugin} computes in 16 bits, not in {activation.name}")
    expected = [tensor.name for tensor in schema.inputs]
    if set(inputs) != set(expected):
        raise ValueError(f"{plugin} takes {', '.join(expected)}; received {', '.join(inputs)}")
    for tensor in schema.inputs:
        wanted = ir.DataType[ONNX_TYPES[tensor.dtype or activation]]
        found = inputs[tensor.name].dtype
        if found is not None and found != wanted:
            raise ValueError(f"{plugin}: {tensor.name} is {found.name}, expected {wanted.name}")
    values = {attribute.name: attribute.default for attribute in schema.attributes}
    unknown = set(attributes or {}) - set(values)
    if unknown:
        raise ValueError(f"{plugin} has no attributes {', '.join(sorted(unknown))}")
    values |= attributes or {}
    given = [
        ir.AttrInt64(key, value) if isinstance(value, int) else ir.AttrFloat32(key, value)
        for key, value in values.items()
    ]
    if schema.types_its_output:
        given.append(ir.AttrString(OUTPUT_TYPE, activation.triton_name))
    outputs = [
        ir.Value(
            name=f"{name or plugin}.{tensor.name}",
            type=ir.TensorType(ir.DataType[ONNX_TYPES[tensor.dtype or activation]]),
            shape=ir.Shape([None] * len(tensor.shape)),
        )
        for tensor in schema.outputs
    ]
    return ir.Node(NAMESPACE, plugin, [inputs[key] for key in expected], given, outputs=outputs, name=name or plugin)


@dataclass(frozen=True)
class AttentionChoice:
    """How an attention is computed.

    Attributes:
        plugin: One of the attention plugins.
        activation: The type of q, k, v and the result.
        key_group: Keys that share a scale, one that the architecture's kernels have.
        eps: Of the norms.
    """

    plugin: str
    activation: DType
    key_group: int = 64
    eps: float = 1e-6


def attention_chain(
    choice: AttentionChoice, inputs: Mapping[str, ir.Value], name: str
) -> tuple[list[ir.Node], ir.Value]:
    """Return the nodes from projected q, k and v to the attention's result [B, L, H, D], and that result.

    Args:
        choice: Which kernels.
        inputs: ``q``, ``k``, ``v`` [B, L, H, D]; ``query_norm``, ``key_norm`` fp32 [2, D]; ``rope_cos``, ``rope_sin``
            fp32 [image tokens, D / 2]; and what the plugin wants beside codes: ``key_lengths``, or the block lists.
            ``value_scale`` as well for 16-bit values, fp32 [B, H, D], which is not read.
        name: Prefix of the nodes' names.

    Raises:
        ValueError: If an input is missing or has another type.
    """
    schema = PLUGINS[choice.plugin]
    pv = schema.constants.get("PV")
    if pv is None:
        raise ValueError(f"{choice.plugin} is no attention")
    known = dict(inputs)
    nodes: list[ir.Node] = []

    def add(plugin: str, attributes: Mapping[str, int | float]) -> None:
        wanted = [tensor.name for tensor in PLUGINS[plugin].inputs]
        missing = [key for key in wanted if key not in known]
        if missing:
            raise ValueError(f"{plugin} of {name} has no input {', '.join(missing)}")
        taken = {key: known[key] for key in wanted}
        node = plugin_node(plugin, taken, choice.activation, attributes, f"{name}.{plugin}")
        nodes.append(node)
        known.update(_by_name(plugin, node.outputs))

    add("key_statistics", {"eps": choice.eps})
    add("rotary_qk_norm_quantise", {"eps": choice.eps, "key_group": choice.key_group})
    if pv == PV_16BIT:
        known["value"] = known["v"]
    else:
        add("value_statistics", {})
        add("value_quantise", {"value_range": 2.25 if pv == PV_FP8_FP16_ACCUMULATOR else 448.0})
    add(choice.plugin, {"key_group": choice.key_group})
    return nodes, known["out"]


def _by_name(plugin: str, outputs: Sequence[ir.Value]) -> dict[str, ir.Value]:
    return {tensor.name: value for tensor, value in zip(PLUGINS[plugin].outputs, outputs, strict=True)}
