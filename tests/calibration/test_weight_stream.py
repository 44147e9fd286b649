"""The weight stream against the same computation in memory, and its casts against ml_dtypes and the format's grid."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration import cast_numpy, cast_torch, weight_stream
from reelforge.calibration.casts import Casts
from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FORMATS, FP8_E4M3, INT8, NumberFormat, dequantise, quantise
from reelforge.calibration.scale_methods import weight_scales
from reelforge.calibration.smoothing import fold_into_affine, fold_into_weight
from reelforge.calibration.weight_stream import WeightQuantisation, quantised_pieces

STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
every_format = pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
every_dtype = pytest.mark.parametrize("dtype", STORED)
factors = st.floats(2.0**-10, 2.0**10, width=32)


def cut(data: bytes, size: int) -> Iterator[np.ndarray]:
    """One buffer for all pieces, as readers have: whoever keeps an old piece sees it change."""
    buffer = np.empty(size, np.uint8)
    for start in range(0, len(data), size):
        piece = buffer[: len(data[start : start + size])]
        piece[:] = np.frombuffer(data[start : start + size], np.uint8)
        yield piece
        buffer[:] = 0xA5


def stream(weight: np.ndarray, how: WeightQuantisation, size: int = 1 << 20) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes, scales) of the stream, with both libraries' casts, which must agree in every bit."""
    codes, scales = stream_with(cast_numpy, weight, how, size)
    other_codes, other_scales = stream_with(cast_torch, weight, how, size)
    np.testing.assert_array_equal(codes.view(np.uint8), other_codes.view(np.uint8))
    np.testing.assert_array_equal(scales, other_scales)
    return codes, scales


def stream_with(
    casts: Casts, weight: np.ndarray, how: WeightQuantisation, size: int = 1 << 20
) -> tuple[np.ndarray, np.ndarray]:
    names = {stored: name for name, stored in STORED.items()}
    scales = np.full(weight.shape[0], np.nan, np.float32)
    pieces = cut(weight.tobytes(), size)
    written = quantised_pieces("w", names[weight.dtype], weight.shape, pieces, how, scales, casts)
    data = b"".join(piece.tobytes() for piece in written)
    return np.frombuffer(data, how.number_format.dtype).reshape(weight.shape), scales


def require_equal_to_memory(
    weight: np.ndarray, folded: np.ndarray, how: WeightQuantisation, size: int = 1 << 20
) -> np.ndarray:
    codes, scales = stream(weight, how, size)
    expected = weight_scales(folded, how.number_format)
    np.testing.assert_array_equal(scales, expected)
    in_memory = quantise(folded, expected, how.number_format, axis=0)
    np.testing.assert_array_equal(codes.view(np.uint8), in_memory.view(np.uint8))
    return codes


@every_format
@every_dtype
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_equals_the_same_in_memory(number_format: NumberFormat, dtype: str, data: st.DataObject) -> None:
    stored = STORED[dtype]
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=5)))
    bits = data.draw(hnp.arrays(f"u{stored.itemsize}", shape))
    weight = bits.view(stored)
    weight = np.where(np.isfinite(weight), weight, stored.type(1))
    column_factors = data.draw(st.none() | hnp.arrays(np.float32, shape[1], elements=factors))
    row_divisors = data.draw(st.none() | hnp.arrays(np.float32, shape[0], elements=factors))
    folded = weight.astype(np.float32)
    if column_factors is not None:
        matrix = folded.reshape(shape[0], -1)
        repeated = np.repeat(column_factors, math.prod(shape[2:]))
        with np.errstate(over="ignore"):
            folded = fold_into_weight(matrix, repeated).reshape(shape)
    if row_divisors is not None:
        with np.errstate(over="ignore"):
            folded = fold_into_affine(folded, None, row_divisors).weight
    how = WeightQuantisation(number_format, column_factors, row_divisors)
    size = data.draw(st.integers(1, weight.nbytes + 1))
    if np.isfinite(folded).all():
        require_equal_to_memory(weight, folded, how, size)
    else:
        with pytest.raises(CalibrationError, match="'w' holds values that are not finite once smoothing is folded in"):
            stream(weight, how, size)


