"""Writes one safetensors file as a stream, hashing on the way; its bytes depend on the tensors and on nothing else.

The header comes first, padded so that the data begins at a multiple of 64 bytes, then each tensor goes to its place,
several at a time. Memory is bounded by the pieces in flight. The module does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reelforge.export.checkpoint.digest import THREADS, Progress, ProgressMeter, count_non_finite, in_threads
from reelforge.export.checkpoint.sources import WeightSource
from reelforge.export.checkpoint.tensor_ref import DTYPES, TensorRef, nbytes_of
from reelforge.runtime.errors import BuildError

DATA_ALIGNMENT = 64

WRITE_BEHIND_BYTES = 128 << 20
"""How much of a file stays in the page cache behind the place of writing. Files of many gigabytes would push out all
else, and on a virtual machine a page that was never touched costs several times the copy into it: with the same few
pages used again and again, writing is faster."""


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to write: its safetensors type, shape, and a function that begins the stream of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[NDArray[np.uint8]]]


class WrittenTensor(NamedTuple):
    """Where a tensor was written, the sha256 of its bytes in hex, and its NaN and infinite elements."""

    ref: TensorRef
    sha256: str
    non_finite: int


@dataclass(frozen=True)
class SafetensorsLayout:
    """A file before it is written: its first bytes, where each tensor goes, and its length in bytes."""

    header: bytes
    refs: Mapping[str, TensorRef]
    nbytes: int


def safetensors_layout(
    path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> SafetensorsLayout:
    """Return the layout of a file of ``tensors`` (name, type, shape), in the order given and without holes."""
    position = 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    entries = list(tensors)
    for name, dtype, shape in entries:
        end = position + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    if len(header) != len(entries) + bool(metadata):
        raise ValueError(f"two tensors of {path} have one name")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    refs, offset = {}, start
    for name, dtype, shape in entries:
        refs[name] = TensorRef(name, path, offset, dtype, shape)
        offset += refs[name].nbytes
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, refs, offset)


def write_safetensors(
    path: Path,
    tensors: Sequence[StreamedTensor],
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int = THREADS,
) -> dict[str, WrittenTensor]:
    """Write ``tensors`` to the new file ``path``, in the order given.

    Args:
        path: The file; it must not exist. A file that could not be completed is removed.
        tensors: What to write; each stream must yield exactly the tensor's bytes, in whole elements.
        progress: Called with bytes written.
        metadata: Goes into the header.
        threads: How many tensors are converted, hashed and written at a time.

    Returns:
        For each tensor by name, where it is and its digest.

    Raises:
        BuildError: If the file exists, cannot be written, or the disk is full.
    """
    layout = safetensors_layout(path, [(item.name, item.dtype, item.shape) for item in tensors], metadata)
    meter = ProgressMeter(progress)
    created = False
    try:
        free = shutil.disk_usage(path.parent).free
        if free < layout.nbytes:
            raise _disk_full(path, layout.nbytes, free)
        with path.open("xb", buffering=0) as file:
            created = True
            descriptor = file.fileno()
            os.ftruncate(descriptor, layout.nbytes)
            _write_at(descriptor, layout.header, 0)
            behind = _WriteBehind(descriptor)
            by_size = sorted(tensors, key=lambda item: -nbytes_of(item.dtype, item.shape))
            jobs = {item.name: partial(_write_one, behind, layout.refs[item.name], item, meter) for item in by_size}
            written = in_threads(jobs, meter, threads)
            os.fsync(descriptor)  # here, where other threads still have work, and not all at once at the end
    except OSError as error:
        if created:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise BuildError(f"{path} exists already.", expected="a new file", fix="remove it") from error
        raise BuildError(
            f"{path} cannot be written: {error.strerror}.",
            received=f"{layout.nbytes} bytes to write",
            fix="free some space or choose another folder for the output",
        ) from error
    except BaseException:
        if created:
            path.unlink(missing_ok=True)
        raise
    return {item.name: written[item.name] for item in tensors}


def write_converted(
    path: Path, conversions: Mapping[str, WeightSource], progress: Progress | None = None
) -> dict[str, WrittenTensor]:
    """Carry out ``conversions`` and write their results, by parameter name, to the new safetensors file ``path``.

    Wide types come first so that every tensor is aligned to its elements. Raises as :func:`write_safetensors`.
    """
    order = sorted(conversions, key=lambda name: (-DTYPES[conversions[name].dtype].itemsize, name))
    tensors = [
        StreamedTensor(name, conversions[name].dtype, conversions[name].shape, conversions[name].pieces)
        for name in order
    ]
    written = write_safetensors(path, tensors, progress)
    return {name: written[name] for name in conversions}


class _WriteBehind:
    """Writes to a file from several threads; the disk starts at once, and what it has taken is dropped from the cache.

    Args:
        descriptor: The file, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._cached: deque[tuple[int, int]] = deque()
        self._cached_bytes = 0

    def write(self, data: memoryview, position: int) -> None:
        """Write ``data`` at ``position``."""
        _write_at(self._descriptor, data, position)
        self._forget(position, data.nbytes)  # dirty pages cannot be dropped, but this starts writing them
        with self._lock:
            self._cached.append((position, data.nbytes))
            self._cached_bytes += data.nbytes
            dropped = []
            while self._cached_bytes > WRITE_BEHIND_BYTES:
                dropped.append(self._cached.popleft())
                self._cached_bytes -= dropped[-1][1]
        for start, nbytes in dropped:
            self._forget(start, nbytes)

    def _forget(self, position: int, nbytes: int) -> None:
        os.posix_fadvise(self._descriptor, position, nbytes, os.POSIX_FADV_DONTNEED)


def _write_one(behind: _WriteBehind, ref: TensorRef, tensor: StreamedTensor, meter: ProgressMeter) -> WrittenTensor:
    sha = hashlib.sha256()
    non_finite = done = 0
    for piece in tensor.pieces():
        if done + piece.nbytes > ref.nbytes:
            raise ValueError(f"the stream of {tensor.name!r} is longer than {ref.nbytes} bytes")
        sha.update(piece.data)
        non_finite += count_non_finite(piece, tensor.dtype)
        behind.write(piece.data, ref.offset + done)
        done += piece.nbytes
        meter.advance(piece.nbytes)
    if done != ref.nbytes:
        raise ValueError(f"the stream of {tensor.name!r} ended after {done} of {ref.nbytes} bytes")
    return WrittenTensor(ref, sha.hexdigest(), non_finite)


def _write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    left = memoryview(data)
    while left.nbytes:
        count = os.pwrite(descriptor, left, position)
        left, position = left[count:], position + count


def _disk_full(path: Path, needed: int, free: int) -> BuildError:
    return BuildError(
        f"there is no room for {path}.",
        received=f"{free} bytes free",
        expected=f"{needed} bytes",
        fix="free some space or choose another folder for the output",
    )
