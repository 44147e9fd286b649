"""Quantised weights in a bundle: equal to those computed in memory, and nothing left of a stage that fails."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FORMATS, FP8_E4M3, INT8, quantise
from reelforge.calibration.scale_methods import weight_scales
from reelforge.calibration.smoothing import fold_into_affine, fold_into_weight
from reelforge.calibration.weight_stream import WeightQuantisation
from reelforge.export import quantised_weights
from reelforge.export.checkpoint import safetensors_writer
from reelforge.export.checkpoint.sources import Conversion, Resolved, Selection, loaded
from reelforge.export.checkpoint.tensor_ref import TensorRef, nbytes_of
from reelforge.export.quantised_weights import QuantisedEntries, place_quantised, quantised_bytes
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import BuildError, CheckpointError

STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
Plan = Mapping[str, WeightQuantisation]


def stored(path: Path, arrays: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, Resolved]:
    """Write arrays one after the other into a file, from an odd offset on, and return references to them."""
    refs: dict[str, Resolved] = {}
    with path.open("wb") as file:
        file.write(b"x" * 13)
        for name, (dtype, array) in arrays.items():
            refs[name] = TensorRef(name, path, file.tell(), dtype, array.shape)
            file.write(array.tobytes())
    return refs


def permuted(weight: Resolved, seed: int = 0) -> Conversion:
    """The weight with its rows in another order and without its first column."""
    assert isinstance(weight, TensorRef)
    rows = np.random.default_rng(seed).permutation(weight.shape[0])
    shape = (weight.shape[0], weight.shape[1] - 1)
    return Conversion(weight, Selection(rows, 1, weight.shape[1]), weight.dtype, shape)


def example(path: Path) -> dict[str, Resolved]:
    """Weights of every stored type, convolutions among them, in place and converted."""
    rng = np.random.default_rng(11)
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for dtype, kind in STORED.items():
        arrays[f"{dtype}.linear.weight"] = (dtype, rng.standard_normal((40, 33)).astype(kind))
        arrays[f"{dtype}.conv.weight"] = (dtype, rng.standard_normal((6, 5, 3, 2, 2)).astype(kind))
        arrays[f"{dtype}.linear.bias"] = (dtype, rng.standard_normal(40).astype(kind))
    weights = stored(path, arrays)
    return weights | {f"{dtype}.q.weight": permuted(weights[f"{dtype}.linear.weight"]) for dtype in STORED}


def example_plan(weights: Mapping[str, Resolved]) -> dict[str, WeightQuantisation]:
    """Both formats, with every combination of folds."""
    rng = np.random.default_rng(5)
    plan = {}
    for index, (name, weight) in enumerate(weights.items()):
        if name.endswith(".bias"):
            continue
        columns = rng.uniform(0.1, 10, weight.shape[1]).astype(np.float32) if index & 2 else None
        rows = rng.uniform(0.1, 10, weight.shape[0]).astype(np.float32) if index & 4 else None
        plan[name] = WeightQuantisation(INT8 if index & 1 else FP8_E4M3, columns, rows)
    return plan


def in_memory(weight: Resolved, how: WeightQuantisation) -> tuple[bytes, bytes]:
    """Codes and scales of a whole weight, by the functions that do not stream."""
    values = loaded(weight).astype(np.float32)
    if how.column_factors is not None:
        aligned = how.column_factors.repeat(values[0, 0].size)
        values = fold_into_weight(values.reshape(len(values), -1), aligned).reshape(values.shape)
    if how.row_divisors is not None:
        values = fold_into_affine(values, None, how.row_divisors).weight
    scales = weight_scales(values, how.number_format)
    return quantise(values, scales, how.number_format, axis=0).tobytes(), scales.tobytes()


@contextmanager
def unsealed(output: Path) -> Iterator[BundleWriter]:
    """A writer whose bundle is thrown away at the end of the block."""
    stack = ExitStack()
    yield stack.enter_context(BundleWriter(output))
    with pytest.raises(RuntimeError, match="without seal"):
        stack.close()


def place(
    tmp_path: Path, weights: Mapping[str, Resolved], plan: Plan, threads: int = 2
) -> tuple[Path, dict[str, QuantisedEntries]]:
    """Place weights; the unfinished folder is kept by links, since a writer that does not seal removes it."""
    kept = tmp_path / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    with unsealed(tmp_path / "b") as writer:
        entries = place_quantised(writer, "dit", weights, plan, threads=threads)
        shutil.copytree(writer.folder, kept, copy_function=os.link)
    return kept, entries


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_equal_to_memory(
    folder: Path, entries: Mapping[str, QuantisedEntries], weights: Mapping, plan: Plan
) -> None:
    assert list(entries) == list(plan)
    contents = files(folder)
    for name, pair in entries.items():
        assert (pair.codes.name, pair.scale.name) == (name, f"{name}.scale")
        assert pair.codes.shape == weights[name].shape
        assert pair.scale.shape == weights[name].shape[:1]
        for entry, expected in zip(pair, in_memory(weights[name], plan[name]), strict=True):
            assert contents[entry.file][entry.offset : entry.offset + entry.length] == expected, entry.name
            assert entry.sha256 == hashlib.sha256(expected).hexdigest()
            assert entry.length == nbytes_of(entry.dtype, entry.shape)


def test_equals_the_same_in_memory(tmp_path: Path) -> None:
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    folder, entries = place(tmp_path, weights, plan)
    require_equal_to_memory(folder, entries, weights, plan)
    assert set(files(folder)) == {
        "weights/dit.int8.safetensors",
        "weights/dit.float8_e4m3fn.safetensors",
        "weights/dit.scales.safetensors",
    }
    for name, how in plan.items():
        codes, scale = entries[name]
        assert codes.file == f"weights/dit.{how.number_format.name}.safetensors"
        assert (codes.dtype, scale.dtype) == (how.number_format.safetensors_name, "F32")
        assert scale.file == "weights/dit.scales.safetensors"


def test_another_library_reads_the_files(tmp_path: Path) -> None:
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    folder, _ = place(tmp_path, weights, plan)
    seen = set()
    with safe_open(folder / "weights/dit.scales.safetensors", "pt") as scales:
        for number_format in FORMATS.values():
            with safe_open(folder / f"weights/dit.{number_format.name}.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    codes, expected = file.get_tensor(name), in_memory(weights[name], plan[name])
                    assert codes.shape == weights[name].shape
                    assert codes.view(torch.uint8).numpy().tobytes() == expected[0]
                    assert scales.get_tensor(f"{name}.scale").numpy().tobytes() == expected[1]
                    seen.add(name)
        assert set(scales.keys()) == {f"{name}.scale" for name in plan}
    assert seen == set(plan)


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_stages(tmp_path: Path, data: st.DataObject) -> None:
    """Random shapes, types and formats, read in pieces of random sizes."""
    shapes = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = {}
    for index, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from(sorted(STORED)))
        arrays[f"{index}.weight"] = (dtype, rng.standard_normal(shape).astype(STORED[dtype]))
    weights = stored(tmp_path / "in", arrays)
    plan = {name: WeightQuantisation(data.draw(st.sampled_from(list(FORMATS.values())))) for name in weights}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_weights, "PIECE_BYTES", data.draw(st.integers(1, 200)))
        folder, entries = place(tmp_path, weights, plan, data.draw(st.integers(1, 3)))
    require_equal_to_memory(folder, entries, weights, plan)


def test_two_threads_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    folder, entries = place(tmp_path, weights, plan, threads=1)
    one = files(folder)
    folder, again = place(tmp_path, weights, plan, threads=2)
    assert files(folder) == one
    assert again == entries


def test_what_is_behind_the_place_of_writing_stays_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages dropped from the cache are on the disk."""
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    expected = files(place(tmp_path, weights, plan)[0])
    monkeypatch.setattr(safetensors_writer, "WRITE_BEHIND_BYTES", 100)
    assert files(place(tmp_path, weights, plan)[0]) == expected


