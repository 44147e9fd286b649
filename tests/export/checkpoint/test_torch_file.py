"""The reader of PyTorch's zip files against torch.save, and against files that carry code or damage."""

import contextlib
import io
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.export.checkpoint.pickle_data import PickleRefusedError, read_pickle
from reelforge.export.checkpoint.tensor_ref import mapped
from reelforge.export.checkpoint.torch_file import read_torch_file
from reelforge.runtime.errors import CheckpointError
from tests.export.checkpoint.test_safetensors_file import bytes_read

TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "f16": torch.randn(7).half(),
    "f32": torch.randn(2, 1, 4),
    "f64": torch.randn(3).double(),
    "f8": torch.randn(6).to(torch.float8_e4m3fn),
    "i64": torch.arange(4),
    "u16": torch.arange(3).to(torch.uint16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(2, 3)),
}


@pytest.mark.parametrize("wrapped", ["plain", "module", "state_dict", "both"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_writes(tmp_path: Path, wrapped: str, protocol: int) -> None:
    content: Any = TENSORS
    for key in {"plain": (), "both": ("state_dict", "module")}.get(wrapped, (wrapped,)):
        content = {key: content, "epoch": 3, "note": None}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    refs = read_torch_file(tmp_path / "x.pt")
    assert set(refs) == set(TENSORS)
    for name, tensor in TENSORS.items():
        array = mapped(refs[name])
        assert array.shape == tuple(tensor.shape)
        assert np.array_equal(array.astype(np.float64), tensor.detach().double().numpy())


def test_reads_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "x.bin")
    assert set(read_torch_file(tmp_path / "x.bin")) == {"weight", "bias"}


def test_shared_storages_are_ranges_of_one(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(6, 4)
    torch.save({"base": base, "rows": base[2:5], "tied": base}, tmp_path / "x.pt")
    refs = read_torch_file(tmp_path / "x.pt")
    assert refs["tied"].offset == refs["base"].offset
    assert refs["rows"].offset == refs["base"].offset + 2 * 4 * 4
    assert np.array_equal(mapped(refs["rows"]), base[2:5].numpy())


@pytest.mark.parametrize("view", [torch.zeros(3, 4).T, torch.zeros(3, 4)[:, :2], torch.zeros(1).expand(5)])
def test_refuses_tensors_that_are_not_contiguous(tmp_path: Path, view: torch.Tensor) -> None:
    torch.save({"good": torch.zeros(2), "view": view}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'view' is not contiguous"):
        read_torch_file(tmp_path / "x.pt")


def test_strides_of_single_rows_do_not_matter(tmp_path: Path) -> None:
    torch.save({"row": torch.arange(12.0).reshape(3, 4)[1:2]}, tmp_path / "x.pt")
    assert mapped(read_torch_file(tmp_path / "x.pt")["row"]).tolist() == [[4, 5, 6, 7]]


def test_reads_no_data(tmp_path: Path) -> None:
    """Six sparse gigabytes of BF16 and four of F32: zip64, opened in no time."""
    with torch.serialization.skip_data():
        tensors = {"a": torch.empty(3 << 30, dtype=torch.bfloat16), "b": torch.empty(1 << 30), "c": torch.empty(2, 3)}
        torch.save({"module": tensors}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size > 10 << 30
    before, start = bytes_read(), time.perf_counter()
    refs = read_torch_file(tmp_path / "x.pt")
    assert time.perf_counter() - start < 1
    assert bytes_read() - before < 300_000
    assert refs["b"].offset >= refs["a"].offset + (6 << 30)
    assert refs["c"].offset >= refs["b"].offset + (4 << 30)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("place", ["module", "beside", "inside", "key"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    payload, weights = Payload(marker), {"weight": torch.zeros(2)}
    content: Any = {
        "module": {"module": payload},
        "beside": {"module": weights, "extra": payload},
        "inside": {"module": {**weights, "other": payload}},
        "key": {(1, payload): weights},
    }[place]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="nothing of it was run") as caught:
        read_torch_file(tmp_path / "x.pt")
    assert "posix.system" in str(caught.value)
    assert not marker.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # the payload is live: the refusal is what kept it from running
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02(itorch\nFloatStorage\n.",
        b"\x80\x02K\x01K\x02\x86R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x02}h\x07.",
        b"\x80\x02t.",
        b"",
        b"garbage",
    ],
)
def test_instructions_beyond_containers_of_tensors_are_refused(content: bytes) -> None:
    try:
        result = read_pickle(content)
    except PickleRefusedError:
        return
    assert result == {}  # attributes of a dictionary are dropped


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pickles_raise_one_error(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        content = bytearray(archive.read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PickleRefusedError):
        read_pickle(bytes(content))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes change in a file, the reader returns ranges inside it or raises CheckpointError."""
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    torch.save({"a": torch.zeros(2), "b": torch.zeros(3, 4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert all(ref.offset + ref.nbytes <= len(content) for ref in read_torch_file(path).values())


def test_refuses_a_bare_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6") as caught:
        read_torch_file(tmp_path / "x.pt")
    assert "torch.save(torch.load(path, weights_only=True)" in str(caught.value)


def test_refuses_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is cut short: the directory"),
        (b"", "not a PyTorch zip file"),
        (b"hello", "not a PyTorch zip file"),
        (b"version https://git-lfs", "git lfs pull"),
        (whole.replace(b"PK\x03\x04", b"PK\x03\x05"), "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_torch_file(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_torch_file(path)


def rewritten(path: Path, change: dict[str, bytes | None], compress: bool = False) -> Path:
    """Write ``path`` again with some entries replaced or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            new = change.get(name.split("/", 1)[1], data)
            if new is not None:
                archive.writestr(name, new)
    return path


@pytest.mark.parametrize(
    ("change", "compress", "message"),
    [
        ({"data/0": None}, False, "the storage '0' of tensor 'a' is missing"),
        ({"data/0": bytes(8)}, False, "'a' is larger than its storage"),
        ({"byteorder": b"big"}, False, "big-endian"),
        ({"data.pkl": None}, False, "not one of torch.save"),
        ({"data.pkl": pickle.dumps([1, 2])}, False, "holds no dictionary of tensors"),
        ({"data.pkl": pickle.dumps({"a": 1, 2: 3})}, False, "entries that are not tensors"),
        ({}, True, "'a' is compressed or encrypted"),
    ],
)
def test_refuses_other_archives(tmp_path: Path, change: dict[str, bytes | None], compress: bool, message: str) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(rewritten(tmp_path / "x.pt", change, compress))
