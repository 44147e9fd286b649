"""One pass over weights: digests and non-finite counts against hashlib and torch; the writer against the library."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from reelforge.export.checkpoint import safetensors_writer
from reelforge.export.checkpoint.digest import count_non_finite, digest
from reelforge.export.checkpoint.safetensors_file import read_safetensors
from reelforge.export.checkpoint.safetensors_writer import (
    StreamedTensor,
    safetensors_layout,
    write_converted,
    write_safetensors,
)
from reelforge.export.checkpoint.sources import Conversion, HalfSplit, SwapHalves, Whole, resolve
from reelforge.runtime.errors import BuildError, CheckpointError

FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FLOATS)), st.binary(max_size=256))
def test_non_finite_counts_agree_with_torch(dtype: str, data: bytes) -> None:
    item = FLOATS[dtype].itemsize
    raw = np.frombuffer(data[: len(data) // item * item], np.uint8)
    values = torch.from_numpy(raw.copy()).view(FLOATS[dtype]).double() if len(raw) else torch.zeros(0)
    assert count_non_finite(raw, dtype) == int((~torch.isfinite(values)).sum())


def test_digests_of_references_and_conversions(tmp_path: Path) -> None:
    tensors = {
        "clean": torch.randn(300, 1000),
        "nan": torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    refs = read_safetensors(tmp_path / "x.safetensors")
    weights = {**refs, "swapped": resolve(SwapHalves(Whole("clean")), refs, (300, 1000))}
    done: list[int] = []
    result = digest(weights, done.append)
    assert list(result) == list(weights)
    assert sum(done) == sum(weight.nbytes for weight in weights.values())
    for name, tensor in tensors.items():
        assert (
            result[name].sha256 == hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        )
    assert [name for name, entry in result.items() if entry.non_finite] == ["nan"]
    assert result["nan"].non_finite == 3
    assert (
        result["swapped"].sha256 == hashlib.sha256(torch.roll(tensors["clean"], 150, 0).numpy().tobytes()).hexdigest()
    )


def test_a_file_cut_short_stops_the_digest(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.ones(1 << 16) for i in range(8)}, tmp_path / "x.safetensors")
    refs = read_safetensors(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 1 << 20)
    with pytest.raises(CheckpointError, match="ends in the middle"):
        digest(refs)


@pytest.fixture
def conversions(tmp_path: Path) -> dict[str, Conversion]:
    torch.manual_seed(0)
    tensors = {f"w{i}": torch.randn(64, 33).to(torch.bfloat16) for i in range(5)}
    tensors["wide"] = torch.randn(64, 7)
    tensors["w3"][5, 5] = float("nan")
    save_file(tensors, tmp_path / "source.safetensors")
    refs = read_safetensors(tmp_path / "source.safetensors")
    result = {name: resolve(HalfSplit(Whole(name), 16), refs, ref.shape) for name, ref in refs.items()}
    return {name: item for name, item in result.items() if isinstance(item, Conversion)}


def test_conversions_are_written_as_one_file(tmp_path: Path, conversions: dict[str, Conversion]) -> None:
    done: list[int] = []
    written = write_converted(tmp_path / "a.safetensors", conversions, done.append)
    assert list(written) == list(conversions)
    stored = load_file(tmp_path / "a.safetensors")
    refs = read_safetensors(tmp_path / "a.safetensors")
    expected = digest(conversions)
    source = load_file(tmp_path / "source.safetensors")
    for name, item in written.items():
        assert item.ref == refs[name]
        assert (item.sha256, item.non_finite) == expected[name]
        assert item.ref.offset % stored[name].element_size() == 0
        heads = source[name].unflatten(0, (4, 16))
        want = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)
        assert torch.equal(stored[name].view(torch.uint8), want.view(torch.uint8))
    assert written["w3"].non_finite == 1
    assert min(ref.offset for ref in refs.values()) % 64 == 0
    assert sum(done) == sum(item.nbytes for item in conversions.values())


def test_the_bytes_do_not_depend_on_order_or_threads(tmp_path: Path, conversions: dict[str, Conversion]) -> None:
    write_converted(tmp_path / "a.safetensors", conversions)
    write_converted(tmp_path / "b.safetensors", dict(reversed(conversions.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def streamed(name: str, *pieces: bytes) -> StreamedTensor:
    def stream() -> Iterator[NDArray[np.uint8]]:
        return (np.frombuffer(piece, np.uint8) for piece in pieces)

    return StreamedTensor(name, "F32", (4,), stream)


def test_any_stream_can_be_written(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32).tobytes()
    write_safetensors(tmp_path / "x.safetensors", [streamed("ä", values[:8], values[8:])], metadata={"format": "pt"})
    assert load_file(tmp_path / "x.safetensors")["ä"].tolist() == [0, 1, 2, 3]
    layout = safetensors_layout(tmp_path / "x.safetensors", [("ä", "F32", (4,))], {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == layout.header + values
    assert layout.nbytes == len(layout.header) + 16


def test_streams_of_the_wrong_length_are_bugs(tmp_path: Path) -> None:
    for pieces, message in (((bytes(8),), "ended after 8 of 16"), ((bytes(16), bytes(4)), "longer than 16")):
        with pytest.raises(ValueError, match=message):
            write_safetensors(tmp_path / "x.safetensors", [streamed("a", *pieces)])
        assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="one name"):
        safetensors_layout(tmp_path / "x", [("a", "F32", (1,)), ("a", "F32", (1,))])


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("precious")
    with pytest.raises(BuildError, match="exists already"):
        write_safetensors(tmp_path / "x.safetensors", [])
    assert (tmp_path / "x.safetensors").read_text() == "precious"


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, conversions: dict[str, Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal written
        if written > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(data)
        return pwrite(descriptor, data[:1000], position)  # short writes happen just before the disk is full

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(BuildError, match="No space left on device") as caught:
        write_converted(tmp_path / "x.safetensors", conversions)
    assert "free some space" in str(caught.value)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_disk_without_room_is_noticed_first(
    tmp_path: Path, conversions: dict[str, Conversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(BuildError, match="there is no room"):
        write_converted(tmp_path / "x.safetensors", conversions)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be written: No such file"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", [])


def test_an_interrupt_stops_the_threads_and_leaves_nothing(tmp_path: Path, conversions: dict[str, Conversion]) -> None:
    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_converted(tmp_path / "x.safetensors", conversions, interrupt)
    assert not (tmp_path / "x.safetensors").exists()
