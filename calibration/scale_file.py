"""Scale files: the result of a calibration as one safetensors file that says where it came from.

The tensors are fp32 and named ``<stage>.<layer>.<kind>``; the header's ``__metadata__`` holds the provenance as JSON
and a sha256 over provenance, names, shapes and data. Equal scales of equal provenance give equal bytes. Reading accepts
a file only as a whole: cut short, altered, of another checkpoint or without a needed layer, it is an error. The module
does not know how scales are chosen, nor how a checkpoint is identified.

Format: https://huggingface.co/docs/safetensors, in the order of the names, data from a multiple of 64 bytes on.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError
from reelforge.runtime.codec import CodecError, from_json, to_json

SCHEMA_VERSION = 3

_ALIGNMENT = 64
_PROVENANCE = "reelforge.calibration"
_DIGEST = "reelforge.sha256"
_AGAIN = "calibrate again with this version"
_EXPECTED = {"scale": "positive finite numbers", "range": "two finite numbers with zero between them"}


class ScaleKind(enum.Enum):
    """What a tensor of the file is for a layer."""

    ACTIVATION = "activation"  # [] scale of the layer's input, around zero
    RANGE = "range"  # [2] lowest and highest value of an INT8 layer's input that codes with a zero point stand for
    OUTPUT = "output"  # [2] likewise of an INT8 convolution's output, bias included
    WEIGHT = "weight"  # [output channels] scales
    SMOOTHING = "smoothing"  # [input channels] migration factors
    QUERY = "query"  # [] scale of an attention's rotated queries
    KEY = "key"  # [] scale of its rotated keys
    VALUE = "value"  # [] scale of its values


RANGES = tuple(f".{kind.value}" for kind in (ScaleKind.RANGE, ScaleKind.OUTPUT))
"""How the names of tensors end that are ranges; the others are scales."""


@dataclass(frozen=True)
class Provenance:
    """Where scales came from.

    Attributes:
        checkpoint: The checkpoint's content identity, as given by who calibrated.
        prompts_sha256: Digest of the calibration prompts, in hex.
        seed: Of the calibration's noise.
        method: How the scales were chosen: ``"mse"``, ``"percentile 99.99"``, ``"max + smoothing 0.5"``.
        format: The number formats' names by stage, as :func:`format_text` writes them.
        versions: Library versions by name.
        sampling: What was sampled while observing: ``"20 steps of 64x64x17"``.
        schema_version: Of the file.
    """

    checkpoint: str
    prompts_sha256: str
    seed: int
    method: str
    format: str
    versions: dict[str, str]
    sampling: str = ""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class ScaleFile:
    """A scale file's content: its provenance and its tensors by full name, fp32."""

    path: Path
    provenance: Provenance
    tensors: Mapping[str, NDArray[np.float32]]

    def get(self, stage: str, layer: str, kind: ScaleKind) -> NDArray[np.float32]:
        """Return one tensor.

        Raises:
            CalibrationError: If the file does not have it.
        """
        name = tensor_name(stage, layer, kind)
        if name not in self.tensors:
            raise CalibrationError(
                f"the scale file {self.path} has no {kind.value} scale for layer {layer!r} of stage {stage!r}.",
                received=f"{len(self.tensors)} tensors, none of them {name!r}",
                expected="a scale for every layer that the recipe quantises",
                fix="calibrate again with the recipe that will be built, or keep this layer in high precision",
            )
        return self.tensors[name]


def format_text(formats: Mapping[str, Iterable[str]]) -> str:
    """Return each stage's formats as one text, mixed ones joined by ``+``: ``"dit=float8_e4m3fn,llm=int8"``."""
    return ",".join(f"{stage}={'+'.join(sorted(set(formats[stage])))}" for stage in sorted(formats))


def tensor_name(stage: str, layer: str, kind: ScaleKind) -> str:
    """Return the name of a tensor in the file."""
    return f"{stage}.{layer}.{kind.value}"


