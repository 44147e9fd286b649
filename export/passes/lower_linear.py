"""LowerLinearPass: every product with a transposed weight becomes one ``Gemm``, named after its layer.

A linear layer is stored [out, in]. ``MatMul(x, Transpose(weight)) + bias`` makes a backend hold a transposed copy;
``Gemm(transB=1)`` reads the weight where it lies, in the checkpoint's file. Rows are flattened before and restored
after. Products that are left alone carry their reason in ``refused``. The pass does not know precisions.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from reelforge.export.passes.editing import GraphEditor, replace_output


class LowerLinearPass(InPlacePass):
    """Replace ``MatMul(x, Transpose(weight)) [+ bias]`` by ``Gemm(transB=1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Lower every product with a stored weight, and name every ``Gemm`` after its layer."""
        modified = False
        layers: Counter[str] = Counter()

        def name(weight: ir.Value) -> str:
            layer = str(_stored_name(weight)).removesuffix(".weight")
            layers[layer] += 1
            return layer if layers[layer] == 1 else f"{layer}.{layers[layer]}"

        for node in list(model.graph):
            if node.op_type == "Gemm":  # the exporter writes two-dimensional layers so
                weight = node.inputs[1]
                if weight is not None and _stored_name(weight) is not None and not node.outputs[0].is_graph_output():
                    node.name = node.outputs[0].name = name(weight)
                    modified = True
            elif node.op_type == "MatMul":
                found = _transposed_weight(node)
                if isinstance(found, str):
                    self.refused[node.name or ""] = found
                    continue
                _lower(model.graph, node, found, name(found))
                modified = True
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No product reads a stored weight through a transpose."""
        for node in model.graph:
            if node.op_type == "MatMul" and not isinstance(_transposed_weight(node), str):
                raise PostconditionError(f"{node.name} still multiplies by a transposed weight")


def _transposed_weight(matmul: ir.Node) -> ir.Value | str:
    """Return the [out, in] weight behind the product's second operand, or why there is none."""
    operand = matmul.inputs[1]
    transpose = None if operand is None else operand.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return "the second operand is not a transposed tensor"
    weight = transpose.inputs[0]
    if weight is None or _stored_name(weight) is None:
        return "the second operand is computed, not a stored weight"
    return weight


def _stored_name(value: ir.Value) -> str | None:
    """Return the name of the initialiser that ``value`` is, or is a cast of."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return value.name if value.is_initializer() else None


def _bias(matmul: ir.Node, out_width: int) -> tuple[ir.Node, ir.Value] | None:
    """Return the addition of a stored bias that is the product's only use, and the bias.

    Only a vector of the layer's width: what has rows of its own would not fit the flattened rows of the product.
    """
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or matmul.outputs[0].is_graph_output() or uses[0].node.op_type != "Add":
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    if other is None or _stored_name(other) is None or _shape(other) != (out_width,):
        return None
    return add, other


def _lower(graph: ir.Graph, matmul: ir.Node, weight: ir.Value, layer: str) -> None:
    rows = matmul.inputs[0]
    if rows is None:
        raise AssertionError(f"{matmul.name}: the first operand is missing")
    out_width, in_width = _shape(weight)
    bias = _bias(matmul, out_width)
    last = matmul if bias is None else bias[0]
    editor = GraphEditor(graph, last, layer)
    kind = matmul.outputs[0].type
    result_shape = matmul.outputs[0].shape
    flat = editor.emit("Reshape", [rows, editor.constant([-1, in_width])], kind=rows.type, shape=(None, in_width))
    operands = [flat, weight, *([] if bias is None else [bias[1]])]
    product = editor.emit("Gemm", operands, {"transB": 1}, kind=kind, shape=(None, out_width), name=layer)
    if result_shape is not None and sum(not isinstance(size, int) for size in result_shape) <= 1:
        sizes = [size if isinstance(size, int) else -1 for size in result_shape]
        restored = editor.emit("Reshape", [product, editor.constant(sizes)], kind=kind)
    else:
        leading = editor.emit("Shape", [rows], {"start": 0, "end": -1})
        target = editor.emit("Concat", [leading, editor.constant([out_width])], {"axis": 0})
        restored = editor.emit("Reshape", [product, target], kind=kind)
    replace_output(graph, last, restored)
    if bias is not None:
        graph.remove(matmul, safe=True)


def _shape(weight: ir.Value) -> tuple[int, ...]:
    """Return the fixed shape of a stored value or of its cast."""
    producer = weight.producer()
    stored = weight if producer is None else producer.inputs[0]
    if stored is None or stored.shape is None:
        raise AssertionError(f"the weight {weight.name} has no shape")
    return stored.shape.numpy()
