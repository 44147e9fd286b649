"""LoweringPass: what passes share that replace one node at a time by what a backend computes faster.

The module knows no operator: a pass says which nodes it looks at, and what it finds in them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

Found = TypeVar("Found")


class LoweringPass(InPlacePass, Generic[Found]):
    """Replace every node in which something is found.

    Attributes:
        refused: Nodes that were looked at and stay, and why, by name.
        left: What a node does that should not be there any more, for the message.
    """

    left = ""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}

    @abstractmethod
    def concerns(self, node: ir.Node) -> bool:
        """Whether the pass looks at a node."""

    @abstractmethod
    def find(self, node: ir.Node) -> Found | str:
        """Return what is to be replaced, or why it stays."""

    @abstractmethod
    def lower(self, graph: ir.Graph, node: ir.Node, found: Found) -> None:
        """Replace a node."""

    def call(self, model: ir.Model) -> PassResult:
        """Lower each node that can be."""
        lowered = 0
        for node in list(model.graph):
            if not self.concerns(node):
                continue
            found = self.find(node)
            if isinstance(found, str):
                self.refused[node.name or ""] = found
                continue
            self.lower(model.graph, node, found)
            lowered += 1
        return PassResult(model, modified=bool(lowered))

    def ensures(self, model: ir.Model) -> None:
        """No node is left that could be lowered."""
        for node in model.graph:
            if self.concerns(node) and not isinstance(self.find(node), str):
                raise PostconditionError(f"{node.name} {self.left}")
