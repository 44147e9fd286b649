"""Which layer of the model a backend's node belongs to, from the node's name.

Nodes of our graphs are called after the parameters that they use (``double.0.image.fc1``, ``double.0.image.fc1.Add.3``)
or after the module that they are in (``double.0.Mul.4``), and ONNX Runtime keeps that when it fuses or moves nodes
(``double.0.Gather.2/GatherSliceToSplitFusion``, ``double.0.Add.4_q``). Names without any of this are given to the block
of the node before, and counted. The module knows names and the weights of a stage; it knows no backend's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from reelforge.tools.profiling.model_words import block_of

ROLES = ("weight", "bias", "scale")

_KINDS = {
    "gemm": {"Gemm", "MatMul", "FusedGemm", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger",
             "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"},
    "attention": {"Attention", "MultiHeadAttention", "GroupQueryAttention", "FusedAttention"},
    "convolution": {"Conv", "FusedConv", "QLinearConv", "ConvInteger", "ConvTranspose", "NhwcFusedConv"},
    "norm": {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
             "SkipSimplifiedLayerNormalization", "GroupNormalization", "InstanceNormalization", "GroupNorm"},
    "quantise": {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"},
    "layout": {"Reshape", "Transpose", "Concat", "Split", "Slice", "Gather", "Unsqueeze", "Squeeze", "Expand", "Cast",
               "Shape", "Flatten", "Pad", "Identity", "Resize", "ReorderInput", "ReorderOutput", "GatherND",
               "ConstantOfShape", "Range", "Upsample", "Tile", "ScatterND", "Size", "MemcpyFromHost", "MemcpyToHost"},
}  # fmt: skip
_KIND_OF = {operator: kind for kind, operators in _KINDS.items() for operator in operators}


def kind_of(operator: str) -> str:
    """Return the kind of an ONNX operator (see :class:`LayerTiming`)."""
    return _KIND_OF.get(operator, "elementwise")


@dataclass(frozen=True)
class Place:
    """Where a node belongs: a layer's canonical name, and whether that is certain."""

    layer: str
    certain: bool


class LayerNames:
    """Finds the layers of one stage's nodes.

    Args:
        weights: Names of the stage's weights, as its manifest has them.
    """

    def __init__(self, weights: Iterable[str]) -> None:
        layers = set()
        for weight in weights:
            name = weight
            while name.rpartition(".")[2] in ROLES:
                name = name.rpartition(".")[0]
            layers.add(name)
        self._layers = frozenset(layers)
        self._before = ""

    def place(self, node: str, kind: str) -> Place:
        """Return the layer of a node, given in the order of execution.

        Args:
            node: Its name, as the backend reports it.
            kind: From :func:`kind_of`.
        """
        name = _without_module(node)
        layer = self._layer_of(name)
        if layer:
            return self._remember(layer)
        block = block_of(name)
        if block:
            # Attention blocks of a decoder are modules of their own within a block.
            return self._remember(f"{block}.{kind}")
        if _meaningful(node):
            return self._remember(f"{_module(node)}.{kind}")
        return Place(f"{block_of(self._before) or 'graph'}.{kind}", certain=False)

    def _remember(self, layer: str) -> Place:
        self._before = layer
        return Place(layer, certain=True)

    def _layer_of(self, name: str) -> str:
        """Return the longest layer's name that ``name`` is, or begins with."""
        parts = re.split(r"[/_](?=[A-Z])|/", name)[0].split(".")
        for length in range(len(parts), 0, -1):
            candidate = ".".join(parts[:length])
            if candidate in self._layers:
                return candidate
        return ""


def _without_module(node: str) -> str:
    """Take off the class of the part that a node is in: ``VaeDecoder.decoder.conv_in.Pad``."""
    head, dot, rest = node.partition(".")
    return rest if dot and head[:1].isupper() else node


def _module(node: str) -> str:
    return node.partition(".")[0]


def _meaningful(node: str) -> bool:
    """Tell ``PatchEmbedding.Shape.3`` from what a backend made up: ``Squeeze_token_14``, ``Gather``."""
    return "." in node
