"""What a plan must hold, from its graph and what quantisation made of the stage.

Layers come from the stage's plan, attentions from the lowered graph: whether an attention can be one fused kernel is
seen from its type, heads and channels; one that is a plugin is that plugin. The module does not know how a compiler's
words are read (``check``).
"""

from __future__ import annotations

import onnx_ir as ir

from reelforge.export.engines.plugin_graph import plugin_attentions
from reelforge.export.engines.request import Expected
from reelforge.export.passes.layers import LAYER_OPERATORS, attention_nodes
from reelforge.export.quantisation import NUMBER_FORMATS, StagePlan
from reelforge.runtime.recipe import Precision

FUSED_CHANNELS = range(12, 257)
"""Channels of a head for which TensorRT-RTX 1.7 has fused kernels (measured in fp16 and bf16: 12 to 256; 8 and 264 are
refused). FP8 was measured from 16 on."""

_BASES = {ir.DataType.FLOAT16: Precision.FP16, ir.DataType.BFLOAT16: Precision.BF16}
_FORMATS = {number_format: precision for precision, number_format in NUMBER_FORMATS.items()}


def expected_of(model: ir.Model, plan: StagePlan) -> Expected:
    """Return what the plan of a graph must hold.

    Args:
        model: The lowered graph of a stage, or of a part of one.
        plan: What quantisation changes in the whole stage.

    Returns:
        Layers and attentions of this graph only.
    """
    present = {node.name for node in model.graph if node.op_type in LAYER_OPERATORS}
    layers = {name: _FORMATS[layer.weight.number_format] for name, layer in plan.layers.items() if name in present}
    attentions: dict[str, Precision] = {}
    decomposed: list[str] = []
    for name, node in attention_nodes(model.graph).items():
        precision = _fused_precision(node)
        if precision is None:
            decomposed.append(name)
        else:
            attentions[name] = Precision.FP8 if name in plan.attentions else precision
    plugins = {name: node.op_type for name, node in plugin_attentions(model.graph).items()}
    return Expected(layers, attentions, tuple(decomposed), plugins)


def _fused_precision(node: ir.Node) -> Precision | None:
    """Return the precision that a fused kernel would compute the attention in, or None where there is no kernel."""
    query = node.inputs[0]
    if query is None or query.dtype not in _BASES or query.shape is None:
        return None
    batch, heads, _, channels = query.shape
    # Batch and heads are one axis to the compiler, and it drops an axis of one; then it finds no attention.
    alone = batch == 1 and heads == 1
    return None if channels not in FUSED_CHANNELS or alone else _BASES[query.dtype]
