"""The 8-bit formats against ml_dtypes, ONNX's reference rounding, and their own definition of a step."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration.errors import NonFiniteError
from reelforge.calibration.number_formats import (
    FORMATS,
    FP8_E4M3,
    INT8,
    NumberFormat,
    dequantise,
    quantise,
    unsigned_codes,
)

every_format = pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=finite)
scales = st.floats(2.0**-40, 2.0**40, width=32)


@every_format
@given(data=st.data())
@settings(deadline=None)
def test_round_trip_is_within_half_a_step(number_format: NumberFormat, data: st.DataObject) -> None:
    scale = np.float32(data.draw(scales))
    units = hnp.arrays(np.float32, 20, elements=st.floats(-number_format.largest, number_format.largest, width=32))
    values = data.draw(units) * scale
    difference = np.abs(dequantise(quantise(values, scale, number_format), scale).astype(np.float64) - values)
    # The division's and the product's own fp32 rounding can move a tie, by at most two units in the last place.
    slack = 4 * np.finfo(np.float32).eps * np.abs(values.astype(np.float64)) + 1e-44
    assert (difference <= number_format.step(values / scale) / 2 * scale + slack).all()


@every_format
@given(vectors, scales)
@settings(deadline=None)
def test_saturates_and_is_symmetric(number_format: NumberFormat, values: np.ndarray, scale: float) -> None:
    codes = quantise(values, scale, number_format)
    assert codes.dtype == number_format.dtype
    assert (np.abs(codes.astype(np.float32)) <= number_format.largest).all()
    np.testing.assert_array_equal(quantise(-values, scale, number_format).astype(np.float32), -codes.astype(np.float32))
    again = quantise(dequantise(codes, 1.0), 1.0, number_format)
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))


@given(vectors)
@settings(deadline=None)
def test_fp8_equals_ml_dtypes_bit_for_bit(values: np.ndarray) -> None:
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(quantise(values, 1.0, FP8_E4M3).view(np.uint8), expected.view(np.uint8))


def test_fp8_equals_ml_dtypes_around_every_value_and_every_tie() -> None:
    grid = FP8_E4M3.grid.astype(np.float32)
    assert len(grid) == 127
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    points = np.concatenate([points, -points])
    points = points[np.abs(points) <= 448]
    expected = points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(quantise(points, 1.0, FP8_E4M3).view(np.uint8), expected)
    # An oracle that knows nothing of bits: the nearest value of the grid.
    nearest = np.abs(np.abs(points)[:, None] - grid).min(axis=1)
    received = dequantise(quantise(points, 1.0, FP8_E4M3), 1.0)
    np.testing.assert_array_equal(np.abs(received - points), nearest)


@pytest.mark.parametrize("value", [448.1, 464.0, 465.0, 1e9, 3e38, np.inf])
def test_fp8_overflow_is_the_largest_value_and_never_nan(value: float) -> None:
    codes = quantise(np.array([value, -value], np.float32), 0.5, FP8_E4M3)
    np.testing.assert_array_equal(codes.astype(np.float32), [448, -448])


def test_int8_rounds_half_to_even_and_leaves_the_lowest_code_out() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -127.6, -1000, 1000], np.float32)
    expected = [0, 2, 2, 0, -2, 126, 127, -127, -127, 127]
    np.testing.assert_array_equal(quantise(values, 1.0, INT8), np.array(expected, np.int8))


@every_format
def test_steps_are_the_distances_of_the_grid(number_format: NumberFormat) -> None:
    grid = number_format.grid
    assert grid[-1] == number_format.largest
    assert grid[1] == number_format.smallest_step
    np.testing.assert_array_equal(np.diff(grid), number_format.step((grid[1:] + grid[:-1]) / 2))


@every_format
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scales_along_an_axis(number_format: NumberFormat, axis: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    factors = np.linspace(0.01, 0.05, values.shape[axis]).astype(np.float32)
    codes = quantise(values, factors, number_format, axis)
    restored = dequantise(codes, factors, axis)
    for index, factor in enumerate(factors):
        one = quantise(np.take(values, index, axis), factor, number_format)
        np.testing.assert_array_equal(np.take(codes, index, axis).view(np.uint8), one.view(np.uint8))
        np.testing.assert_array_equal(np.take(restored, index, axis), dequantise(one, factor))


@every_format
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equals_the_engine_that_will_run_it(number_format: NumberFormat, axis: int | None) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    kind = {INT8: onnx.TensorProto.INT8, FP8_E4M3: onnx.TensorProto.FLOAT8E4M3FN}[number_format]
    values = np.random.default_rng(3).standard_normal((40, 50)).astype(np.float32)
    scale = np.full(() if axis is None else values.shape[axis], 4 / number_format.largest, np.float32)
    scale *= np.linspace(0.5, 1, scale.size, dtype=np.float32).reshape(scale.shape)
    values = np.maximum(values, -127 * scale.min())  # an engine may use -128, we do not
    helper = onnx.helper
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], **attributes),
    ]
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape) for name in "xy"]
    constants = [
        onnx.numpy_helper.from_array(scale, "scale"),
        helper.make_tensor("zero", kind, scale.shape, bytes(scale.size), raw=True),
    ]
    graph = helper.make_graph(nodes, "round_trip", tensors[:1], tensors[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(["y"], {"x": values})
    received = dequantise(quantise(values, scale, number_format, axis), scale, axis)
    np.testing.assert_array_equal(received, expected)


@every_format
def test_takes_half_precision_and_scalars(number_format: NumberFormat) -> None:
    values = np.array([1.0, -3.0, 0.25], ml_dtypes.bfloat16)
    expected = quantise(values.astype(np.float32), 0.25, number_format)
    np.testing.assert_array_equal(quantise(values, 0.25, number_format).view(np.uint8), expected.view(np.uint8))
    assert quantise(np.float32(3).reshape(()), 1.0, number_format).shape == ()
    assert quantise(np.zeros((0, 2), np.float32), 1.0, number_format).shape == (0, 2)


@every_format
def test_nan_is_an_error(number_format: NumberFormat) -> None:
    with pytest.raises(NonFiniteError, match="the tensor to quantise holds values that are not finite") as caught:
        quantise(np.array([1, np.nan, np.inf], np.float32), 1.0, number_format)
    assert "1 NaN and 0 infinite of 3 elements" in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_refuses_scales_that_are_not_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="zero, negative or not finite"):
        quantise(np.ones(2, np.float32), scale, INT8)
    with pytest.raises(ValueError, match="zero, negative or not finite"):
        dequantise(np.ones(2, np.int8), scale)


def test_refuses_scales_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[2\]"):
        quantise(np.ones((2, 3), np.float32), np.ones(3), INT8, axis=0)
    with pytest.raises(ValueError, match=r"shape \[1\], expected \[\]"):
        quantise(np.ones((2, 3), np.float32), np.ones(1), INT8)


def through_onnxruntime(values: np.ndarray, scale: float, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and values of its QuantizeLinear and DequantizeLinear on the CPU."""
    tensors = [
        onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"),
        onnx.numpy_helper.from_array(np.array(zero_point, np.uint8), "z"),
    ]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    outputs = [("q", onnx.TensorProto.UINT8), ("d", onnx.TensorProto.FLOAT)]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in outputs],
        tensors,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    codes, restored = session.run(["q", "d"], {"x": values})
    return codes, restored