def write_scale_file(path: Path, provenance: Provenance, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a scale file; an existing one is replaced when the new one is complete, and stays if that fails.

    Args:
        path: The file.
        provenance: Where the scales came from.
        tensors: By full name (see :func:`tensor_name`), any shape, written as fp32.

    Raises:
        CalibrationError: If a scale is not positive and finite, a range does not hold zero, or the file cannot be
            written.
    """
    values = {name: np.array(tensors[name], "<f4", order="C") for name in sorted(tensors)}
    for name, array in values.items():
        if not _usable(name, array):
            raise CalibrationError(
                f"{name!r} holds {_what(name)}s that cannot be used.",
                received=f"values from {array.min()} to {array.max()}",
                expected=_EXPECTED[_what(name)],
                fix="this is a bug of the calibration; please report it with the prompts and the seed",
            )
    content = _encode(provenance, values)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"the scale file {path} cannot be written: {error.strerror}.",
            received=f"{len(content)} bytes to write",
            fix="free some space or choose another folder",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_scale_file(
    path: Path,
    checkpoint: str | None = None,
    required: Iterable[str] = (),
    formats: Mapping[str, Iterable[str]] | None = None,
) -> ScaleFile:
    """Read a scale file, whole and unaltered.

    Args:
        path: The file.
        checkpoint: The identity of the checkpoint that the scales are wanted for; None accepts any.
        required: Full names of tensors that must be there.
        formats: The formats' names wanted by stage, as for :func:`format_text`; None accepts any.

    Raises:
        CalibrationError: If the file cannot be read, is cut short, altered, of another schema version, checkpoint or
            number format, or lacks a required tensor.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"the scale file {path} cannot be read: {error.strerror}.",
            expected="a file written by a calibration",
            fix="check the path, or calibrate to create it",
        ) from error
    provenance, tensors = _decode(path, content)
    if checkpoint is not None and provenance.checkpoint != checkpoint:
        raise CalibrationError(
            f"the scale file {path} was made for another checkpoint.",
            received=provenance.checkpoint,
            expected=checkpoint,
            fix="calibrate this checkpoint, or name the checkpoint that the scales belong to",
        )
    if formats is not None:
        _require_formats(path, provenance, formats)
    missing = sorted(set(required) - set(tensors))
    if missing:
        raise CalibrationError(
            f"the scale file {path} lacks {len(missing)} scales, first {missing[0]!r}.",
            received=f"{len(tensors)} tensors",
            expected="a scale for every layer that the recipe quantises",
            fix="calibrate again with the recipe that will be built, or keep these layers in high precision",
        )
    return ScaleFile(path, provenance, tensors)


def _require_formats(path: Path, provenance: Provenance, formats: Mapping[str, Iterable[str]]) -> None:
    """Refuse scales made for other formats; a stage that the file has beyond those wanted does no harm."""
    made = dict(item.split("=", 1) for item in provenance.format.split(",") if "=" in item)
    wanted = dict(item.split("=", 1) for item in format_text(formats).split(",") if item)
    if any(made.get(stage) != name for stage, name in wanted.items()):
        raise CalibrationError(
            f"the scale file {path} was made for other number formats.",
            received=provenance.format,
            expected=format_text(formats),
            fix="calibrate again with the precision that will be built, or build with the file's",
        )


def _encode(provenance: Provenance, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    data = b"".join(array.tobytes() for array in tensors.values())
    text = json.dumps(to_json(provenance), sort_keys=True, separators=(",", ":"))
    entries: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    metadata = {_PROVENANCE: text, _DIGEST: _digest(text, entries, data)}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header + data


def _digest(provenance: str, entries: Mapping[str, Any], data: bytes) -> str:
    sha = hashlib.sha256(json.dumps([provenance, entries], sort_keys=True, separators=(",", ":")).encode())
    sha.update(data)
    return sha.hexdigest()


def _decode(path: Path, content: bytes) -> tuple[Provenance, dict[str, NDArray[np.float32]]]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not content[8:9] == b"{" or length < 2:
        raise _refused(path, "is not a scale file", f"{len(content)} bytes without a safetensors header")
    if 8 + length > len(content):
        raise _refused(path, "is cut short", f"{len(content)} bytes", f"a header up to byte {8 + length}")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop("__metadata__")
        text, digest = metadata[_PROVENANCE], metadata[_DIGEST]
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        version = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _refused(path, "is not a scale file", "a header without the provenance of a calibration") from error
    data = content[8 + length :]
    if len(data) < end:
        raise _refused(path, "is cut short", f"{len(content)} bytes", f"{8 + length + end} bytes")
    received = _digest(text, header, data)
    if received != digest:
        raise _refused(path, "was altered after it was written", f"sha256 {received}", f"sha256 {digest}")
    if version != SCHEMA_VERSION:
        raise _refused(path, "is of another version", f"schema version {version}", f"schema version {SCHEMA_VERSION}")
    try:
        provenance = from_json(Provenance, json.loads(text))
        tensors = {name: _tensor(name, entry, data) for name, entry in header.items()}
    except (CodecError, ValueError, KeyError, TypeError) as error:
        raise _refused(path, "is not a scale file", str(error)) from error
    if _encode(provenance, tensors) != content:  # spaces, order or bytes that the digest does not see
        raise _refused(path, "was altered after it was written", "other bytes for the same scales")
    return provenance, tensors


def _tensor(name: str, entry: Mapping[str, Any], data: bytes) -> NDArray[np.float32]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] != "F32" or end - start != 4 * math.prod(shape):
        raise ValueError(f"a tensor of type {entry['dtype']} and shape {list(shape)} in {end - start} bytes")
    array = np.frombuffer(data, "<f4", math.prod(shape), start).reshape(shape)
    if not _usable(name, array):
        raise ValueError(f"a {_what(name)} that is not {_EXPECTED[_what(name)]}")
    return array


def _what(name: str) -> str:
    return "range" if name.endswith(RANGES) else "scale"


def _usable(name: str, array: NDArray[np.float32]) -> bool:
    if not np.isfinite(array).all():
        return False
    if _what(name) == "range":
        return array.shape == (2,) and bool(array[0] <= 0 <= array[1])
    return bool((array > 0).all())


def _refused(
    path: Path, what: str, received: str, expected: str = "a scale file as a calibration wrote it"
) -> Exception:
    fix = "restore the file, or calibrate again" if "version" not in what else _AGAIN
    return CalibrationError(f"the scale file {path} {what}.", received=received, expected=expected, fix=fix)
