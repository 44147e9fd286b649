"""Modules that others import at their top and hardly ever use, loaded at first use instead.

onnx-ir imports SymPy for arithmetic on named dimensions, which graphs with names alone never do: 0.4 s and 35 MB of
every command that reads a graph. Nothing is replaced: whoever touches such a module gets the real one, a little later.
The module knows no command.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection, Sequence
from types import ModuleType

SYMBOLIC = ("sympy", "onnx_ir._symbolic_shapes")
"""SymPy, and the part of onnx-ir that reads it while it is imported itself."""


class _DeferringFinder(importlib.abc.MetaPathFinder):
    """Finds modules as usual; the loaders of ``names`` wait for the first attribute."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for one of ``names``, and None for all others, which are left to the other finders."""
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def defer(names: Collection[str] = SYMBOLIC) -> None:
    """Load the modules ``names`` at first use from now on; those that are loaded already stay as they are."""
    if not any(isinstance(finder, _DeferringFinder) and finder.names == frozenset(names) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeferringFinder(names))
