"""GraphEditor: add nodes before a node and replace it; what every lowering pass needs, nothing about any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir


class GraphEditor:
    """Emits nodes into ``graph``, before ``anchor`` or at the end, named after the anchor.

    Args:
        graph: Where nodes go.
        anchor: The node to be replaced; None appends.
        name: Prefix of new names; the anchor's name by default.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node | None, name: str = "") -> None:
        self.graph, self.anchor = graph, anchor
        self.name = name or (anchor.name if anchor is not None and anchor.name else "node")
        self._count = 0

    def emit(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | str | Sequence[int] | ir.Graph] | None = None,
        *,
        kind: ir.TypeProtocol | None = None,
        shape: Sequence[int | None] | None = None,
        name: str = "",
        domain: str = "",
    ) -> ir.Value:
        """Add a node and return its only output.

        Args:
            operator: Operator type.
            inputs: Its inputs; None for an absent optional one.
            attributes: Integers, lists of integers, words or a subgraph.
            kind: Type of the output, if it is known.
            shape: Shape of the output, if it is known.
            name: Name of the node; numbered after the anchor by default.
            domain: Of the operator; the model must import it.
        """
        if not name:
            self._count += 1
            name = f"{self.name}.{operator}" + (f".{self._count}" if self._count > 1 else "")
        output = ir.Value(name=name, type=kind, shape=None if shape is None else ir.Shape(list(shape)))
        node = ir.Node(
            domain,
            operator,
            list(inputs),
            [_attribute(*item) for item in (attributes or {}).items()],
            outputs=[output],
            name=name,
        )
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return output

    def constant(
        self, numbers: Sequence[int | bool | float], dtype: ir.DataType = ir.DataType.INT64, *, scalar: bool = False
    ) -> ir.Value:
        """Return an initialiser of the graph with these numbers; equal ones are shared."""
        tensor = ir.tensor(numbers[0] if scalar else list(numbers), dtype=dtype)
        # Shortest texts of the numbers as stored: other numbers have another name, and equal ones the same.
        text = "_".join(str(number) for number in tensor.numpy().reshape(-1))
        name = f"constant.{dtype.name.lower()}.{'scalar.' if scalar else ''}{text}"
        if name not in self.graph.initializers:
            tensor.name = name
            self.graph.register_initializer(
                ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(dtype), const_value=tensor)
            )
        return self.graph.initializers[name]

    def cast(self, value: ir.Value, kind: ir.TypeProtocol | None) -> ir.Value:
        """Return ``value`` in type ``kind``; itself if it has it, or if ``kind`` is None."""
        if kind is None or value.type == kind:
            return value
        shape = None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
        return self.emit("Cast", [value], {"to": int(kind.dtype)}, kind=kind, shape=shape)

    def replace(self, result: ir.Value) -> None:
        """Let ``result`` stand for the anchor's output and remove the anchor."""
        if self.anchor is None:
            raise AssertionError("an editor that appends has nothing to replace")
        replace_output(self.graph, self.anchor, result)


def replace_output(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """Redirect every use of ``node``'s only output to ``result`` and remove the node; graph outputs keep their name."""
    old = node.outputs[0]
    if result.shape is None:
        result.shape = old.shape
    if result.type is None:
        result.type = old.type
    if old.is_graph_output():
        result.name = old.name
        old.name = f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def permutation_of(transpose: ir.Node) -> list[int] | None:
    """Return what a ``Transpose`` does to axes; None where it says nothing, which reverses them, however many."""
    stated = transpose.attributes.get("perm")
    return None if stated is None else list(stated.as_ints())


def output_type(kind: ir.TypeProtocol | None) -> dict[str, int]:
    """Return the attribute of ``DequantizeLinear`` with fp32 scales that makes its output of ``kind``."""
    if kind is None or kind.dtype == ir.DataType.FLOAT:
        return {}
    return {"output_dtype": int(kind.dtype)}


def _attribute(name: str, value: int | str | Sequence[int] | ir.Graph) -> ir.Attr:
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    return ir.AttrInt64s(name, list(value))
