"""Strict reader of safetensors headers: names, types and ranges, without touching the data.

Follows the format's specification to the letter (https://github.com/huggingface/safetensors): an 8-byte little-endian
length, a JSON object, then the tensors' bytes without holes or overlaps up to the end of the file. A header that says
anything else is refused, because every later step trusts it. The module does not know what the tensors mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from reelforge.export.checkpoint.tensor_ref import DTYPES, TensorRef, nbytes_of
from reelforge.runtime.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation; the 13-billion-parameter checkpoint's largest header is under 1 MB."""

_REDOWNLOAD = "the file is damaged or not a checkpoint; download it again"


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """Return every tensor of a safetensors file by name, in the order of their bytes.

    Args:
        path: The file; only its length and header are read.

    Raises:
        CheckpointError: If the file is absent, cut short, not safetensors, or its header contradicts itself.
    """
    header, data_start, data_bytes = _read_header(path)
    header.pop("__metadata__", None)
    refs = [_tensor(path, name, entry, data_start, data_bytes) for name, entry in header.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    position, previous = data_start, "the header"
    for ref in refs:
        if ref.offset != position:
            relation = "overlaps" if ref.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"in {path}, tensor {ref.name!r} {relation} {previous}.",
                received=f"it begins at data byte {ref.offset - data_start}",
                expected=f"data byte {position - data_start}",
                fix=_REDOWNLOAD,
            )
        position, previous = ref.offset + ref.nbytes, repr(ref.name)
    if position != data_start + data_bytes:
        raise CheckpointError(
            f"{path} has bytes that belong to no tensor.",
            received=f"{data_start + data_bytes - position} bytes after {previous}",
            expected="the file to end with its last tensor",
            fix=_REDOWNLOAD,
        )
    return {ref.name: ref for ref in refs}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return (header, position of the first data byte, bytes of data)."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            beginning = file.read(1)
            if len(prefix) < 8 or (length > MAX_HEADER_BYTES and beginning != b"{"):
                raise CheckpointError(
                    f"{path} is not a safetensors file.",
                    received=f"{total} bytes that begin with {(prefix + beginning)!r}",
                    expected="an 8-byte header length and a JSON header",
                    fix=_hint(prefix),
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"the header length of {path} is absurd.",
                    received=f"{length} bytes",
                    expected=f"at most {MAX_HEADER_BYTES}",
                    fix=_REDOWNLOAD,
                )
            if beginning != b"{":
                raise CheckpointError(
                    f"{path} is not a safetensors file: its header does not begin with '{{'.",
                    received=repr(prefix + beginning),
                    expected="an 8-byte header length and a JSON header",
                    fix=_hint(prefix),
                )
            text = beginning + file.read(length - 1) if length else b""
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", fix="check the path and its permissions"
        ) from error
    if len(text) < length:
        raise CheckpointError(
            f"{path} is cut short inside its header.",
            received=f"{total} bytes",
            expected=f"a header of {length} bytes and the tensors",
            fix="download it again; the file is incomplete",
        )
    return _parse(path, text), 8 + length, total - 8 - length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(
                f"the header of {path} names something twice.",
                received=", ".join(twice[:10]),
                expected="each name once",
                fix=_REDOWNLOAD,
            )
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {path} is not JSON.", received=str(error), expected="a JSON object", fix=_REDOWNLOAD
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"the header of {path} is not a JSON object.", received=type(header).__name__, fix=_REDOWNLOAD
        )
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorRef:
    """Return one tensor of the header, checked by itself."""

    def refuse(what: str, received: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"in {path}, tensor {name!r} {what}.", received=received, expected=expected, fix=_REDOWNLOAD
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described as the format demands", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse("has a type that is not known", dtype, ", ".join(DTYPES))
    if not _are_counts(shape):
        raise refuse("has no valid shape", shape, "a list of numbers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has no valid offsets", offsets, "[begin, end] with begin <= end")
    nbytes = nbytes_of(dtype, tuple(shape))
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(
            "lies about its size",
            f"{offsets[1] - offsets[0]} bytes at {offsets}",
            f"{nbytes} bytes for {dtype} {shape}",
        )
    if offsets[1] > data_bytes:
        raise CheckpointError(
            f"{path} is cut short: tensor {name!r} lies beyond its end.",
            received=f"{data_bytes} bytes of data",
            expected=f"at least {offsets[1]}",
            fix="download it again; the file is incomplete",
        )
    return TensorRef(name, path, data_start + offsets[0], dtype, tuple(shape))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _hint(prefix: bytes) -> str:
    """Return a fix that says what the file looks like."""
    if prefix.startswith(b"PK\x03\x04"):
        return "this is a zip file, perhaps PyTorch's: give it its own suffix (.pt or .bin)"
    if prefix.startswith(b"version "):
        return "this is a Git LFS pointer: run `git lfs pull` in the checkpoint"
    if prefix[:1] == b"<":
        return "this is a web page, not a checkpoint: download the file itself"
    return _REDOWNLOAD
