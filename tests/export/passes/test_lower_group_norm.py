"""GroupNorm by means of means, against float64 and against ONNX Runtime's own expansion."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import PostconditionError

from reelforge.export.passes.lower_group_norm import LowerGroupNormPass
from tests.export.passes.portable_model import run

CHANNELS, GROUPS, EPSILON = 6, 2, 1e-6


def model(rank: int = 5, dtype: ir.DataType = ir.DataType.FLOAT, channels: int | None = CHANNELS) -> ir.Model:
    kind = ir.TensorType(dtype)
    shape = ir.Shape([1, channels, *(f"size_{axis}" for axis in range(2, rank))])
    x = ir.Value(name="x", type=kind, shape=shape)
    weight, bias = (ir.Value(name=name, type=kind, shape=ir.Shape([CHANNELS])) for name in ("weight", "bias"))
    out = ir.Value(name="out", type=kind, shape=shape)
    attributes = [ir.AttrInt64("num_groups", GROUPS), ir.AttrFloat32("epsilon", EPSILON)]
    node = ir.Node("", "GroupNormalization", [x, weight, bias], attributes, outputs=[out], name="norm")
    graph = ir.Graph([x, weight, bias], [out], nodes=[node], opset_imports={"": 23}, name="one")
    return ir.Model(graph, ir_version=11)


def operands(*sizes: int, offset: float = 0.0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(sum(sizes))
    x = (random.standard_normal((1, CHANNELS, *sizes)) + offset).astype(dtype)
    return {
        "x": x,
        "weight": random.standard_normal(CHANNELS).astype(dtype),
        "bias": random.standard_normal(CHANNELS).astype(dtype),
    }


def in_float64(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    rows = x.astype(np.float64).reshape(GROUPS, -1)
    normed = (rows - rows.mean(axis=1, keepdims=True)) / np.sqrt(rows.var(axis=1, keepdims=True) + EPSILON)
    column = (1, CHANNELS, *[1] * (x.ndim - 2))
    return normed.reshape(x.shape) * weight.astype(np.float64).reshape(column) + bias.reshape(column)


@pytest.fixture(scope="module")
def lowered() -> ir.Model:
    result = model()
    assert LowerGroupNormPass()(result).modified
    return result


@settings(max_examples=40, deadline=None)
@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 9)), offset=st.floats(-10, 10))
def test_equals_float64(lowered: ir.Model, sizes: tuple[int, int, int], offset: float) -> None:
    given_operands = operands(*sizes, offset=offset)
    received = run(lowered, **given_operands)[0]
    # Rounding of x - mean is relative to x: an offset of 10 costs a factor of ten.
    np.testing.assert_allclose(received, in_float64(**given_operands), atol=4e-6 * (1 + abs(offset)))


def test_pictures_alone_are_normalised_too() -> None:
    picture = model(rank=4)
    LowerGroupNormPass()(picture)
    given_operands = operands(7, 5)
    np.testing.assert_allclose(run(picture, **given_operands)[0], in_float64(**given_operands), atol=4e-6)


def test_large_tiles_keep_their_digits(lowered: ir.Model) -> None:
    """The reason for the pass: one sum over all elements loses digits as the tile grows."""
    given_operands = operands(9, 256, 256)
    expected = in_float64(**given_operands)
    ours = np.abs(run(lowered, **given_operands)[0] - expected).max()
    theirs = np.abs(run(model(), **given_operands)[0] - expected).max()
    assert ours < 2e-6
    assert ours < theirs / 3


def test_half_precision_has_fp32_statistics() -> None:
    half = model(dtype=ir.DataType.FLOAT16)
    LowerGroupNormPass()(half)
    given_operands = operands(3, 40, 40, offset=8.0, dtype=np.float16)
    received = run(half, **given_operands)[0]
    assert received.dtype == np.float16
    # The result is rounded to 11 bits once, at values up to about 16.
    np.testing.assert_allclose(received.astype(np.float64), in_float64(**given_operands), atol=8e-3)


def test_postcondition() -> None:
    with pytest.raises(PostconditionError, match="GroupNormalization"):
        LowerGroupNormPass().ensures(model())


def test_a_channel_count_that_is_not_fixed_is_refused() -> None:
    with pytest.raises(AssertionError, match="norm: type, rank or channel count"):
        LowerGroupNormPass().call(model(channels=None))
