"""Our own check of a plan before a library sees it, which calls a truncated one fine.

TensorRT's plans begin with ``vtrt`` and state their size as a 64-bit number at byte 16. TensorRT-RTX's (1.7, read off
plans for every architecture) also state the version in the four bytes from 24, and at 32 a 32-bit mask of the
architectures that they serve. Beyond that, a plan is the bytes whose digest the bundle states. The module does not know
what a plan computes, and loads none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from reelforge.runtime.errors import BundleError, EngineError
from reelforge.runtime.recipe import Backend

_MAGIC = b"vtrt"
_SIZE_OFFSET = 16
_VERSION_OFFSET = 24
_MASK_OFFSET = 32
HEADER_BYTES = 36
_BITS = {"sm75": 0x01, "sm80": 0x02, "sm86": 0x04, "sm89": 0x08, "sm120": 0x10, "sm121": 0x20}
_REBUILD = "rebuild the bundle with build-engine"


def check_plan_file(path: Path, *, sha256: str, size_bytes: int | None = None) -> None:
    """Check that a plan is whole and unaltered; reads all of it.

    Args:
        path: The plan.
        sha256: Of its bytes, as its receipt or the manifest states it.
        size_bytes: Its size, likewise, if it is known.

    Raises:
        BundleError: If it cannot be read, is no plan, has another size than it states, or another digest.
    """
    header = read_header(path)
    _check_size(path, header, size_bytes)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise BundleError(
            f"{path} was altered since it was built.",
            received=f"sha256 {digest.hexdigest()}",
            expected=f"sha256 {sha256}",
            fix=_REBUILD,
        )


def check_header(path: Path, *, backend: Backend, version: str, architecture: str) -> None:
    """Check that a plan is whole by its header, and made for this library and this GPU; reads its first bytes only.

    Args:
        path: The plan.
        backend: Whose plan it should be.
        version: Of the library that is to load it, ``1.7.1.116``.
        architecture: Of the GPU, a key of ``runtime.architectures.ARCHITECTURES``.

    Raises:
        BundleError: If it cannot be read, is no plan, or has another size than it states.
        EngineError: If it was built by another version of TensorRT-RTX, or for other architectures.
    """
    header = read_header(path)
    _check_size(path, header, None)
    if backend is not Backend.RTX:
        return  # what the other bytes of a classic plan mean was not observed
    found = ".".join(str(number) for number in header[_VERSION_OFFSET : _VERSION_OFFSET + 4])
    # The build number is one byte in the header: compare it as such.
    wanted = ".".join(str(int(number) % 256) for number in version.split(".")[:4])
    if found != wanted:
        raise EngineError(
            f"{path.name} was compiled by another version of TensorRT-RTX.",
            received=found,
            expected=version,
            fix=f"install tensorrt-rtx=={found}, or {_REBUILD}",
        )
    served = plan_architectures(header)
    if architecture not in served:
        both = [name for name in _BITS if name in (*served, architecture)]
        raise EngineError(
            f"{path.name} was not compiled for this GPU.",
            received=f"a plan for {', '.join(served) or 'unknown architectures'}",
            expected=architecture,
            fix=f"rebuild the bundle with --target rtx:{'+'.join(both)}",
        )


def read_header(path: Path) -> bytes:
    """Return the first bytes of a plan.

    Raises:
        BundleError: If the file cannot be read, is shorter than that, or begins otherwise.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read.", received=str(error), fix=_REBUILD) from error
    if len(header) < HEADER_BYTES:
        raise BundleError(
            f"{path} is truncated.",
            received=f"{len(header)} bytes",
            expected=f"{HEADER_BYTES} bytes or more",
            fix=_REBUILD,
        )
    if not header.startswith(_MAGIC):
        raise BundleError(
            f"{path} is not a plan.", received=repr(header[:4]), expected=f"{_MAGIC!r} at its beginning", fix=_REBUILD
        )
    return header


def plan_architectures(header: bytes) -> tuple[str, ...]:
    """Return the architectures that a header of TensorRT-RTX states, in ascending order."""
    mask = int.from_bytes(header[_MASK_OFFSET : _MASK_OFFSET + 4], "little")
    return tuple(name for name, bit in _BITS.items() if mask & bit)


def architecture_mask(architectures: Sequence[str]) -> int:
    """Return the number by which a header of TensorRT-RTX states ``architectures``."""
    return sum(_BITS[name] for name in architectures)


def _check_size(path: Path, header: bytes, expected: int | None) -> None:
    stated = int.from_bytes(header[_SIZE_OFFSET : _SIZE_OFFSET + 8], "little")
    size = path.stat().st_size
    if size < stated:
        raise BundleError(
            f"{path} is truncated.", received=f"{size} bytes", expected=f"{stated} bytes, as it states", fix=_REBUILD
        )
    if size > stated or (expected is not None and expected != size):
        raise BundleError(
            f"{path} has another size than it should have.",
            received=f"{size} bytes",
            expected=f"{stated if size > stated else expected} bytes",
            fix=_REBUILD,
        )