@every_format
@every_dtype
@pytest.mark.parametrize("block", [1, 24, 100])
def test_blocks_smaller_than_pieces(
    number_format: NumberFormat, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_stream, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((19, 12)).astype(STORED[dtype])
    columns, rows = (rng.uniform(0.1, 10, size).astype(np.float32) for size in (12, 19))
    require_equal_to_memory(weight, weight, WeightQuantisation(number_format), 100)
    folded = fold_into_affine(fold_into_weight(weight, columns), None, rows).weight
    require_equal_to_memory(weight, folded, WeightQuantisation(number_format, columns, rows), 100)


@every_format
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_half_precision_number(number_format: NumberFormat, dtype: str) -> None:
    """All finite bit patterns: each as the largest of its channel, and with each divided by several scales."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(STORED[dtype])
    patterns = patterns[np.isfinite(patterns.astype(np.float32))]
    alone = np.stack([patterns, patterns / STORED[dtype].type(3), -patterns], axis=1)
    require_equal_to_memory(alone, alone, WeightQuantisation(number_format))
    ordered = np.sort(patterns.astype(np.float32)).astype(STORED[dtype])  # each row has its own range
    rows = ordered[: len(ordered) // 512 * 512].reshape(-1, 512)
    require_equal_to_memory(rows, rows, WeightQuantisation(number_format))
    require_equal_to_memory(rows.T.copy(), rows.T, WeightQuantisation(number_format))


def on_scale_one(numbers: np.ndarray) -> np.ndarray:
    """Return codes of fp32 numbers up to 448 in FP8, quantised with the scale one."""
    weight = np.append(numbers, np.float32(448))[None]
    codes, scales = stream(weight, WeightQuantisation(FP8_E4M3))
    assert scales[0] == 1
    return codes[0, :-1]


def test_fp8_around_every_value_and_every_tie() -> None:
    grid = FP8_E4M3.grid.astype(np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    points = np.concatenate([points[points <= 448], -points[points <= 448]])
    codes = on_scale_one(points)
    np.testing.assert_array_equal(codes.view(np.uint8), points.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    # An oracle that knows nothing of bits: the nearest value of the grid, and the even one of two.
    distance = np.abs(np.abs(points)[:, None] - grid)
    index = np.argmin(distance, axis=1)
    tie = np.isclose(np.sort(distance, axis=1)[:, 0], np.sort(distance, axis=1)[:, 1], rtol=0, atol=0)
    index += tie & (index % 2 == 1)
    np.testing.assert_array_equal(codes.astype(np.float32), np.copysign(grid[index], points))


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-448, 448, width=32)))
@settings(deadline=None)
def test_fp8_equals_ml_dtypes_bit_for_bit(numbers: np.ndarray) -> None:
    expected = numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(on_scale_one(numbers).view(np.uint8), expected)


def test_fp8_equals_ml_dtypes_over_all_exponents() -> None:
    """Every 4099th of all fp32 numbers up to 448, both signs, subnormals and both zeros included."""
    bits = np.arange(0, int(np.float32(448).view(np.uint32)) + 1, 4099, dtype=np.uint32)
    numbers = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    expected = numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(on_scale_one(numbers).view(np.uint8), expected)


def test_int8_rounds_half_to_even() -> None:
    numbers = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, -0.0, 127]], np.float32)
    codes, scales = stream(numbers, WeightQuantisation(INT8))
    assert scales == [1]
    np.testing.assert_array_equal(codes, [[0, 2, 2, 0, -2, 126, -126, 0, 127]])


@every_format
@given(data=st.data())
@settings(deadline=None)
def test_comes_back_within_half_a_step(number_format: NumberFormat, data: st.DataObject) -> None:
    shape = (3, data.draw(st.integers(1, 20)))
    weight = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
    codes, scales = stream(weight, WeightQuantisation(number_format))
    values = codes.astype(np.float32)
    assert (np.abs(values) <= number_format.largest).all()  # no NaN, no -128
    difference = np.abs(dequantise(codes, scales, axis=0).astype(np.float64) - weight)
    steps = number_format.step(weight / scales[:, None].astype(np.float64))
    slack = 4 * np.finfo(np.float32).eps * np.abs(weight.astype(np.float64)) + 1e-44
    assert (difference <= steps / 2 * scales[:, None] + slack).all()


@every_format
@every_dtype
def test_a_channel_of_zeros(number_format: NumberFormat, dtype: str) -> None:
    weight = np.ones((3, 4), STORED[dtype])
    weight[1] = 0
    weight[1, 2] = -0.0
    codes, scales = stream(weight, WeightQuantisation(number_format))
    assert scales[1] == 1
    np.testing.assert_array_equal(codes[1].astype(np.float32), 0)
    np.testing.assert_array_equal(codes[[0, 2]].astype(np.float32), number_format.largest)


@every_format
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_weights(number_format: NumberFormat, shape: tuple[int, int]) -> None:
    codes, scales = stream(np.empty(shape, np.float32), WeightQuantisation(number_format))
    assert codes.shape == shape
    np.testing.assert_array_equal(scales, np.ones(shape[0], np.float32))


@every_format
@every_dtype
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("casts", [cast_numpy, cast_torch], ids=["numpy", "torch"])
def test_values_that_are_not_finite_are_named(
    number_format: NumberFormat, dtype: str, value: float, folds: bool, casts: Casts
) -> None:
    weight = np.full((6, 5), -1, STORED[dtype])
    weight[4, 2] = value
    how = WeightQuantisation(number_format, *([np.ones(5, np.float32), np.ones(6, np.float32)] if folds else []))
    with pytest.raises(CalibrationError) as caught:
        stream_with(casts, weight, how, 11)
    message = str(caught.value)
    assert "the weight 'w' holds values that are not finite" in message
    assert "received: NaN or infinity in output channel 4   expected: finite values" in message
    assert "fix: restore the checkpoint's file" in message
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8"])
def test_types_that_are_not_quantised(dtype: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        quantised_pieces("double.0.v.weight", dtype, (2, 2), [], WeightQuantisation(INT8), np.ones(2, np.float32))
    message = str(caught.value)
    assert "the weight 'double.0.v.weight' cannot be quantised" in message
    assert f"received: values of type {dtype}   expected: BF16 or F16 or F32" in message
    assert "fix: use a checkpoint that is not quantised already" in message


@pytest.mark.parametrize(
    ("shape", "how", "rows", "message"),
    [
        ((4,), WeightQuantisation(INT8), 4, "two dimensions"),
        ((4, 2), WeightQuantisation(INT8), 3, "scales of 'w'"),
        ((4, 2), WeightQuantisation(INT8, np.ones(4, np.float32)), 4, r"column factors of 'w' have shape \[4\]"),
        ((4, 2), WeightQuantisation(INT8, None, np.ones(4)), 4, r"row divisors .* float64, expected fp32 \[4\]"),
        ((4, 2), WeightQuantisation(INT8, np.array([1, 0], np.float32)), 4, "not all positive and finite"),
        ((4, 2), WeightQuantisation(INT8, None, np.full(4, np.inf, np.float32)), 4, "not all positive and finite"),
    ],
)
def test_refuses_what_does_not_fit(shape: tuple[int, ...], how: WeightQuantisation, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantised_pieces("w", "F32", shape, [], how, np.ones(rows, np.float32))


@pytest.mark.parametrize(
    ("length", "message"),
    [(24, "ended after 3 of 4 rows"), (36, "ended 4 bytes into a row of 8"), (40, "longer than 4 rows")],
)
def test_streams_of_another_length(length: int, message: str) -> None:
    pieces = cut(bytes(length), 5)
    with pytest.raises(ValueError, match=message):
        list(quantised_pieces("w", "F32", (4, 2), pieces, WeightQuantisation(INT8), np.ones(4, np.float32)))


@pytest.mark.parametrize("casts", [cast_numpy, cast_torch], ids=["numpy", "torch"])
@pytest.mark.filterwarnings("error")
def test_pieces_that_cannot_be_written_to_or_lie_askew(casts: Casts) -> None:
    weight = np.arange(-20, 20, dtype=np.float32).reshape(4, 10)
    expected, _ = stream(weight, WeightQuantisation(INT8))
    askew = np.frombuffer(b"x" + weight.tobytes(), np.uint8)[1:]
    assert not askew.flags.writeable
    scales = np.ones(4, np.float32)
    for data in (askew, np.frombuffer(weight.tobytes(), np.uint8)):
        written = list(quantised_pieces("w", "F32", (4, 10), [data], WeightQuantisation(INT8), scales, casts))
        assert b"".join(piece.tobytes() for piece in written) == expected.tobytes()


def test_memory_does_not_depend_on_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes come as the bytes go in, not at the end."""
    row = np.ones((1, 64), np.float32).tobytes()
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.frombuffer(bytearray(row), np.uint8)

    scales = np.ones(10**6, np.float32)
    written = quantised_pieces("w", "F32", (10**6, 64), endless(), WeightQuantisation(FP8_E4M3), scales)
    for _ in range(5):
        next(written)
    assert taken == 5
