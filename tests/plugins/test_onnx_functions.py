"""The functions are the plugins: against the float64 references, and against the kernels in the interpreter.

References state what is meant; the kernels' own rounding of P is relative to the largest score so far. The functions
mirror that, so they are closer to the kernels than to the references.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from reelforge.plugins.interpreter import Interpreter
from reelforge.plugins.kernels.int8_attention_reference import attention, dequantise_query_and_key
from reelforge.plugins.onnx_functions import add_functions, function_text, plugin_functions, remove_functions
from reelforge.plugins.onnx_nodes import plugin_node
from reelforge.plugins.schema import NAMESPACE, PLUGINS, QUERY_GROUP, DType
from reelforge.tools.bench.attention_problems import ATTENTION, PV_BITS, SPARSE, Problem, cosine, relative_l1
from tests.plugins.function_runner import OPSET, FunctionRunner, graph_input, graph_of, run_function

Array = np.ndarray[Any, Any]
RUNNER = FunctionRunner()
GROUPS = [*((pv, 64) for pv in ATTENTION), ("fp8", 128)]
EPS = 1e-6
PROBLEMS = {
    "plain": Problem(150, 42, head_dim=64, heads=2),
    "wide": Problem(200, 56, head_dim=128, heads=2),
    "one text token": Problem(129, 1, head_dim=64),
    "no text": Problem(140, 0, head_dim=64),
    "one image token": Problem(1, 140, head_dim=64),
    "fp16": Problem(100, 28, head_dim=64, activation=DType.FLOAT16),
    "two videos": Problem(90, 45, head_dim=64, batch=2),
    "two chunks": Problem(2100, 77, head_dim=64, heads=1),
}


def reference(plugin: str, tensors: dict[str, Array], **attributes: int | float) -> Any:
    schema = PLUGINS[plugin]
    module = importlib.import_module(f"reelforge.plugins.kernels.{schema.kernel}_reference")
    return getattr(module, plugin)(*(tensors[tensor.name] for tensor in schema.inputs), **attributes)


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("activation", [DType.BFLOAT16, DType.FLOAT16])
def test_every_plugin_has_a_function_of_its_schema(name: str, activation: DType) -> None:
    schema = PLUGINS[name]
    proto = onnx.parser.parse_function(function_text(name, activation, OPSET))
    assert (proto.domain, proto.name) == (NAMESPACE, name)
    assert list(proto.input) == [tensor.name for tensor in schema.inputs]
    assert list(proto.output) == [tensor.name for tensor in schema.outputs]
    inputs = {tensor.name: ir.Value(name=tensor.name) for tensor in schema.inputs}
    assert set(proto.attribute) == set(plugin_node(name, inputs, activation).attributes)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("key_group", [64, 128])
def test_queries_and_keys(problem: Problem, key_group: int) -> None:
    given = dict(problem.tensors)
    got = run_function("key_statistics", given, problem.activation, {"eps": EPS})
    sums = reference("key_statistics", given, eps=EPS)
    np.testing.assert_allclose(got["key_sums"], sums, rtol=1e-4, atol=1e-4 * np.abs(sums).max())
    given["key_sums"] = sums.astype(np.float32)
    attributes = {"eps": EPS, "key_group": key_group}
    got = run_function("rotary_qk_norm_quantise", given, problem.activation, attributes)
    expected = reference("rotary_qk_norm_quantise", given, **attributes)
    for tensor, wanted in zip(PLUGINS["rotary_qk_norm_quantise"].outputs, expected, strict=True):
        values = got[tensor.name]
        assert values.shape == wanted.shape
        if tensor.dtype is DType.INT8:  # fp32 may round a value between two codes the other way
            difference = np.abs(values.astype(int) - wanted)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 1e-3
        else:
            np.testing.assert_allclose(values, wanted, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("value_range", [448.0, 2.25])
def test_values(problem: Problem, value_range: float) -> None:
    given = dict(problem.tensors)
    given["v"] = given["v"].copy()
    given["v"][..., 3] = 0  # a channel of zeros has a scale of zero
    largest = run_function("value_statistics", given, problem.activation, {})["value_max"]
    np.testing.assert_array_equal(largest, reference("value_statistics", given))
    given["value_max"] = largest
    got = run_function("value_quantise", given, problem.activation, {"value_range": value_range})
    codes, scale = reference("value_quantise", given, value_range=value_range)
    assert got["value"].shape == codes.shape
    np.testing.assert_allclose(got["value_scale"], scale, rtol=1e-6)
    numbers, wanted = got["value"].astype(np.float32), codes.astype(np.float32)
    assert (numbers != wanted).mean() < 2e-3  # 16-bit values often lie half way between two codes
    np.testing.assert_allclose(numbers, wanted, rtol=1 / 8, atol=2.0**-9)


def quantised(problem: Problem, pv: str, key_group: int = 64) -> Problem:
    problem.quantise(RUNNER, pv, key_group)
    return problem


# The error of P in e4m3: 3 bits of mantissa, rounded to nearest, are at most 1/16 and on average 1/45 of an element.
# Elements' errors are independent, and values have a mean of one standard deviation here, so over 100 to 2,000 keys
# about 1/45 / sqrt(keys) / sqrt(2) of the result is left, and the output's own 16 bits: 1/512 at most.
E4M3_L1, SIXTEEN_L1 = 6e-3, 2e-3


@pytest.mark.parametrize("pv", ATTENTION)
@pytest.mark.parametrize("name", PROBLEMS)
def test_dense_attention_against_float64(name: str, pv: str) -> None:
    problem = PROBLEMS[name]
    quantised(problem, pv)
    wanted = reference(ATTENTION[pv], problem.tensors, key_group=64)
    got = problem.run(RUNNER, ATTENTION[pv], KEY_GROUP=64)["out"].astype(np.float64)
    assert got.shape == wanted.shape
    assert relative_l1(got, wanted) < (SIXTEEN_L1 if PV_BITS[pv] is None else E4M3_L1)
    assert cosine(got, wanted) > (0.999995 if PV_BITS[pv] is None else 0.99998)
    assert cosine(got, problem.exact()) > 0.9999  # beside what was never quantised: the goal of 8 bits


@pytest.mark.parametrize("pv", ATTENTION)
@pytest.mark.parametrize("lengths", [(1, 135), (64, 65), (100, 128)])
def test_key_lengths(pv: str, lengths: tuple[int, int]) -> None:
    problem = quantised(Problem(90, 45, head_dim=64, batch=2), pv)
    problem.tensors["key_lengths"] = np.array(lengths, np.int32)
    wanted = reference(ATTENTION[pv], problem.tensors, key_group=64)
    got = problem.run(RUNNER, ATTENTION[pv], KEY_GROUP=64)["out"].astype(np.float64)
    for b, length in enumerate(lengths):
        limit = 0.07 if length == 1 else 2e-2  # one key: the error of V alone is all there is
        assert relative_l1(got[b], wanted[b]) < limit


@pytest.mark.parametrize(("pv", "key_group"), GROUPS)
def test_attention_against_the_kernel(interpreter: Interpreter, pv: str, key_group: int) -> None:
    """Same codes in, so what is left are roundings. (The interpreter truncates to bf16, so the problem is in fp16.)"""
    problem = quantised(Problem(200, 56, head_dim=64, key_mean=3.0, activation=DType.FLOAT16), pv, key_group)
    constants = {"KEY_GROUP": key_group, "BLOCK_M": 64, "BLOCK_N": key_group, "STAGES": 2}
    kernel = problem.run(interpreter, ATTENTION[pv], **constants)["out"].astype(np.float64)
    got = problem.run(RUNNER, ATTENTION[pv], KEY_GROUP=key_group)["out"].astype(np.float64)
    wanted = reference(ATTENTION[pv], problem.tensors, key_group=key_group)
    assert relative_l1(got, kernel) < 1e-4
    assert 10 * relative_l1(got, kernel) < relative_l1(kernel, wanted)


def growing(problem: Problem) -> None:
    """Scale keys so that every key block's scores are far larger than those of the block before."""
    blocks = problem.tensors["key_scale"].shape[-1]
    problem.tensors["key_scale"] *= np.linspace(0.2, 3.0, blocks, dtype=np.float32)


