"""The header reader against the format's own library, and against headers that lie."""

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reelforge.export.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_safetensors
from reelforge.export.checkpoint.tensor_ref import mapped
from reelforge.runtime.errors import CheckpointError


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "f16": torch.randn(7).half(),
        "f32": torch.randn(2, 1, 4),
        "f8": torch.randn(6).to(torch.float8_e4m3fn),
        "i64": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    refs = read_safetensors(tmp_path / "x.safetensors")
    assert set(refs) == set(tensors)
    for name, tensor in tensors.items():
        array = mapped(refs[name])
        assert array.shape == tuple(tensor.shape)
        assert refs[name].nbytes == tensor.numel() * tensor.element_size()
        assert np.array_equal(array.astype(np.float64), tensor.double().numpy())
        assert b"".join(piece.tobytes() for piece in refs[name].pieces(limit=6)) == array.tobytes()
    assert mapped(refs["bf16"]).dtype == ml_dtypes.bfloat16


def test_reads_the_header_only(tmp_path: Path) -> None:
    size = 64 << 30
    path = write(tmp_path / "sparse.safetensors", {"a": entry(0, size // 2), "b": entry(size // 2, size)})
    header_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(header_bytes + size)
    before, start = bytes_read(), time.perf_counter()
    refs = read_safetensors(path)
    assert time.perf_counter() - start < 1
    assert bytes_read() - before < 200_000
    assert refs["b"].offset == header_bytes + size // 2


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


FAULTS: dict[str, tuple[object, bytes, str]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps 'a'"),
    "the same range twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "'b' overlaps 'a'"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), "'b' leaves a hole after 'a'"),
    "hole in front": ({"a": entry(4, 8)}, bytes(8), "'a' leaves a hole after the header"),
    "bytes behind": ({"a": entry(0, 8)}, bytes(9), "bytes that belong to no tensor"),
    "cut short": ({"a": entry(0, 8), "b": entry(8, 16)}, bytes(15), "cut short: tensor 'b'"),
    "size and shape disagree": ({"a": entry(0, 8, [3])}, bytes(8), "'a' lies about its size"),
    "size and type disagree": ({"a": entry(0, 8, [2], "BF16")}, bytes(8), "'a' lies about its size"),
    "overflowing shape": ({"a": entry(0, 8, [1 << 62, 8])}, bytes(8), "'a' lies about its size"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, bytes(8), "'a' has no valid shape"),
    "boolean shape": ({"a": entry(0, 4, [True])}, bytes(4), "'a' has no valid shape"),
    "negative offset": ({"a": entry(-4, 4, [2])}, bytes(8), "'a' has no valid offsets"),
    "reversed offsets": ({"a": entry(8, 0, [2])}, bytes(8), "'a' has no valid offsets"),
    "unknown type": ({"a": entry(0, 8, [2], "F3")}, bytes(8), "'a' has a type that is not known"),
    "unhashable type": ({"a": {**entry(0, 8), "dtype": []}}, bytes(8), "'a' has a type that is not known"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "'a' is not described"),
    "entry not an object": ({"a": 3}, b"", "'a' is not described"),
    "not an object": ([1], b"", "not a safetensors file"),
    "bad JSON": (b'{"a": ', b"", "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "is not JSON"),
    "name twice": (b'{"a": 1, "a": 2}', b"", "names something twice"),
    "nested too deeply": (b'{"a":' + b"[" * 200_000, b"", "is not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refuses_headers_that_lie(tmp_path: Path, name: str) -> None:
    header, data, message = FAULTS[name]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x01\x02", "not a safetensors file"),
        (b"PK\x03\x04" + bytes(40), "give it its own suffix"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "absurd"),
        ((1000).to_bytes(8, "little") + b"{}", "cut short inside its header"),
        ((0).to_bytes(8, "little") + b"{}", "is not JSON"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


def test_refuses_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_safetensors(tmp_path / "absent.safetensors")


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1000)}, tmp_path / "x.safetensors")
    ref = read_safetensors(tmp_path / "x.safetensors")["weight"]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(ref.offset + 2000)
    with pytest.raises(CheckpointError, match="ends in the middle of tensor 'weight'"):
        list(ref.pieces(limit=512))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    """Whatever bytes overwrite a file, the reader returns ranges inside it or raises CheckpointError."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(2, 3)}, path)
    content = bytearray(path.read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(content)
    try:
        refs = read_safetensors(path)
    except CheckpointError:
        return
    assert all(ref.offset + ref.nbytes <= len(content) for ref in refs.values())
