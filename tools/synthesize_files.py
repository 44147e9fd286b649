"""Safetensors files with invented content: values drawn per piece, written as stamps with holes or in full.

A value is ``mean + spread * u`` with ``u`` uniform in [-1, 1), taken from the raw bits of a Philox generator whose key
is the digest of the seed and the piece's name. NumPy guarantees those bits for ever, unlike its normal variates. The
module knows nothing of models.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from reelforge.tools.synthesize_layout import Piece, TensorLayout

STAMP_BYTES = 4096
CHUNK_ELEMENTS = 1 << 22


class Content(enum.Enum):
    """What the tensors hold."""

    SPARSE = "sparse"  # distinct stamps at both ends, between them a hole
    RANDOM = "random"  # finite values everywhere, scaled so that the network's outputs stay near unit scale


class Dtype(enum.Enum):
    """Element type of every tensor, by its short name."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        """Size of one value."""
        return 4 if self is Dtype.FP32 else 2

    @property
    def safetensors_name(self) -> str:
        """The name in a safetensors header."""
        return {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[self.value]

    @property
    def torch_name(self) -> str:
        """The name in a configuration of transformers."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.value]


@dataclass(frozen=True)
class Values:
    """Everything that decides the bytes of a piece."""

    content: Content
    dtype: Dtype
    seed: int


def piece_values(piece: Piece, values: Values) -> Iterator[bytes]:
    """Yield the little-endian bytes of ``piece`` in chunks; sparse content ends early (see ``piece_end``)."""
    left = piece.elements
    if values.content is Content.SPARSE:
        left = min(left, STAMP_BYTES // values.dtype.bytes)
    yield from _drawn(piece, piece.name, left, values)


def piece_end(piece: Piece, values: Values) -> bytes:
    """Return the last bytes of sparse content: whoever reads only some columns of a matrix finds something, too."""
    count = STAMP_BYTES // values.dtype.bytes
    if values.content is not Content.SPARSE or piece.elements < 2 * count:
        return b""
    return b"".join(_drawn(piece, f"{piece.name}:end", count, values))


def _drawn(piece: Piece, name: str, left: int, values: Values) -> Iterator[bytes]:
    key = hashlib.sha256(f"{values.seed}:{name}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little"))
    while left:
        count = min(left, CHUNK_ELEMENTS)
        words = np.asarray(bits.random_raw((count + 1) // 2), dtype="<u8").view("<u4")[:count]
        unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        yield encode(np.float32(piece.mean) + np.float32(piece.spread) * unit, values.dtype)
        left -= count


def encode(numbers: NDArray[np.float32], dtype: Dtype) -> bytes:
    """Return finite ``numbers`` as little-endian bytes of ``dtype``, rounded to nearest, ties to even."""
    if dtype is Dtype.FP32:
        return numbers.astype("<f4").tobytes()
    if dtype is Dtype.FP16:
        return numbers.astype("<f2").tobytes()
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Sequence[TensorLayout], values: Values) -> None:
    """Write one safetensors file, header first; untouched ranges of sparse content stay holes.

    Raises:
        OSError: If the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.elements * values.dtype.bytes
        entry = {"dtype": values.dtype.safetensors_name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.flush()
        base = file.tell()
        os.truncate(file.fileno(), base + end)
        _write_pieces(file, base, tensors, values)


def _write_pieces(file: BinaryIO, base: int, tensors: Sequence[TensorLayout], values: Values) -> None:
    offset = base
    for tensor in tensors:
        for piece in tensor.pieces:
            file.seek(offset)
            for chunk in piece_values(piece, values):
                file.write(chunk)
            offset += piece.elements * values.dtype.bytes
            if end := piece_end(piece, values):
                file.seek(offset - len(end))
                file.write(end)


def write_sharded(folder: Path, stem: str, tensors: Sequence[TensorLayout], values: Values, shard_bytes: int) -> None:
    """Write ``tensors`` in files of at most ``shard_bytes`` each (one tensor at least), and an index if several.

    The names are those of diffusers and transformers: ``STEM-00001-of-00003.safetensors`` and
    ``STEM.safetensors.index.json``.

    Raises:
        OSError: If a file cannot be written.
    """
    shards: list[list[TensorLayout]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.elements * values.dtype.bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, values)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, values)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    total = sum(tensor.elements for tensor in tensors) * values.dtype.bytes
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON with sorted keys."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