@pytest.mark.parametrize("pv", ATTENTION)
def test_the_largest_score_may_come_last(interpreter: Interpreter, pv: str) -> None:
    problem = quantised(Problem(300, 84, head_dim=64, activation=DType.FLOAT16), pv)
    growing(problem)
    wanted = reference(ATTENTION[pv], problem.tensors, key_group=64)
    kernel = problem.run(interpreter, ATTENTION[pv], KEY_GROUP=64, BLOCK_M=64, BLOCK_N=64, STAGES=2)["out"]
    got = problem.run(RUNNER, ATTENTION[pv], KEY_GROUP=64)["out"].astype(np.float64)
    assert relative_l1(got, wanted) < 2e-2
    assert relative_l1(got, kernel.astype(np.float64)) < 1e-4


def random_lists(heads: int, query_blocks: int, key_blocks: int, seed: int = 5) -> tuple[Array, Array]:
    """Lists of random blocks, the first query block of head 0 with none, the last head with head 0's own lists."""
    random = np.random.default_rng(seed)
    index: list[int] = []
    starts = []
    for head in range(heads - 1):
        row = [len(index)]
        for block in range(query_blocks):
            count = 0 if (head, block) == (0, 0) else int(random.integers(1, key_blocks + 1))
            index += sorted(random.choice(key_blocks, count, replace=False).tolist())
            row.append(len(index))
        starts.append(row)
    return np.array(index, np.int32), np.array([*starts, starts[0]], np.int32)


