"""Receipts: what a compiler made of a graph, layer by layer, in its own words (``receipts/*.json`` of a bundle).

A receipt is read from the builder's layer information when the plan is compiled; nothing in it was observed on a GPU.
The module knows the data's shape, not how a compiler's words are read (``export.engines``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

RECEIPT_VERSION = 1


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a plan.

    Attributes:
        name: The compiler's name: fused layers list the graph's node names in it.
        kind: ``gemm``, ``attention``, ``plugin``, ``convolution``, ``reformat``, ``cast`` or ``other``.
        kernel: The compiler's name of the kernel or layer type.
        inputs: Types as the compiler writes them, ``FP8``, ``BF16``, ``Float``.
        outputs: Likewise.
        constants: Likewise.
        nodes: Names of the graph's layers and attentions that it computes.
    """

    name: str
    kind: str
    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """What one plan holds.

    Attributes:
        version: Of this format.
        stage: The stage.
        plan_sha256: Of the plan's bytes.
        plan_bytes: The plan's size.
        backend: Library and version, ``tensorrt_rtx 1.7.1.116``.
        architectures: That the plan serves.
        layers: In execution order, under the first profile; a build checks the others too.
        weight_bytes: Constants in the plan, as the compiler counts them.
        activation_bytes: Profile name -> device memory beside weights, inputs and outputs.
        build_seconds: Of the compiler's call.
    """

    version: int
    stage: str
    plan_sha256: str
    plan_bytes: int
    backend: str
    architectures: tuple[str, ...]
    layers: tuple[LayerRecord, ...]
    weight_bytes: int
    activation_bytes: dict[str, int]
    build_seconds: float

    def of_kind(self, kind: str) -> Iterator[LayerRecord]:
        """Yield the layers of one kind."""
        return (layer for layer in self.layers if layer.kind == kind)

    def precisions(self, kind: str) -> dict[str, int]:
        """Return how many layers of ``kind`` there are by the type of their first input."""
        return dict(Counter(layer.inputs[0] if layer.inputs else "none" for layer in self.of_kind(kind)))
