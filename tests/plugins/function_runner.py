"""Runs a plugin's ONNX function in ONNX Runtime on the CPU, with arrays in and out, as ``Runner`` of the problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime

from reelforge.export.graph_file import check_graph, graph_bytes
from reelforge.plugins.onnx_functions import add_functions
from reelforge.plugins.onnx_nodes import ONNX_TYPES, plugin_node
from reelforge.plugins.schema import PLUGINS, DType

Array = np.ndarray[Any, Any]
OPSET = 23


class FunctionRunner:
    """The functions in place of the interpreter or a GPU."""

    def run(
        self, plugin: str, inputs: Mapping[str, Array], constants: Mapping[str, int | float], activation: DType
    ) -> dict[str, Array]:
        """Return a plugin's outputs; of ``constants`` the plugin's attributes are read."""
        attributes = {
            attribute.name: constants[attribute.constant]
            for attribute in PLUGINS[plugin].attributes
            if attribute.constant in constants
        }
        return run_function(plugin, inputs, activation, attributes)


def run_function(
    plugin: str, arrays: Mapping[str, Array], activation: DType, attributes: Mapping[str, int | float]
) -> dict[str, Array]:
    """Return the outputs of one node, in the types of the schema."""
    schema = PLUGINS[plugin]
    inputs = {tensor.name: graph_input(tensor.name, arrays[tensor.name]) for tensor in schema.inputs}
    node = plugin_node(plugin, inputs, activation, attributes)
    model = ir.Model(graph_of(list(inputs.values()), [node], list(node.outputs)), ir_version=11)
    add_functions(model)
    results = run_model(model, {name: arrays[name] for name in inputs})
    types = [tensor.dtype or activation for tensor in schema.outputs]
    return {
        tensor.name: result.astype(np.dtype(dtype.numpy_name))
        for tensor, dtype, result in zip(schema.outputs, types, results, strict=True)
    }


def graph_input(name: str, array: Array) -> ir.Value:
    """Return an input of the array's type and rank."""
    kind = next(dtype for dtype in ONNX_TYPES if np.dtype(dtype.numpy_name) == array.dtype)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType[ONNX_TYPES[kind]]), shape=ir.Shape([None] * array.ndim))


def graph_of(inputs: list[ir.Value], nodes: list[ir.Node], results: list[ir.Value]) -> ir.Graph:
    """Return a graph whose outputs are ``results`` in fp32, which NumPy can take whatever they were."""
    casts = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}) for value in results]
    for index, (cast, value) in enumerate(zip(casts, results, strict=True)):
        (output,) = cast.outputs
        output.name, output.type = f"result.{index}", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([None] * len(value.shape or ()))
    outputs = [cast.outputs[0] for cast in casts]
    return ir.Graph(inputs, outputs, nodes=[*nodes, *casts], opset_imports={"": OPSET}, name="graph")


def run_model(model: ir.Model, arrays: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a checked model; inputs that no node reads may be missing from it."""
    data = graph_bytes(model)
    check_graph(data, "graph")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    feeds = {item.name: ort_value(arrays[item.name]) for item in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return [value.numpy() for value in session.run_with_ort_values(names, feeds)]


def ort_value(array: Array) -> onnxruntime.OrtValue:
    """Return an array of any type; NumPy's bridge has no bfloat16 and no e4m3."""
    bits = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(ml_dtypes.float8_e4m3fn): np.uint8}
    if array.dtype in bits:
        raw = np.ascontiguousarray(array).view(bits[array.dtype])
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(ir.DataType.from_numpy(array.dtype)))
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