@pytest.mark.parametrize(("pv", "key_group"), GROUPS)
def test_sparse_attention(interpreter: Interpreter, pv: str, key_group: int) -> None:
    problem = quantised(Problem(330, 50, head_dim=64, heads=3, batch=2, activation=DType.FLOAT16), pv, key_group)
    blocks = 384 // key_group
    index, start = random_lists(3, 3, blocks)
    counts = np.random.default_rng(1).integers(1, key_group + 1, (2, blocks)).astype(np.int32)
    counts[0, 1] = 0  # a block of padding alone
    counts[:, -1] = np.minimum(counts[:, -1], 380 - 384 + key_group)
    problem.tensors |= {"block_index": index, "block_start": start, "block_keys": counts}
    wanted = reference(SPARSE[pv], problem.tensors, key_group=key_group)
    got = problem.run(RUNNER, SPARSE[pv], KEY_GROUP=key_group)["out"].astype(np.float64)
    assert not got[:, :128, 0].any()
    assert got[:, 128:].any(axis=(1, 3)).all()
    assert relative_l1(got, wanted) < 2e-2
    constants = {"KEY_GROUP": key_group, "BLOCK_M": 64, "BLOCK_N": key_group, "STAGES": 2}
    kernel = problem.run(interpreter, SPARSE[pv], **constants)["out"].astype(np.float64)
    assert relative_l1(got, kernel) < 1e-4


def test_an_empty_list_of_blocks() -> None:
    problem = quantised(Problem(100, 20, head_dim=64), "fp8")
    problem.tensors |= {
        "block_index": np.zeros(0, np.int32),
        "block_start": np.zeros((2, 2), np.int32),
        "block_keys": np.full((1, 2), 64, np.int32),
    }
    assert not problem.run(RUNNER, "block_sparse_attention", KEY_GROUP=64)["out"].any()


def test_sparse_over_all_blocks_is_dense() -> None:
    problem = quantised(Problem(150, 42, head_dim=64), "fp8")
    problem.tensors |= {
        "block_index": np.tile(np.arange(4, dtype=np.int32), 2),
        "block_start": np.array([[0, 4, 8]] * 2, np.int32),
        "block_keys": np.array([[64, 64, 64, 0]], np.int32),
    }
    dense = problem.run(RUNNER, "int8_fp8_attention", KEY_GROUP=64)["out"]
    sparse = problem.run(RUNNER, "block_sparse_attention", KEY_GROUP=64)["out"]
    np.testing.assert_array_equal(dense, sparse)


def test_the_mean_of_k_is_taken_off() -> None:
    """Without it, keys with a large mean would use few codes."""
    problem = Problem(150, 42, head_dim=64, key_mean=30.0)
    problem.tensors["rope_sin"][:] = 0
    problem.tensors["rope_cos"][:] = 1
    quantised(problem, "fp16")
    tensors = problem.tensors
    _, keys = dequantise_query_and_key(*(tensors[name] for name in ("query", "query_scale", "key", "key_scale")), 64)
    assert np.abs(keys.mean(axis=1)).max() < 0.01 * keys.std()
    assert tensors["query_scale"].shape[-1] * QUERY_GROUP == 256


def test_functions_come_and_go() -> None:
    v = graph_input("v", np.zeros((1, 4, 1, 64), np.float16))
    node = plugin_node("value_statistics", {"v": v}, DType.FLOAT16)
    model = ir.Model(graph_of([v], [node], list(node.outputs)), ir_version=11)
    model.functions[("other", "Kept", "")] = ir.Function(
        "other", "Kept", graph=ir.Graph([], [], nodes=[]), attributes=[]
    )
    add_functions(model)
    assert {key[:2] for key in model.functions} == {("other", "Kept"), (NAMESPACE, "value_statistics")}
    assert remove_functions(model) is model
    assert {key[:2] for key in model.functions} == {("other", "Kept")}
    assert model.graph.opset_imports[NAMESPACE] == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="plugins compute in 16 bits, not in FLOAT32"):
        plugin_functions(["value_statistics"], DType.FLOAT32, OPSET)
    v = ir.Value(name="v")
    unknown = ir.Node(NAMESPACE, "Portable", [v])
    with pytest.raises(ValueError, match="there are no plugins Portable"):
        add_functions(ir.Model(ir.Graph([v], [], nodes=[unknown], opset_imports={"": OPSET}), ir_version=11))
    nodes = []
    for activation in (DType.FLOAT16, DType.BFLOAT16):
        inputs = {tensor.name: ir.Value(name=tensor.name) for tensor in PLUGINS["int8_fp8_attention"].inputs}
        nodes.append(plugin_node("int8_fp8_attention", inputs, activation))
    with pytest.raises(ValueError, match="both 16-bit types"):
        add_functions(ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": OPSET}), ir_version=11))


def test_the_oracle_of_this_file() -> None:
    """Uniform scores: attention is the mean of values."""
    v = np.random.default_rng(0).normal(size=(1, 5, 1, 8))
    np.testing.assert_allclose(attention(np.zeros_like(v), v, v), np.broadcast_to(v.mean(1, keepdims=True), v.shape))
