"""Capture: one part of a stage to an ONNX graph, without its weights.

The module is built on fake tensors, exported once per kind, and its parameters become graph inputs: what a trace holds
is arithmetic only, a few kilobytes for a block of any width. The module knows no model, no file and no target.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch._subclasses.fake_tensor import FakeTensorMode

from reelforge.export.stage import COMPUTE, Part, Value
from reelforge.runtime.recipe import Precision

OPSET = 23
_TORCH_DTYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64}
COMPUTE_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
# Sizes used while tracing; any distinct numbers above one do. Joint and image tokens agree with the latent grid so that
# the trace runs, and stay symbolic in the result.
_TRACE_SIZES = {
    "batch": 2,
    "steps": 3,
    "prompt_tokens": 11,
    "clip_tokens": 7,
    "text_tokens": 5,
    "latent_frames": 3,
    "latent_height": 8,
    "latent_width": 12,
    "image_tokens": 72,
    "joint_tokens": 77,
    "image_slots": 80,
    "joint_slots": 85,
    "block_entries": 59,
    "block_starts": 12,
    "key_blocks": 22,
    "tile_frames": 3,
    "tile_height": 6,
    "tile_width": 10,
}


@dataclass(frozen=True)
class Trace:
    """A captured part: the inputs of ``graph`` are the part's inputs, then its parameters in the order listed."""

    graph: ir.Graph
    inputs: int
    parameters: tuple[str, ...]


def capture_part(part: Part, values: dict[str, Value], precision: Precision) -> Trace:
    """Export one part.

    Args:
        part: What to export.
        values: Dtype and named dimensions of every value that the part reads.
        precision: Gives the parameters and ``compute`` values their dtype.

    Returns:
        The trace; node names are module paths, and initialisers are small constants only.
    """
    dtype = COMPUTE_DTYPES[precision]
    arguments: list[torch.Tensor] = []
    dynamic: list[dict[int, object]] = []
    with FakeTensorMode():
        module = part.build().eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        for port in part.input_ports:
            value = values[port.value]
            shape = (value.shape[0], *value.shape[2:]) if port.indexed else value.shape
            sizes = [_TRACE_SIZES[size] if isinstance(size, str) else size for size in shape]
            arguments.append(torch.empty(sizes, dtype=dtype if value.dtype == COMPUTE else _TORCH_DTYPES[value.dtype]))
            dynamic.append({axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape) if isinstance(size, str)})
    names = [f"input_{index}" for index in range(len(arguments))]
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(arguments),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(dynamic),
            input_names=names,
            optimize=False,  # its folding reads parameters, which have no storage; the optimiser runs below instead
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    graph = program.model.graph
    parameters = tuple(name for name, _ in module.named_parameters())
    for name in parameters:
        value_of = graph.initializers.pop(name)
        value_of.const_value = None
        graph.inputs.append(value_of)
    optimizer.optimize_ir(program.model)
    _name_nodes(graph)
    return Trace(graph, len(arguments), parameters)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node after the module that it came from: ``image.q.MatMul``; repeats are numbered."""
    seen: Counter[str] = Counter()
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']")
        path = [scope.strip(" '\"") for scope in scopes.strip("[]").split(",")][:-1]
        modules = [scope for scope in path if scope and not scope.startswith("_")]  # "_...": the exporter's own marks
        name = ".".join([*modules[-1:], node.op_type])
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}.{seen[name]}"


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks about absent optional packages out of the build log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