ends = st.floats(0, 2.0**99, width=32)


@given(ends, ends, hnp.arrays(np.float64, 30, elements=st.floats(0, 1)))
@settings(deadline=None, max_examples=50)
def test_unsigned_codes_are_within_half_a_step_in_onnxruntime(below: float, above: float, places: np.ndarray) -> None:
    scale, zero_point = unsigned_codes(-below, above)
    assert scale == np.float32(scale) > 0
    values = (places * (below + above) - below).clip(-below, above).astype(np.float32)
    values[:3] = (-below, above, 0)
    codes, restored = through_onnxruntime(values, scale, zero_point)
    expected = np.clip(np.rint(values / np.float32(scale)) + zero_point, 0, 255)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(restored, (expected - zero_point).astype(np.float32) * np.float32(scale))
    difference = np.abs(restored.astype(np.float64) - values)
    slack = 1e-4 * scale  # fp32's own rounding of a quotient up to 255
    assert (difference <= scale / 2 + slack).all()
    assert restored[2] == 0


def test_unsigned_codes_by_hand() -> None:
    assert unsigned_codes(-128.0, 127.0) == (1.0, 128)
    assert unsigned_codes(0.0, 255.0) == (1.0, 0)
    assert unsigned_codes(-0.5, 0.0) == (np.float32(0.5 / 255), 255)
    assert unsigned_codes(0.0, 0.0) == (1.0, 0)
    assert unsigned_codes(-1e-45, 1e-45).scale == np.finfo(np.float32).tiny
    scale, zero_point = unsigned_codes(-0.17, 3.0)
    assert zero_point == 14
    assert scale == pytest.approx(3.17 / 255, rel=1e-7)


@pytest.mark.parametrize("limits", [(0.5, 1.0), (-1.0, -0.5), (-np.inf, 0.0), (0.0, np.nan), (np.nan, 1.0)])
def test_impossible_ranges(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be finite and hold zero"):
        unsigned_codes(*limits)
