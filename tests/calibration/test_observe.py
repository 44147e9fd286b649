"""Observing: every layout of channels against NumPy, division on the fly, and where a NaN is said to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.calibration import observe
from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.observe import ChannelExtremes, ChannelLayout, ObservedTensor, Observer, row_pieces
from reelforge.calibration.scale_file import ScaleKind
from reelforge.calibration.statistics import TensorStatistics

SHAPES = {ChannelLayout.LAST: (2, 5, 6), ChannelLayout.SECOND: (2, 6, 3, 2, 4), ChannelLayout.HEADS: (2, 3, 7, 2)}


def random_array(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def as_rows(values: np.ndarray, layout: ChannelLayout) -> np.ndarray:
    """The layouts restated."""
    if layout is ChannelLayout.SECOND:
        return np.concatenate([item.reshape(6, -1).T for item in values])
    if layout is ChannelLayout.HEADS:
        return np.einsum("bhsd->bshd", values).reshape(-1, 6)
    return values.reshape(-1, 6)


def tensor(layout: ChannelLayout = ChannelLayout.LAST, layer: str = "double.0.image.q") -> ObservedTensor:
    return ObservedTensor("dit", layer, ScaleKind.ACTIVATION, 6, layout)


@pytest.mark.parametrize("layout", ChannelLayout)
@pytest.mark.parametrize("elements", [1, 13, 1 << 20])
def test_pieces_are_all_rows_with_channels_last(
    layout: ChannelLayout, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "_PIECE_ELEMENTS", elements)
    values = random_array(*SHAPES[layout])
    pieces = list(row_pieces(values, layout))
    assert all(piece.size <= max(elements, 6) for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), as_rows(values, layout))


@pytest.mark.parametrize("layout", ChannelLayout)
def test_large_tensors_are_not_copied(layout: ChannelLayout) -> None:
    values = random_array(*SHAPES[layout])
    shared = [np.may_share_memory(piece, values) for piece in row_pieces(values, layout)]
    assert all(shared) is (layout is not ChannelLayout.HEADS)  # where heads lie apart, one piece at a time is copied


@pytest.mark.parametrize("layout", ChannelLayout)
@pytest.mark.parametrize("divided", [False, True])
def test_statistics_are_those_of_the_divided_tensor(layout: ChannelLayout, divided: bool) -> None:
    divisors = np.linspace(0.25, 3, 6, dtype=np.float32)
    observed = tensor(layout)
    observer = Observer([observed], (), {observed.name: divisors} if divided else {})
    batches = [random_array(*SHAPES[layout]) * (k + 1) for k in range(3)]
    for step, batch in enumerate(batches):
        observer.update(observed.name, batch, step)
    rows = np.concatenate([as_rows(batch, layout) for batch in batches])
    expected = TensorStatistics(6)
    expected.update(rows / divisors if divided else rows)
    received = observer.statistics[observed.name].to_arrays()
    for name, array in expected.to_arrays().items():
        np.testing.assert_array_equal(received[name], array)


@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=2), max_size=8))
def test_channel_extremes(rows: list[list[float]]) -> None:
    extremes = ChannelExtremes(2)
    for row in rows:
        extremes.update(np.array([row], np.float32))
    extremes.update(np.empty((0, 2), np.float32))
    whole = np.array(rows, np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(extremes.lowest, whole.min(axis=0, initial=0))
    np.testing.assert_array_equal(extremes.highest, whole.max(axis=0, initial=0))
    np.testing.assert_array_equal(extremes.magnitudes, np.abs(whole).max(axis=0, initial=0))
    for array in (extremes.lowest, extremes.highest):
        assert not np.signbit(array[array == 0]).any()
    assert extremes.count == whole.size


def test_extremes_after_a_division_follow_from_those_before() -> None:
    """Why scales of the method max need no second pass."""
    values, divisors = random_array(1000, 6), np.geomspace(1e-3, 1e3, 6).astype(np.float32)
    extremes = ChannelExtremes(6)
    extremes.update(values)
    np.testing.assert_array_equal(extremes.lowest / divisors, (values / divisors).min(axis=0))
    np.testing.assert_array_equal(extremes.highest / divisors, (values / divisors).max(axis=0))


@pytest.mark.parametrize("extremes_only", [False, True])
@pytest.mark.parametrize("step", [7, None])
def test_what_is_not_finite_is_located_and_counted_whole(
    extremes_only: bool, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "_PIECE_ELEMENTS", 12)
    observed = tensor()
    observer = Observer([observed], [observed.name] if extremes_only else [])
    values = random_array(20, 6)
    values[[3, 11, 19], 2], values[5, 0] = np.nan, np.inf
    with pytest.raises(NonFiniteError) as caught:
        observer.update(observed.name, values, step)
    at_step = "" if step is None else " at step 7"
    assert f"the input of layer 'double.0.image.q' of stage 'dit'{at_step} holds values" in str(caught.value)
    assert "received: 3 NaN and 1 infinite of 120 elements" in str(caught.value)


def test_a_division_that_overflows_is_reported_too() -> None:
    observed = tensor()
    observer = Observer([observed], (), {observed.name: np.full(6, 2.0**-10, np.float32)})
    with np.errstate(over="ignore"), pytest.raises(NonFiniteError, match="0 NaN and 6 infinite of 6 elements"):
        observer.update(observed.name, np.full((1, 6), 1e38, np.float32))


def test_arrays_continue_an_observer() -> None:
    tensors = [tensor(layer=name) for name in ("a", "b", "c/d")]
    few = [tensors[1].name]
    whole, first, second = (Observer(tensors, few) for _ in range(3))
    batches = [random_array(4, 6) * (k + 1) for k in range(4)]
    for own, part in ((whole, batches), (first, batches[:2])):
        for batch in part:
            for each in tensors:
                own.update(each.name, batch)
    second.load_arrays(first.to_arrays())
    for batch in batches[2:]:
        for each in tensors:
            second.update(each.name, batch)
    expected, received = whole.to_arrays(), second.to_arrays()
    assert list(received) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(received[name], array)


def test_missing_or_damaged_arrays_are_refused() -> None:
    few, full = tensor(layer="a"), tensor(layer="b")
    observer = Observer([few, full], [few.name])
    arrays = observer.to_arrays()
    for name in (f"{few.name}/channel_extremes", f"{full.name}/histogram"):
        with pytest.raises(CalibrationError, match="damaged or were written by another version") as caught:
            observer.load_arrays({key: array for key, array in arrays.items() if key != name})
        assert "delete them and calibrate again" in str(caught.value)
