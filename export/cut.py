"""Cut: one graph into consecutive segments that can be loaded one after the other.

Nodes are taken in their order; the values alive at a place between two nodes are what crosses it. What only depends on
stored tensors (the cast of a weight) belongs to no place: every segment that needs it computes it again. The module
reads no weights, and does not know what runs the segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

FP32_BYTES = 4
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)
_LEAST_FILLED = 0.5


@dataclass(frozen=True)
class Limits:
    """How large a segment may become; a single node that exceeds a limit gets a segment of its own.

    Attributes:
        weight_bytes: Of its stored tensors once loaded, with every float as fp32.
        output_bytes: Of the wanted values that it produces, all of which are in memory when it has run.
        bytes_of: How large a wanted value is.
    """

    weight_bytes: int
    output_bytes: int
    bytes_of: Callable[[ir.Value], int] = lambda _: 0


@dataclass(frozen=True)
class Timeline:
    """The nodes of a graph that compute ``wanted``, in order. Make one with :func:`timeline`.

    A place ``p`` lies before ``nodes[p]``.

    Attributes:
        graph: The graph, which stays as it is.
        wanted: The values to compute.
        nodes: What has to run; what only depends on stored tensors is left out.
        constant: Nodes that depend on stored tensors only.
        made: Which node makes a value.
        last_use: The last node that reads it.
    """

    graph: ir.Graph
    wanted: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    constant: frozenset[ir.Node] = field(repr=False)
    made: dict[ir.Value, int] = field(repr=False)
    last_use: dict[ir.Value, int] = field(repr=False)

    def crossing(self, place: int) -> list[ir.Value]:
        """Return the values made before ``place`` and used from there on, in the order in which they are made."""
        return [value for value, made in self.made.items() if made < place <= self.last_use.get(value, -1)]

    def stored_inputs(self, node: ir.Node) -> Iterator[ir.Value]:
        """Yield the stored tensors that ``node`` reads, directly or through nodes that depend on nothing else."""
        for value in inputs_of(node):
            producer = value.producer()
            if value.is_initializer():
                yield value
            elif producer is not None and producer in self.constant:
                yield from self.stored_inputs(producer)

    def weight_bytes(self) -> int:
        """Return the bytes of all stored tensors, each once, with every float as fp32."""
        stored = dict.fromkeys(value for node in self.nodes for value in self.stored_inputs(node))
        return sum(loaded_bytes(value) for value in stored)


def infer_types(model: ir.Model) -> ir.Model:
    """Give every value of ``model`` the type and rank that ONNX infers; a segment states those of its inputs."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    return model


def timeline(graph: ir.Graph, wanted: Sequence[ir.Value]) -> Timeline:
    """Return what has to run for ``wanted``.

    Args:
        graph: Its nodes in execution order.
        wanted: Values that the nodes produce.
    """
    needed: set[ir.Node] = set()
    waiting = [value.producer() for value in wanted]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [value.producer() for value in inputs_of(node)]
    constant: set[ir.Node] = set()
    for node in graph:
        if node in needed and _is_constant(node, constant):
            constant.add(node)
    nodes = tuple(node for node in graph if node in needed and node not in constant)
    made: dict[ir.Value, int] = {}
    last_use: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        made.update(dict.fromkeys(node.outputs, index))
        for value in inputs_of(node):
            if value in made:
                last_use[value] = index
    return Timeline(graph, tuple(dict.fromkeys(wanted)), nodes, frozenset(constant), made, last_use)


def fits(line: Timeline, limits: Limits) -> bool:
    """Whether the whole graph keeps to ``limits``, so that nothing has to be cut."""
    return len(_fill(line, 0, limits)) == len(line.nodes)


def find_places(line: Timeline, limits: Limits) -> list[int]:
    """Return the places, in order, at which to cut so that every segment keeps to ``limits``.

    Of the places that leave a segment at least half full, the one that the fewest values cross is taken, and of these
    the last: between two blocks of a transformer rather than inside one.
    """
    widths = _widths(line)
    places: list[int] = []
    start = 0
    while (filled := _fill(line, start, limits)) and start + len(filled) < len(line.nodes):
        enough = [start + index + 1 for index, share in enumerate(filled) if share >= _LEAST_FILLED * filled[-1]]
        possible = [place for place in enough if widths[place] is not None]
        if not possible:  # whatever the limit: the next place that can be cut
            later = range(enough[-1] + 1, len(line.nodes))
            possible = [place for place in later if widths[place] is not None][:1]
        if not possible:
            break
        start = min(possible, key=lambda place: (widths[place] or 0, -place))
        places.append(start)
    return places


