"""Reader of PyTorch's zip files (``.pt``, ``.bin``): names, types and ranges; no pickle is run and no data is read.

Such a file is a zip archive of uncompressed entries: ``<name>/data.pkl`` describes the tensors and
``<name>/data/<key>`` are their storages, so a tensor is a plain range of the file. The pickle is read as data by
``pickle_data``, which cannot call anything. The module does not know what the tensors mean, except for the wrappers
that training code puts around a state dictionary (``module``, ``state_dict``).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from reelforge.export.checkpoint.pickle_data import PickleRefusedError, TensorRecord, read_pickle
from reelforge.export.checkpoint.tensor_ref import DTYPES, TensorRef
from reelforge.runtime.errors import CheckpointError

WRAPPERS = ("module", "state_dict")
MAX_PICKLE_BYTES = 64_000_000
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# What zipfile raises for damaged archives, beyond its own error: names that are no UTF-8; versions, methods or flags
# that it does not know; entries that end early; positions that no file has.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(NotImplementedError, OverflowError, RuntimeError, ValueError),
)
_RESAVE = (
    "if you trust the file, re-save only its tensors: torch.save(torch.load(path, weights_only=True), new_path), "
    "or convert it to safetensors"
)


def read_torch_file(path: Path) -> dict[str, TensorRef]:
    """Return every tensor of a PyTorch zip file by name; ``module`` and ``state_dict`` wrappers are removed.

    Args:
        path: The file; its zip directory, its pickle and 30 bytes per storage are read.

    Raises:
        CheckpointError: If the file is absent, damaged, of the format before PyTorch 1.6, or its pickle holds anything
            but containers of plain contiguous tensors.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise _not_a_zip(path, file)
            with zipfile.ZipFile(file) as archive:
                return _read_archive(path, file, archive)
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is a damaged zip file.", received=str(error), fix="download it again; the file is incomplete"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", fix="check the path and its permissions"
        ) from error


def _read_archive(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, TensorRef]:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is a zip file, but not one of torch.save.",
            received=f"{len(pickles)} entries named */data.pkl",
            expected="one",
            fix="give the checkpoint's own .pt or .bin file",
        )
    root = pickles[0].removesuffix("/data.pkl")
    order = entries.get(f"{root}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine.", fix="re-save it on a little-endian one")
    if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"the pickle in {path} is too large to be a list of tensors.",
            received=f"{entries[pickles[0]].file_size} bytes",
            expected=f"at most {MAX_PICKLE_BYTES}",
            fix=_RESAVE,
        )
    try:
        content = read_pickle(archive.read(pickles[0]))
    except PickleRefusedError as error:
        raise CheckpointError(
            f"the pickle in {path} holds more than tensors; nothing of it was run.",
            received=str(error),
            expected="dictionaries of plain tensors",
            fix=_RESAVE,
        ) from error
    ranges = _StorageRanges(path, file, entries, root)
    return {name: ranges.ref(name, record) for name, record in _unwrapped(path, content).items()}


def _unwrapped(path: Path, content: Any) -> dict[str, TensorRecord]:
    for _ in range(len(WRAPPERS)):
        inner = next((content[key] for key in WRAPPERS if isinstance(content, dict) and key in content), None)
        if not isinstance(inner, dict):
            break
        content = inner
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no dictionary of tensors.",
            received=type(content).__name__,
            expected="a state dictionary, optionally under 'module' or 'state_dict'",
            fix="give the file with the model's weights",
        )
    others = [str(key) for key, value in content.items() if not (isinstance(key, str) and _is_tensor(value))]
    if others:
        raise CheckpointError(
            f"{path} holds entries that are not tensors.",
            received=", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else ""),
            expected="names of tensors",
            fix="re-save only the state dictionary: torch.save(model.state_dict(), path)",
        )
    return content


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRecord)


class _StorageRanges:
    """Turns tensor records into ranges of the file, looking at each storage's local zip header once."""

    def __init__(self, path: Path, file: BinaryIO, entries: dict[str, zipfile.ZipInfo], root: str) -> None:
        self.path = path
        self.file = file
        self.entries = entries
        self.root = root
        self.file_bytes = path.stat().st_size
        self.known: dict[str, tuple[int, int]] = {}

    def ref(self, name: str, record: TensorRecord) -> TensorRef:
        """Return the range of one tensor. Storages may be shared: each tensor is a range of its storage."""
        expected_stride = _contiguous_stride(record.shape)
        stride_matters = [extent > 1 for extent in record.shape] if 0 not in record.shape else []
        if any(
            matters and given != expected
            for matters, given, expected in zip(stride_matters, record.stride, expected_stride, strict=False)
        ):
            raise CheckpointError(
                f"in {self.path}, tensor {name!r} is not contiguous.",
                received=f"shape {list(record.shape)} with stride {list(record.stride)}",
                expected=f"stride {list(expected_stride)}",
                fix="re-save it with .contiguous()",
            )
        start, length = self._storage(name, record.storage.key)
        item = DTYPES[record.dtype].itemsize
        ref = TensorRef(name, self.path, start + record.offset * item, record.dtype, record.shape)
        if len(record.stride) != len(record.shape) or record.offset * item + ref.nbytes > length:
            raise CheckpointError(
                f"in {self.path}, tensor {name!r} is larger than its storage {record.storage.key!r}.",
                received=f"{record.dtype} {list(record.shape)} from element {record.offset}",
                expected=f"at most {length} bytes",
                fix="the file is damaged; download it again",
            )
        return ref

    def _storage(self, name: str, key: str) -> tuple[int, int]:
        """Return (first byte in the file, length) of a storage."""
        if key in self.known:
            return self.known[key]
        info = self.entries.get(f"{self.root}/data/{key}")
        if info is None:
            raise CheckpointError(
                f"in {self.path}, the storage {key!r} of tensor {name!r} is missing.",
                fix="the file is incomplete; download it again",
            )
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"in {self.path}, tensor {name!r} is compressed or encrypted.",
                expected="stored entries, as torch.save writes them",
                fix="re-save the file with torch.save",
            )
        self.file.seek(info.header_offset)
        magic, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\x03\x04" or start + info.file_size > self.file_bytes:
            raise CheckpointError(
                f"{self.path} is cut short or damaged at the storage of tensor {name!r}.",
                fix="download it again; the file is incomplete",
            )
        self.known[key] = (start, info.file_size)
        return self.known[key]


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _not_a_zip(path: Path, file: BinaryIO) -> CheckpointError:
    file.seek(0)
    beginning = file.read(64)
    if beginning[:1] == b"\x80":
        return CheckpointError(
            f"{path} is a bare pickle, the format of PyTorch before 1.6; it is not opened.",
            received=repr(beginning[:8]),
            expected="a zip file of torch.save",
            fix=_RESAVE,
        )
    if beginning.startswith(b"PK\x03\x04"):
        return CheckpointError(
            f"{path} is cut short: the directory at the end of the zip file is missing.",
            fix="download it again; the file is incomplete",
        )
    fix = "download it again; the file is not a checkpoint"
    if beginning.startswith(b"version "):
        fix = "this is a Git LFS pointer: run `git lfs pull` in the checkpoint"
    return CheckpointError(
        f"{path} is not a PyTorch zip file.", received=repr(beginning[:8]), expected="a zip file of torch.save", fix=fix
    )
