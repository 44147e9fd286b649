"""What a graph is made of, before a compiler sees it: operator domains, and the names that receipts speak in.

A plugin's node aborts the process inside TensorRT-RTX's parser, so a graph is read here first (its weights are not).
The module does not know what a compiler makes of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from reelforge.export.engines.plugin_graph import plugin_attentions, plugin_types
from reelforge.export.engines.request import Expected
from reelforge.export.passes.layers import LAYER_OPERATORS, attention_nodes, weighted_layers
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend

_STANDARD = ("", "ai.onnx")
_DOMAINS = {Backend.RTX: (*_STANDARD, "trt")}  # trt: TensorRT's own operators, FP4 among them
_SHOWN = 5


@dataclass(frozen=True)
class GraphNames:
    """The layers and attentions of a graph.

    Attributes:
        layers: Layer name -> node name.
        attentions: Attention name -> node name.
        stored_bytes: Of all stored tensors.
        plugins: Attention name -> node name, of those that a plugin computes.
        plugin_types: All plugins that nodes name.
    """

    layers: dict[str, str]
    attentions: dict[str, str]
    stored_bytes: int = 0
    plugins: dict[str, str] = field(default_factory=dict)
    plugin_types: tuple[str, ...] = ()

    def by_node(self) -> dict[str, str]:
        """Return node name -> layer or attention name."""
        groups = (self.layers, self.attentions, self.plugins)
        return {node: name for names in groups for name, node in names.items()}


def read_graph_names(path: Path, backend: Backend) -> GraphNames:
    """Read a graph and refuse what the compiler of ``backend`` has no operator for.

    Raises:
        BuildError: For a file that is no ONNX graph, a function, or a node of a domain that would need a plugin.
    """
    try:
        model = ir.load(path)
    except (OSError, DecodeError) as error:
        raise BuildError(f"{path} cannot be read as an ONNX graph.", received=str(error)[:300]) from error
    _refuse_plugins(path, backend, model.graph)
    if model.functions:
        raise BuildError(
            f"{path.name} has functions, and the compilers' parsers fail where one is called twice.",
            received=", ".join(str(key) for key in list(model.functions)[:_SHOWN]),
            expected="a graph of operators",
            fix="inline them (onnx_ir.passes.common.InlinePass), or take plugins' functions off (parser_graph)",
        )
    layers = {name: str(layer.node.name) for name, layer in weighted_layers(model.graph).items()}
    for node in model.graph:
        if node.op_type in LAYER_OPERATORS and node.name:  # a quantised layer's node carries the layer's name
            layers.setdefault(node.name, node.name)
    attentions = {name: str(node.name) for name, node in attention_nodes(model.graph).items()}
    tensors = (value.const_value for value in model.graph.initializers.values())
    stored = sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)
    plugins = {name: str(node.name) for name, node in plugin_attentions(model.graph).items()}
    return GraphNames(layers, attentions, stored, plugins, plugin_types(model.graph))


def check_expected(names: GraphNames, expected: Expected) -> None:
    """Everything that is expected of the plan is in the graph.

    Raises:
        BuildError: Naming what is not.
    """
    for kind, wanted, known in (
        ("layers", expected.layers, names.layers),
        ("attentions", [*expected.attentions, *expected.decomposed], names.attentions),
        ("plugins", list(expected.plugins), names.plugins),
    ):
        missing = [name for name in wanted if name not in known]
        if missing:
            raise BuildError(
                f"{len(missing)} {kind} that the recipe speaks of are not in the graph.",
                received=f"{', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''}",
                expected=f"{kind} of the graph, for example {', '.join(list(known)[:3]) or 'none'}",
            )


def _refuse_plugins(path: Path, backend: Backend, graph: ir.Graph) -> None:
    domains = _DOMAINS.get(backend)
    if domains is None:
        return  # classic TensorRT reports a missing plugin as a parser's error
    foreign = [node for node in graph.all_nodes() if node.domain not in domains]
    if foreign:
        first = foreign[0]
        raise BuildError(
            f"{path.name} has {len(foreign)} nodes that need a plugin, and {backend.value!r} has none.",
            received=f"{first.domain}::{first.op_type} ({first.name})",
            expected="operators of ONNX",
            fix="use a target trt:..., or lower these nodes for rtx",
        )