@pytest.mark.parametrize("number_format", FORMATS.values(), ids=list(FORMATS))
def test_one_format_gives_one_file(tmp_path: Path, number_format: object) -> None:
    weights = example(tmp_path / "in")
    plan = {"BF16.conv.weight": WeightQuantisation(number_format)}  # type: ignore[arg-type]
    folder, entries = place(tmp_path, weights, plan)
    require_equal_to_memory(folder, entries, weights, plan)
    assert len(files(folder)) == 2


def test_nothing_planned_writes_nothing(tmp_path: Path) -> None:
    folder, entries = place(tmp_path, example(tmp_path / "in"), {})
    assert entries == {}
    assert files(folder) == {}


def test_progress_counts_the_bytes_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_weights, "PIECE_BYTES", 500)
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    steps: list[int] = []
    with unsealed(tmp_path / "b") as writer:
        place_quantised(writer, "dit", weights, plan, steps.append)
    assert sum(steps) == sum(weights[name].nbytes for name in plan)
    assert len(steps) > len(plan)


def test_sizes_are_known_before(tmp_path: Path) -> None:
    weights = example(tmp_path / "in")
    plan = example_plan(weights)
    _, entries = place(tmp_path, weights, plan)
    assert quantised_bytes(weights, plan) == sum(pair.codes.length + pair.scale.length for pair in entries.values())


