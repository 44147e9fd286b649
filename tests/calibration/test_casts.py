"""Both libraries' casts against each other and ml_dtypes, and the rule that chooses between them."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reelforge.calibration import cast_numpy, cast_torch
from reelforge.calibration.casts import TORCH_PAYS_ELEMENTS, Casts, CastWork, choose_casts
from reelforge.calibration.number_formats import FORMATS, FP8_E4M3, INT8, NumberFormat

STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
every_library = pytest.mark.parametrize("casts", [cast_numpy, cast_torch], ids=["numpy", "torch"])


def narrowed(casts: Casts, numbers: np.ndarray, number_format: NumberFormat) -> np.ndarray:
    codes = np.full(numbers.shape, 0xA5, np.uint8)
    casts.narrow(numbers.copy(), number_format, codes)
    return codes


def expected_codes(numbers: np.ndarray, number_format: NumberFormat) -> np.ndarray:
    rounded = np.rint(numbers) if number_format is INT8 else numbers
    return rounded.astype(number_format.dtype).view(np.uint8)


@every_library
@pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
@given(data=st.data())
@settings(deadline=None)
def test_codes_are_those_of_ml_dtypes(casts: Casts, number_format: NumberFormat, data: st.DataObject) -> None:
    largest = float(np.nextafter(np.float32(number_format.largest), np.float32(np.inf)))  # a quotient may be above
    shape = data.draw(hnp.array_shapes(max_dims=2, max_side=9))
    numbers = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-largest, largest, width=32)))
    np.testing.assert_array_equal(narrowed(casts, numbers, number_format), expected_codes(numbers, number_format))


@every_library
@pytest.mark.parametrize("sign", [0, 1 << 31])
@pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
def test_codes_over_all_exponents(casts: Casts, sign: int, number_format: NumberFormat) -> None:
    """Every 1021st of all fp32 numbers up to the largest; subnormals and zero included, and more than one chunk."""
    bits = np.arange(0, int(np.float32(number_format.largest).view(np.uint32)) + 1, 1021, dtype=np.uint32)
    assert len(bits) > 2 * cast_numpy._CHUNK_ELEMENTS
    numbers = (bits | np.uint32(sign)).view(np.float32)
    np.testing.assert_array_equal(narrowed(casts, numbers, number_format), expected_codes(numbers, number_format))


@every_library
def test_fp8_next_to_every_value_and_every_tie(casts: Casts) -> None:
    grid = FP8_E4M3.grid.astype(np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(1000)), np.nextafter(points, np.float32(0))])
    numbers = np.concatenate([points, -points])
    np.testing.assert_array_equal(narrowed(casts, numbers, FP8_E4M3), expected_codes(numbers, FP8_E4M3))


@every_library
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.filterwarnings("error")
def test_every_half_precision_number_is_widened_exactly(casts: Casts, dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16).view(STORED[dtype])
    patterns.flags.writeable = False
    out = np.empty(patterns.shape, np.float32)
    casts.widen(patterns, out)
    finite = np.isfinite(patterns.astype(np.float32))
    np.testing.assert_array_equal(out[finite].view(np.uint32), patterns[finite].astype(np.float32).view(np.uint32))
    assert not np.isfinite(out[~finite]).any()


@every_library
@given(bits=hnp.arrays(np.uint32, st.integers(1, 60)))
@settings(deadline=None)
def test_fp32_is_copied(casts: Casts, bits: np.ndarray) -> None:
    out = np.empty(bits.shape, np.float32)
    casts.widen(bits.view(np.float32), out)
    np.testing.assert_array_equal(out.view(np.uint32), bits)


def test_torchs_number_of_threads_is_restored() -> None:
    inside = []

    def fail() -> None:
        with cast_torch.one_thread_per_operation():
            inside.append(torch.get_num_threads())
            raise KeyError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError):
            fail()
        assert (inside, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "number_format", "gains"),
    [("BF16", INT8, False), ("F32", INT8, False), ("F16", INT8, True), ("BF16", FP8_E4M3, True)],
)
def test_torch_is_used_where_it_is_faster_and_loaded(dtype: str, number_format: NumberFormat, gains: bool) -> None:
    assert "torch" in sys.modules
    assert choose_casts([CastWork(dtype, 1 << 40, number_format)]) is (cast_torch if gains else cast_numpy)
    assert choose_casts([CastWork(dtype, 1, number_format)]) is (cast_torch if gains else cast_numpy)


def test_torch_is_loaded_only_where_it_pays() -> None:
    """All weights together count, and only those that NumPy is slower at."""
    program = f"""
import sys
from reelforge.calibration.casts import CastWork, choose_casts
from reelforge.calibration.number_formats import FP8_E4M3, INT8
half = {TORCH_PAYS_ELEMENTS} // 2
numpy_casts = choose_casts([CastWork("BF16", half, FP8_E4M3), CastWork("BF16", 100 * half, INT8)])
print(numpy_casts.__name__, "torch" in sys.modules)
print(choose_casts([CastWork("BF16", half, FP8_E4M3), CastWork("F16", half, INT8)]).__name__, "torch" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == ["reelforge.calibration.cast_numpy False", "reelforge.calibration.cast_torch True"]
