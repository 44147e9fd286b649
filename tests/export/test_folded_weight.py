"""Weights whose rows change while they are read, against the same arithmetic on the whole array in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reelforge.export.checkpoint.sources import Columns, Conversion, HalfSplit, Resolved, Rows, Whole, loaded, resolve
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.folded_weight import FoldedWeight
from reelforge.export.quantisation import RowAffine

STORED: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPES = [(1,), (6,), (4, 5), (1, 7), (6, 1), (4, 3, 2), (2, 3, 1, 3, 3)]


def stored(folder: Path, values: NDArray[Any], dtype: str) -> TensorRef:
    """Write the values behind a few other bytes and return where they lie."""
    path = folder / "tensor.bin"
    path.write_bytes(b"other" + values.astype(STORED[dtype]).tobytes())
    return TensorRef("w", path, 5, dtype, values.shape)


def in_memory(source: Resolved, affine: RowAffine) -> NDArray[Any]:
    """``w * m + o`` in float64, rounded once: what the stream must equal bit for bit."""
    rows = [-1, *[1] * (len(source.shape) - 1)]
    values = loaded(source).astype(np.float64) * affine.multiplier.reshape(rows) + affine.offset.reshape(rows)
    return values.astype(np.float32 if source.dtype == "F32" else np.float16)


def read(weight: FoldedWeight, limit: int | None = None) -> bytes:
    pieces = weight.pieces() if limit is None else weight.pieces(limit)
    return b"".join([piece.tobytes() for piece in pieces])


def random_affine(random: np.random.Generator, rows: int) -> RowAffine:
    return RowAffine(np.exp2(random.uniform(-3, 3, rows)), random.standard_normal(rows))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(sorted(STORED)),
    elements=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_pieces_of_any_length(tmp_path: Path, shape: tuple[int, ...], dtype: str, elements: int, seed: int) -> None:
    """Rows are cut anywhere: in pieces of one element up to the whole tensor, biases and convolutions alike."""
    random = np.random.default_rng(seed)
    source = stored(tmp_path, random.standard_normal(shape), dtype)
    weight = FoldedWeight(source, random_affine(random, shape[0]))
    limit = elements * np.dtype(STORED[dtype]).itemsize
    assert all(len(piece) <= 2 * limit for piece in weight.pieces(limit))
    assert read(weight, limit) == in_memory(source, weight.affine).tobytes()
    assert read(weight) == read(weight, limit)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=st.sampled_from([HalfSplit(Whole("w"), 4), HalfSplit(Rows("w", 4, 8), 4), Columns("w", 1, 4)]),
    dtype=st.sampled_from(sorted(STORED)),
    limit=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_converted_sources(tmp_path: Path, how: HalfSplit | Columns, dtype: str, limit: int, seed: int) -> None:
    """Rows are those of the parameter, not those of the stored tensor."""
    random = np.random.default_rng(seed)
    ref = stored(tmp_path, random.standard_normal((8, 6)), dtype)
    selection = how.select(ref.shape)
    shape = (len(selection.rows), selection.column_stop - selection.column_start)
    source = resolve(how, {"w": ref}, shape)
    assert isinstance(source, Conversion)
    weight = FoldedWeight(source, random_affine(random, shape[0]))
    assert read(weight, limit) == in_memory(source, weight.affine).tobytes()


@pytest.mark.parametrize(("dtype", "expected"), [("F32", "F32"), ("F16", "F16"), ("BF16", "F16")])
def test_the_result_s_type(tmp_path: Path, dtype: str, expected: str) -> None:
    source = stored(tmp_path, np.ones((3, 4)), dtype)
    weight = FoldedWeight(source, RowAffine.identity(3))
    assert weight.dtype == expected
    assert weight.shape == (3, 4)
    assert weight.nbytes == len(read(weight)) == 12 * np.dtype(STORED[expected]).itemsize


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_nothing_changes_without_factors(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((5, 3))
    source = stored(tmp_path, values, dtype)
    assert read(FoldedWeight(source, RowAffine.identity(5))) == values.astype(STORED[dtype]).tobytes()


def test_bf16_values_in_range_are_kept_to_fp16_s_precision(tmp_path: Path) -> None:
    """Half a step of fp16, 2**-12 to 2**-11 of the value: far below what 8 bits lose, not below what fp32 sees."""
    random = np.random.default_rng(1)
    source = stored(tmp_path, random.standard_normal((64, 16)), "BF16")
    factors = np.exp2(random.uniform(-3, 3, 64))
    weight = FoldedWeight(source, RowAffine(1 / factors, np.zeros(64)))
    received = np.frombuffer(read(weight), np.float16).reshape(64, 16).astype(np.float64)
    exact = loaded(source).astype(np.float64) / factors[:, None]
    normal = np.abs(exact) >= np.finfo(np.float16).tiny
    assert normal.mean() > 0.99
    assert (np.abs(received - exact)[normal] <= 2.0**-11 * np.abs(exact)[normal]).all()


def test_offsets_are_added_after_the_product(tmp_path: Path) -> None:
    """One row of a scale's bias: ``(b + 1) / s - 1``."""
    source = stored(tmp_path, np.array([0.25, 0.25]), "F32")
    weight = FoldedWeight(source, RowAffine(np.array([0.5, 1.0]), np.array([-0.5, 0.0])))
    np.testing.assert_array_equal(np.frombuffer(read(weight), np.float32), [(0.25 + 1) / 2 - 1, 0.25])


def test_numbers_that_are_not_finite_stay_so(tmp_path: Path) -> None:
    """They are counted where the result is written, so that nothing may hide them."""
    source = stored(tmp_path, np.array([[np.nan, 1.0], [np.inf, 1.0]]), "BF16")
    values = np.frombuffer(read(FoldedWeight(source, RowAffine(np.full(2, 0.5), np.ones(2)))), np.float16)
    np.testing.assert_array_equal(values, np.array([np.nan, 1.5, np.inf, 1.5], np.float16))


def test_nothing_is_yielded_of_nothing(tmp_path: Path) -> None:
    source = stored(tmp_path, np.empty((0, 4)), "F32")
    assert list(FoldedWeight(source, RowAffine.identity(0)).pieces()) == []


def test_pieces_belong_to_the_caller(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((6, 4))
    weight = FoldedWeight(stored(tmp_path, values, "F32"), RowAffine.identity(6))
    assert b"".join(piece.tobytes() for piece in list(weight.pieces(16))) == values.astype(np.float32).tobytes()
