"""Maxima per input channel of stored weights, read in pieces, against NumPy over the whole weight."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from reelforge.calibration import weight_maxima
from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.weight_maxima import stored_channel_maxima
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import WeightEntry

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def stored(folder: Path, weight: np.ndarray, dtype: str) -> WeightEntry:
    data = weight.astype(DTYPES[dtype]).tobytes()
    (folder / "w.bin").write_bytes(b"\xff" * 24 + data + b"\xff" * 8)
    return WeightEntry("fc1.weight", dtype, weight.shape, "w.bin", 24, len(data), "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3, 1, 2)])
@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 24])
def test_maxima(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_maxima, "_PIECE_BYTES", piece_bytes)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    received = stored_channel_maxima(tmp_path, stored(tmp_path, weight, dtype))
    others = tuple(axis for axis in range(weight.ndim) if axis != 1)
    np.testing.assert_array_equal(received, np.abs(weight.astype(DTYPES[dtype]).astype(np.float32)).max(axis=others))
    assert received.dtype == np.float32


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    weight = np.ones((4, 3), np.float32)
    entry = stored(tmp_path, weight, "F32")
    with pytest.raises(CalibrationError, match=r"'fc1\.weight' cannot be smoothed as it is stored") as caught:
        stored_channel_maxima(tmp_path, entry_as(entry, "I8"))
    assert "received: I8" in str(caught.value)
    weight[2, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"the weight 'fc1\.weight'.* holds values that are not finite"):
        stored_channel_maxima(tmp_path, stored(tmp_path, weight, "F32"))
    (tmp_path / "w.bin").write_bytes(b"\0" * 40)
    with pytest.raises(BundleError, match=r"the weight 'fc1\.weight' cannot be read from 'w\.bin'"):
        stored_channel_maxima(tmp_path, entry)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(BundleError, match="No such file"):
        stored_channel_maxima(tmp_path, entry)


def entry_as(entry: WeightEntry, dtype: str) -> WeightEntry:
    return WeightEntry(entry.name, dtype, entry.shape, entry.file, entry.offset, entry.length, "")
