"""Plugins in a graph: the attentions they compute, and what classic TensorRT must know before it parses them.

The parser looks a node's plugin up by name, so plugins are registered first, for the GPU's architecture; the ONNX
functions that let a CPU execute the same nodes are taken off, since the parser would inline them instead. The module
does not know how kernels are compiled.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from reelforge.export.engines.module import Module, backend_name
from reelforge.plugins.compile import toolchain_digest
from reelforge.plugins.onnx_functions import remove_functions
from reelforge.plugins.registration import register_plugins
from reelforge.plugins.schema import NAMESPACE, PLUGINS
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend, Target


def parser_graph(model: ir.Model) -> ir.Model:
    """Take off ``model`` what is there for other executors than its compiler, in place, and return it."""
    return remove_functions(model)


def plugin_types(graph: ir.Graph) -> tuple[str, ...]:
    """Return the plugins that nodes of ``graph`` name, sorted."""
    return tuple(sorted({node.op_type for node in graph if node.domain == NAMESPACE and node.op_type in PLUGINS}))


def plugin_attentions(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return the nodes of attention plugins by the attention's name: ``double.0.attention``."""
    return {
        str(node.name).removesuffix(f".{node.op_type}"): node
        for node in graph
        if node.domain == NAMESPACE and node.op_type in PLUGINS and "PV" in PLUGINS[node.op_type].constants
    }


def with_kernels(digest: str, names: tuple[str, ...]) -> str:
    """Return the digest of a plan's graph together with that of the kernels that its plugins bring into the plan.

    Args:
        digest: Of the graph.
        names: Plugins of the graph; without any the digest stays as it is.

    Raises:
        BuildError: If what compiles kernels is not installed.
    """
    return hashlib.sha256(f"{digest} {toolchain_digest()}".encode()).hexdigest() if names else digest


@contextmanager
def registered(module: Module, target: Target, names: tuple[str, ...]) -> Iterator[None]:
    """Have ``names`` registered while a plan is built; kernels are compiled once each, when they are asked for.

    A process can register a plugin once only; a plan is built in a process of its own.

    Args:
        module: ``tensorrt``.
        target: Of one architecture.
        names: Plugins; none does nothing.

    Raises:
        BuildError: If the library has no plugins in Python, or the architecture no kernels.
    """
    if not names or target.backend is not Backend.TRT:
        yield
        return
    try:
        interface = importlib.import_module(f"{module.__name__}.plugin")
    except ImportError as error:
        raise BuildError(
            "this version of TensorRT takes no plugins from Python, and attention is computed by them.",
            received=f"{backend_name(module)}: {error}",
            expected="TensorRT 10.13, or newer",
            fix="upgrade it, or use --attention fp8 for the compiler's own attention",
        ) from error
    (architecture,) = target.architectures
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        register_plugins(module, interface, int(architecture.removeprefix("sm")), Path(folder), names)
        yield
