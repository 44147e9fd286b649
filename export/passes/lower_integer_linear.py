"""LowerIntegerLinearPass: quantised layers become ONNX Runtime's integer product that scales and adds the bias itself.

``QuantizeLinear -> DequantizeLinear -> Gemm <- DequantizeLinear <- codes``, then ``Add(bias)``, is a ``QGemm`` to ONNX
Runtime, with an addition and two reshapes around it: it takes matrices only, and no bias in fp32. Its
``MatMulIntegerToFloat`` (domain ``com.microsoft``) computes the same numbers, takes tensors of any rank, and adds the
bias while the sums are in registers. It reads weights ``[in, out]``: the transpose of the codes is a constant, which
ONNX Runtime computes once when it loads the graph, and gives up when it has packed it.

For ONNX Runtime's CPU provider alone, and only where it has fast products: uint8 activations with int8 weights. What
stays as it was carries its reason in ``refused``. The pass does not know how codes or scales were made.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassResult

from reelforge.export.passes.editing import GraphEditor, replace_output
from reelforge.export.passes.layers import stored_value
from reelforge.export.passes.quantised_operands import (
    LowerQuantisedPass,
    QuantisedOperands,
    quantised_operands,
    reads_codes,
)

CONTRIB_DOMAIN = "com.microsoft"
INTEGER_PRODUCT = "MatMulIntegerToFloat"


class LowerIntegerLinearPass(LowerQuantisedPass):
    """Replace every ``Gemm`` of dequantised uint8 rows and int8 stored weights."""

    left = "is still a product of dequantised codes"

    def concerns(self, node: ir.Node) -> bool:
        """See :class:`LoweringPass`."""
        return node.op_type == "Gemm" and node.domain in ("", "ai.onnx")

    def find(self, node: ir.Node) -> QuantisedOperands | str:
        """See :class:`LoweringPass`."""
        return _quantised(node)

    def lower(self, graph: ir.Graph, node: ir.Node, found: QuantisedOperands) -> None:
        """See :class:`LoweringPass`."""
        _lower(graph, node, found)

    def call(self, model: ir.Model) -> PassResult:
        """Lower each product."""
        result = super().call(model)
        if result.modified:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return result


def _quantised(gemm: ir.Node) -> QuantisedOperands | str:
    """Return what a product multiplies, or why it is left alone."""
    if not reads_codes(gemm):
        return "an operand is in high precision"
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        return "the bias is inside of the product"
    transposed = gemm.attributes.get("transB")
    if transposed is None or transposed.as_int() != 1 or set(gemm.attributes) & {"alpha", "beta", "transA"}:
        return "it is more than rows times a transposed weight"
    return quantised_operands(gemm)


def _lower(graph: ir.Graph, gemm: ir.Node, found: QuantisedOperands) -> None:
    if found.codes.shape is None:
        raise AssertionError(f"the codes of {gemm.name} have no shape")
    out_width, in_width = found.codes.shape.numpy()
    last, bias = _biased(gemm, out_width)
    scale, zero_point = found.value_scale, found.value_zero_point
    restored, source = _reshaped(last, found.values, in_width, out_width)
    anchor = last if restored is None else restored
    editor = GraphEditor(graph, anchor, str(gemm.name))
    kind = gemm.outputs[0].type
    codes = found.value_codes
    if source is not None:
        kind_of_codes = ir.TensorType(ir.DataType.UINT8)
        codes = editor.emit("QuantizeLinear", [source, scale, zero_point], kind=kind_of_codes, shape=_sizes(source))
    weight = editor.emit(
        "Transpose",
        [found.codes],
        {"perm": [1, 0]},
        kind=ir.TensorType(ir.DataType.INT8),
        shape=(in_width, out_width),
        name=f"{found.codes.name}.Transpose",
    )
    name = str(gemm.name)
    gemm.name = f"{name}.replaced"
    if not gemm.outputs[0].is_graph_output():
        gemm.outputs[0].name = f"{name}.replaced"
    product = editor.emit(
        INTEGER_PRODUCT,
        [codes, weight, scale, found.weight_scale, zero_point, None, *([] if bias is None else [bias])],
        kind=kind,
        shape=_sizes(anchor.outputs[0]),
        name=name,
        domain=CONTRIB_DOMAIN,
    )
    replace_output(graph, anchor, product)
    for node in (last, gemm):
        if node is not anchor and node.graph is not None:
            graph.remove(node, safe=True)


def _biased(gemm: ir.Node, out_width: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the last node of the layer, and the bias that it adds; the product itself if it adds none."""
    uses = list(gemm.outputs[0].uses())
    if len(uses) != 1 or gemm.outputs[0].is_graph_output() or uses[0].node.op_type != "Add":
        return gemm, None
    add = uses[0].node
    bias = add.inputs[1 - uses[0].idx]
    stored = stored_value(bias)
    if stored is None or stored.shape is None or list(stored.shape) != [out_width]:
        return gemm, None
    return add, bias


def _reshaped(last: ir.Node, rows: ir.Value, in_width: int, out_width: int) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the reshape that undoes the flattening of ``rows``, and what was flattened; or neither."""
    flatten = rows.producer()
    if flatten is None or flatten.op_type != "Reshape" or _numbers(flatten.inputs[1]) != [-1, in_width]:
        return None, None
    source = flatten.inputs[0]
    uses = list(last.outputs[0].uses())
    if source is None or len(uses) != 1 or last.outputs[0].is_graph_output() or uses[0].node.op_type != "Reshape":
        return None, None
    sizes, restored = _sizes(source), uses[0].node
    target = _numbers(restored.inputs[1])
    if sizes is None or target is None or len(target) != len(sizes) or sizes[-1] != in_width:
        return None, None
    # One -1 stands for what is left; with the same number of rows it is the size that the source has there.
    known = all(wanted in (-1, size) for wanted, size in zip(target[:-1], sizes[:-1], strict=True))
    return (restored, source) if known and target[-1] == out_width else (None, None)


def _numbers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
