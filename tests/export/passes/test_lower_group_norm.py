"""GroupNorm in two-stage sums against float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.lower_group_norm import LowerGroupNormPass
from tests.export.passes.portable_model import run

CHANNELS, EPSILON = 8, 1e-6
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def model(groups: int, rank: int, dtype: type = np.float32, channels: int | str = CHANNELS) -> ir.Model:
    kind, shape = TYPES[dtype], ["batch", channels, *"thw"[5 - rank :]]
    node = helper.make_node("GroupNormalization", ["x", "w", "b"], ["y"], "norm", num_groups=groups, epsilon=EPSILON)
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    inputs += [helper.make_tensor_value_info(name, kind, [CHANNELS]) for name in "wb"]
    graph = helper.make_graph([node], "norm", inputs, [helper.make_tensor_value_info("y", kind, shape)])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


def expected(x: np.ndarray, w: np.ndarray, b: np.ndarray, groups: int) -> np.ndarray:
    rows = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    normed = (rows - rows.mean(axis=2, keepdims=True)) / np.sqrt(rows.var(axis=2, keepdims=True) + EPSILON)
    column = (1, CHANNELS, *[1] * (x.ndim - 2))
    result: np.ndarray = normed.reshape(x.shape) * w.astype(np.float64).reshape(column) + b.reshape(column)
    return result


@settings(max_examples=30, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_equals_the_definition(groups: int, sizes: list[int], batch: int, seed: int, dtype: type) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((batch, CHANNELS, *sizes)) * 3 + 1).astype(dtype)
    w, b = random.standard_normal((2, CHANNELS)).astype(dtype)
    lowered = model(groups, x.ndim, dtype)
    assert LowerGroupNormPass()(lowered).modified
    received = run(lowered, x=x, w=w, b=b)[0]
    assert received.dtype == dtype
    wanted = expected(x, w, b, groups)
    # A group whose elements happen to be nearly equal is divided by a deviation near zero: relative to that.
    rows = x.astype(np.float64).reshape(batch, groups, -1)
    amplified = max(1.0, float((np.abs(rows).max(axis=2) / np.sqrt(rows.var(axis=2) + EPSILON)).max()))
    tolerance = (2e-6 if dtype == np.float32 else 4e-3) * amplified
    np.testing.assert_allclose(received, wanted, rtol=0, atol=tolerance * (1 + np.abs(w).max()))


def test_digits_are_kept_over_large_tiles() -> None:
    """A million elements a group with a mean of forty deviations: one running fp32 sum loses three digits here."""
    random = np.random.default_rng(0)
    x = (random.standard_normal((1, CHANNELS, 8, 256, 256)) + 40).astype(np.float32)
    ones, zeros = np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)
    lowered = model(4, 5)
    LowerGroupNormPass()(lowered)
    received = run(lowered, x=x, w=ones, b=zeros)[0]
    assert np.abs(received - expected(x, ones, zeros, 4)).max() < 2e-5


def test_what_it_leaves() -> None:
    lowered = model(4, 5)
    LowerGroupNormPass()(lowered)
    assert "GroupNormalization" not in {node.op_type for node in lowered.graph}
    assert [value.name for value in lowered.graph.outputs] == ["y"]
    names = [node.name for node in lowered.graph]
    assert len(set(names)) == len(names)
    assert not LowerGroupNormPass()(lowered).modified
    onnx.checker.check_model(ir.to_proto(lowered), full_check=True)


def test_the_postcondition() -> None:
    with pytest.raises(PostconditionError, match="GroupNormalization is still in the graph"):
        LowerGroupNormPass().ensures(model(4, 5))


def test_an_unknown_channel_count_is_a_bug_that_is_named() -> None:
    with pytest.raises(AssertionError, match="norm: type, rank or channel count of the operand is not fixed"):
        LowerGroupNormPass()(model(4, 5, channels="channels"))
