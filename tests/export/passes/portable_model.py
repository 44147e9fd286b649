"""Models of one portable operator, and their execution, for the tests of the passes that lower them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from reelforge.export.portable import DOMAIN


def one_operator(operator: str, inputs: Mapping[str, tuple[ir.DataType, Sequence[int | str]]]) -> ir.Model:
    """Return a model of a single node of reelforge's domain; its output is like its first input."""
    values = [
        ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        for name, (dtype, shape) in inputs.items()
    ]
    output = ir.Value(name="out", type=values[0].type, shape=values[0].shape)
    node = ir.Node(DOMAIN, operator, values, [], outputs=[output], name="attend")
    graph = ir.Graph(values, [output], nodes=[node], opset_imports={"": 23, DOMAIN: 1}, name="one")
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    """Check ``model`` and execute it with ONNX Runtime."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, inputs)
    return results


def masked_softmax_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """In float64: query [..., S, d], key and value [..., K, d]; ``visible`` broadcasts to [..., S, K]."""
    query, key, value = (operand.astype(np.float64) for operand in (query, key, value))
    scores = np.where(visible, query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ value
    return result