def segments(line: Timeline, places: Sequence[int]) -> Iterator[ir.Graph]:
    """Yield the graphs between the places, in order.

    A segment's inputs are those of the whole graph and those made by earlier segments that it uses; its outputs are
    the wanted values that it makes and what later segments use. Each is made when it is asked for, and the graph of the
    timeline stays as it is.
    """
    edges = [0, *places, len(line.nodes)]
    for start, stop in pairwise(edges):
        nodes = line.nodes[start:stop]
        inside = {output for node in nodes for output in node.outputs}
        stored: dict[ir.Node, None] = {}
        used: dict[ir.Value, None] = {}
        for node in nodes:
            _collect(line, node, stored, used)
        constants = {output for node in stored for output in node.outputs}
        later = [value for value in line.crossing(stop) if value in inside]
        view = ir.GraphView(
            [value for value in used if value not in inside and value not in constants and not value.is_initializer()],
            list(dict.fromkeys([*(value for value in line.wanted if value in inside), *later])),
            nodes=[*stored, *nodes],
            initializers=[value for value in used if value.is_initializer()],
            opset_imports=line.graph.opset_imports,
            name=line.graph.name,
        )
        yield view.clone()


def inputs_of(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what ``node`` reads, including what its subgraphs read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = list(attribute.as_graphs())
        else:
            continue
        for body in bodies:
            inner = [value for each in body for value in inputs_of(each)] + list(body.outputs)
            yield from (value for value in inner if value.graph is not body)


def loaded_bytes(value: ir.Value) -> int:
    """Return what a stored tensor takes in memory when 16-bit floats are widened to fp32."""
    tensor = value.const_value
    if tensor is None:
        return 0
    return int(tensor.size) * FP32_BYTES if tensor.dtype in _FLOATS else int(tensor.nbytes)


def _is_constant(node: ir.Node, constant: set[ir.Node]) -> bool:
    """Whether the node depends on stored tensors only, ``constant`` being the nodes before it that do."""
    inputs = list(inputs_of(node))
    if not inputs:
        return node.op_type == "Constant"  # a random number has no inputs either
    return all(value.is_initializer() or value.producer() in constant for value in inputs)


def _collect(line: Timeline, node: ir.Node, stored: dict[ir.Node, None], used: dict[ir.Value, None]) -> None:
    """Note the values that ``node`` reads, and before it the constant nodes that they come from."""
    for value in inputs_of(node):
        producer = value.producer()
        if producer is not None and producer not in stored and producer in line.constant:
            _collect(line, producer, stored, used)
            stored[producer] = None
        used[value] = None


def _fill(line: Timeline, start: int, limits: Limits) -> list[float]:
    """Return how full a segment is after each node from ``start`` on, up to the last one that fits."""
    seen: set[ir.Value] = set()
    wanted = set(line.wanted)
    weights = outputs = 0
    filled: list[float] = []
    for node in line.nodes[start:]:
        for value in line.stored_inputs(node):
            if value not in seen:
                seen.add(value)
                weights += loaded_bytes(value)
        outputs += sum(limits.bytes_of(value) for value in node.outputs if value in wanted)
        share = max(weights / limits.weight_bytes, outputs / limits.output_bytes)
        if filled and share > 1:
            break
        filled.append(share)
    return filled


def _widths(line: Timeline) -> list[int | None]:
    """Return how many values cross each place; None where the type or rank of one is unknown."""
    change = [0] * (len(line.nodes) + 1)
    unknown = [0] * (len(line.nodes) + 1)
    for value, last in line.last_use.items():
        counts = [change] if value.type is not None and value.shape is not None else [change, unknown]
        for count in counts:
            count[line.made[value] + 1] += 1
            count[last + 1] -= 1
    pairs = zip(accumulate(change), accumulate(unknown), strict=True)
    return [None if blocked else crossing for crossing, blocked in pairs]