# What cannot succeed.


def require_nothing_left(
    tmp_path: Path, error: type[BaseException], weights: Mapping[str, Resolved], plan: Plan, **options: object
) -> BaseException:
    """Placing fails; the file it was writing is gone at once, and all others when the writer's block ends."""
    output = tmp_path / "out" / "b"
    left: list[str] = []

    def fail() -> None:
        with BundleWriter(output) as writer:
            try:
                place_quantised(writer, "dit", weights, plan, **options)  # type: ignore[arg-type]
            finally:
                left.extend(files(writer.folder))

    with pytest.raises(error) as caught:
        fail()
    assert list(output.parent.iterdir()) == []
    assert left in ([], ["weights/dit.int8.safetensors"])  # the one that was complete
    return caught.value


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Resolved]:
    return example(tmp_path / "in")


def test_too_little_room_is_found_before_the_work(
    tmp_path: Path, weights: dict[str, Resolved], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*_: object) -> None:
        raise AssertionError("a weight was read")

    plan = example_plan(weights)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=quantised_bytes(weights, plan) - 1))
    monkeypatch.setattr(TensorRef, "read_into", untouched)
    error = require_nothing_left(tmp_path, BuildError, weights, plan)
    assert "the disk is full" in str(error)
    assert f"expected: {quantised_bytes(weights, plan):,} bytes more" in str(error)
    assert "fix: free space" in str(error)


@pytest.mark.parametrize(
    ("function", "after"),
    [("pwrite", 0), ("pwrite", 4), ("ftruncate", 0), ("ftruncate", 1), ("fsync", 0), ("fsync", 1)],
)
def test_the_disk_fills_up(
    tmp_path: Path, weights: dict[str, Resolved], monkeypatch: pytest.MonkeyPatch, function: str, after: int
) -> None:
    """At the first call, in the middle of the first file, or in the second file."""
    real: Callable[..., int] = getattr(os, function)
    calls = 0

    def full(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, function, full)
    error = require_nothing_left(tmp_path, BuildError, weights, example_plan(weights), threads=1)
    assert "No space left on device" in str(error)
    assert "fix: free some space" in str(error)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bad = np.ones((5, 4), np.float32)
    bad[3, 1] = np.nan
    weights = stored(tmp_path / "in", {"fine": ("F32", np.ones((300, 4), np.float32)), "double.3.v": ("F32", bad)})
    error = require_nothing_left(tmp_path, CalibrationError, weights, dict.fromkeys(weights, WeightQuantisation(INT8)))
    assert "the weight 'dit.double.3.v' holds values that are not finite" in str(error)
    assert "output channel 3" in str(error)


def test_types_that_are_not_quantised_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stored(tmp_path / "in", {"a": ("F32", np.ones((3, 4), np.float32)), "b": ("F64", np.ones((3, 4)))})
    monkeypatch.setattr(TensorRef, "read_into", None)
    error = require_nothing_left(tmp_path, CalibrationError, weights, dict.fromkeys(weights, WeightQuantisation(INT8)))
    assert "the weight 'dit.b' cannot be quantised" in str(error)
    assert "received: values of type F64" in str(error)


def test_a_file_that_has_become_shorter(tmp_path: Path, weights: dict[str, Resolved]) -> None:
    os.truncate(tmp_path / "in", 2000)
    error = require_nothing_left(tmp_path, CheckpointError, weights, example_plan(weights))
    assert "ends in the middle of tensor" in str(error)


def test_an_interruption_stops_the_work(tmp_path: Path, weights: dict[str, Resolved]) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    require_nothing_left(tmp_path, KeyboardInterrupt, weights, example_plan(weights), progress=interrupt)
    assert torch.get_num_threads() == before


def test_weights_that_the_stage_does_not_have(tmp_path: Path, weights: dict[str, Resolved]) -> None:
    with unsealed(tmp_path / "b") as writer, pytest.raises(ValueError, match="stage 'dit' has no weights nothing"):
        place_quantised(writer, "dit", weights, {"nothing": WeightQuantisation(INT8)})
