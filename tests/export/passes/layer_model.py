"""One-layer graphs, and what their 8-bit form must compute in float64; tests of several passes share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from reelforge.export.passes.quantise_layers import ActivationScales, QuantisedLayer

IN, OUT, ROWS = 24, 7, 5
LARGEST = {"int8": 127.0, "fp8": 448.0}
CODES: dict[str, Any] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
IR_CODES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def random_array(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(name: str, values: NDArray[Any]) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto], str]:
    """Return an initialiser, the cast to fp32 if it needs one, and the name of the value to compute with."""
    tensor = numpy_helper.from_array(values, name)
    if values.dtype == np.float32:
        return [tensor], [], name
    return (
        [tensor],
        [helper.make_node("Cast", [name], [f"{name}.f32"], f"{name}.Cast", to=TensorProto.FLOAT)],
        (f"{name}.f32"),
    )


def layers_model(
    layers: Mapping[str, tuple[NDArray[Any], NDArray[Any] | None]],
    x: tuple[int | str, ...] = ("rows", IN),
    *,
    attributes: Mapping[str, object] | None = None,
    weights: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return a graph whose layers all read ``x``; each one's output is named after it, with ``.y``.

    Args:
        layers: Name -> weight (two dimensions: Gemm, else Conv) and bias.
        x: Shape of the input.
        attributes: Of each layer; ``transB=1`` for Gemm by default.
        weights: Layer -> another layer whose weight it reads too.
    """
    tensors: dict[str, onnx.TensorProto] = {}
    nodes: dict[str, onnx.NodeProto] = {}
    outputs = []
    for name, (weight, bias) in layers.items():
        operands = ["x"]
        owner = (weights or {}).get(name, name)
        for parameter, values in ((f"{owner}.weight", weight), (f"{name}.bias", bias)):
            if values is None:
                continue
            added, casts, used = stored(parameter, values)
            tensors.update({tensor.name: tensor for tensor in added})
            nodes.update({node.name: node for node in casts})
            operands.append(used)
        if weight.ndim == 2:
            own = {"transB": 1} if attributes is None else dict(attributes)
            nodes[name] = helper.make_node("Gemm", operands, [f"{name}.y"], name, **own)
            shape = [x[0], weight.shape[0]]
        else:
            own = {"kernel_shape": weight.shape[2:], **(attributes or {})}
            nodes[name] = helper.make_node("Conv", operands, [f"{name}.y"], name, **own)
            shape = [x[0], weight.shape[0], *[None] * (weight.ndim - 2)]
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        list(nodes.values()),
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        outputs,
        list(tensors.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


def rounded(values: NDArray[Any], scale: NDArray[Any] | float, kind: str, lowest: float) -> NDArray[Any]:
    """Return the codes of ``values``: ONNX's QuantizeLinear, whose quotient is fp32, written out."""
    quotient = values.astype(np.float32) / np.asarray(scale, np.float32)
    clipped = np.clip(quotient, lowest, LARGEST[kind])
    return np.asarray((np.rint(clipped) if kind == "int8" else clipped).astype(CODES[kind]))


def quantised_weight(weight: NDArray[Any], kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Return codes and the scale per output channel."""
    values = weight.astype(np.float32)
    scales = np.abs(values).reshape(len(values), -1).max(axis=1) / np.float32(LARGEST[kind])
    return rounded(values, scales.reshape(-1, *[1] * (weight.ndim - 1)), kind, -LARGEST[kind]), scales


def around_zero(scale: float) -> ActivationScales:
    """Return scales with which signed and unsigned codes stand for the same numbers: -128 to 127 times the scale."""
    return ActivationScales(scale, (-128 * float(np.float32(scale)), 127 * float(np.float32(scale))))


def quantised_layer(weight: NDArray[Any], activation_scale: float, kind: str) -> QuantisedLayer:
    """Return what the pass is told of one layer."""
    codes, scales = quantised_weight(weight, kind)
    return QuantisedLayer(ir.tensor(codes, dtype=IR_CODES[kind]), ir.tensor(scales), around_zero(activation_scale))


def dequantised_operands(
    x: NDArray[np.float32], weight: NDArray[Any], activation_scale: float, kind: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return activation and weight after their way through 8 bits, in float64.

    ONNX Runtime saturates int8 activations at -128; weights never hold that code.
    """
    lowest = -128.0 if kind == "int8" else -LARGEST[kind]
    scale = float(np.float32(activation_scale))
    activation = rounded(x, scale, kind, lowest).astype(np.float64) * scale
    codes, scales = quantised_weight(weight, kind)
    columns = scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    return activation, codes.astype(np.float64) * columns


def operators(model: ir.Model | onnx.ModelProto) -> list[str]:
    nodes: Iterable[Any] = model.graph if isinstance(model, ir.Model) else model.graph.node
    return [node.op_type for node in nodes]


def run(data: bytes, x: NDArray[np.float32], optimised: Path | None = None) -> dict[str, NDArray[np.float32]]:
    """Execute a serialised model with every optimisation, on one thread; ``optimised`` is where the result goes."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3  # saving an optimised model warns that it is for this machine only
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))
