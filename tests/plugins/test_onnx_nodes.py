"""Nodes follow the schemas, and the chain that replaces an attention computes it: run by the references on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from reelforge.plugins.onnx_nodes import ONNX_TYPES, AttentionChoice, attention_chain, plugin_node
from reelforge.plugins.registration import OUTPUT_TYPE
from reelforge.plugins.schema import NAMESPACE, PLUGINS, DType
from reelforge.runtime.attention.patterns import Layout, block_lists, dense
from reelforge.tools.bench.attention_problems import Problem, cosine

GIVEN = ("q", "k", "v", "query_norm", "key_norm", "rope_cos", "rope_sin", "key_lengths")


def value(name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    kinds = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT", "int32": "INT32"}
    return ir.Value(name=name, type=ir.TensorType(ir.DataType[kinds[array.dtype.name]]), shape=ir.Shape(array.shape))


def execute(graph: ir.Graph, arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Run a graph of plugin nodes with the float64 references, rounding to the outputs' types."""
    arrays = dict(arrays)
    for node in graph:
        assert node.domain == NAMESPACE
        schema = PLUGINS[node.op_type]
        reference = getattr(
            importlib.import_module(f"reelforge.plugins.kernels.{schema.kernel}_reference"), schema.name
        )
        attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != OUTPUT_TYPE}
        results = reference(*(arrays[x.name] for x in node.inputs), **attributes)
        for output, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True):
            assert result.ndim == len(output.shape)
            arrays[output.name] = result.astype(output.dtype.numpy())
    return arrays[graph.outputs[0].name]


@pytest.mark.parametrize("plugin", [name for name, schema in PLUGINS.items() if "PV" in schema.constants])
def test_the_chain_is_the_attention(plugin: str) -> None:
    problem = Problem(150, 30, head_dim=64)
    arrays = {name: problem.tensors[name] for name in GIVEN}
    layout = Layout(150, 30, 64)
    lists = block_lists(np.broadcast_to(dense(layout), (2, layout.query_blocks, layout.key_blocks)))
    arrays |= {"block_index": lists.block_index, "block_start": lists.block_start, "block_keys": layout.key_counts()}
    arrays["value_scale"] = np.ones((1, 2, 64), np.float32)
    inputs = {name: value(name, array) for name, array in arrays.items()}
    nodes, result = attention_chain(AttentionChoice(plugin, DType.BFLOAT16), inputs, "single.0.attention")
    graph = ir.Graph(list(inputs.values()), [result], nodes=nodes, name="chain")
    out = execute(graph, arrays)
    assert out.dtype == ml_dtypes.bfloat16
    assert cosine(out.astype(np.float64), problem.exact()) > 0.9999
    assert all(node.name.startswith("single.0.attention.") for node in nodes)


@pytest.mark.parametrize("schema", PLUGINS.values(), ids=lambda schema: schema.name)
def test_nodes_follow_the_schema(schema) -> None:
    inputs = {
        tensor.name: ir.Value(
            name=tensor.name, type=ir.TensorType(ir.DataType[ONNX_TYPES[tensor.dtype or DType.FLOAT16]])
        )
        for tensor in schema.inputs
    }
    node = plugin_node(schema.name, inputs, DType.FLOAT16)
    assert (node.domain, node.op_type) == (NAMESPACE, schema.name)
    assert [x.name for x in node.inputs] == [tensor.name for tensor in schema.inputs]
    expected = [attribute.name for attribute in schema.attributes] + [OUTPUT_TYPE] * schema.types_its_output
    assert list(node.attributes) == expected
    for output, tensor in zip(node.outputs, schema.outputs, strict=True):
        assert output.dtype == ir.DataType[ONNX_TYPES[tensor.dtype or DType.FLOAT16]]
        assert len(output.shape) == len(tensor.shape)


def test_what_no_input_shows_is_an_attribute() -> None:
    """Whoever types a plugin's outputs needs the 16-bit type: from an input, or else from the attribute."""
    for schema in PLUGINS.values():
        shown = any(tensor.dtype is None for tensor in schema.inputs)
        needed = any(tensor.dtype is None for tensor in schema.outputs)
        assert schema.types_its_output == (needed and not shown)
    assert {name for name, schema in PLUGINS.items() if schema.types_its_output} == {
        f"{kind}{suffix}"
        for kind in ("int8_fp8_attention", "block_sparse_attention")
        for suffix in ("", "_fp16_accumulator")
    }


def test_refusals() -> None:
    v = ir.Value(name="v", type=ir.TensorType(ir.DataType.FLOAT))
    with pytest.raises(ValueError, match="v is FLOAT, expected BFLOAT16"):
        plugin_node("value_statistics", {"v": v}, DType.BFLOAT16)
    with pytest.raises(ValueError, match="takes v; received x"):
        plugin_node("value_statistics", {"x": v}, DType.BFLOAT16)
    with pytest.raises(ValueError, match="computes in 16 bits, not in FLOAT32"):
        plugin_node("value_statistics", {"v": v}, DType.FLOAT32)
    untyped = ir.Value(name="v")
    with pytest.raises(ValueError, match="has no attributes colour"):
        plugin_node("value_statistics", {"v": untyped}, DType.BFLOAT16, {"colour": 1})
    with pytest.raises(ValueError, match="value_statistics is no attention"):
        attention_chain(AttentionChoice("value_statistics", DType.BFLOAT16), {}, "x")
    with pytest.raises(ValueError, match="key_statistics of x has no input k, key_norm"):
        attention_chain(AttentionChoice("int8_fp8_attention", DType.BFLOAT16), {"v": untyped}, "x")
