"""sha256 of files and of byte ranges of files, several at a time.

hashlib releases the interpreter lock, so threads use all cores. The module knows nothing of manifests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ByteRange:
    """``length`` bytes from ``offset`` of ``path``."""

    path: Path
    offset: int
    length: int


def sha256_of_range(part: ByteRange) -> str:
    """Return the hexadecimal sha256 of a byte range.

    Raises:
        EOFError: If the file ends before the range does.
        OSError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK_BYTES, max(part.length, 1))))
    with part.path.open("rb", buffering=0) as file:
        file.seek(part.offset)
        left = part.length
        while left:
            count = file.readinto(block[: min(left, len(block))])
            if not count:
                raise EOFError(f"{part.path} ends {left} bytes before the end of the range")
            digest.update(block[:count])
            left -= count
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a whole file."""
    return sha256_of_range(ByteRange(path, 0, path.stat().st_size))


def sha256_of_ranges(
    parts: Iterable[ByteRange], on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[ByteRange, str]]:
    """Yield each range with its sha256, in the order given, hashed on all cores.

    Args:
        parts: The ranges; sort them by file and offset so that disks read forwards.
        on_bytes: Called with the length of each range when it is done.

    Raises:
        EOFError: If a file ends before a range does.
        OSError: If a file cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import: it brings logging

    todo = list(parts)
    with ThreadPoolExecutor(max_workers=core_count(), thread_name_prefix="sha256") as pool:
        try:
            for part, digest in zip(todo, pool.map(sha256_of_range, todo), strict=True):
                if on_bytes is not None:
                    on_bytes(part.length)
                yield part, digest
        finally:
            # The first difference ends the check: the ranges that nobody waits for are not hashed.
            pool.shutdown(wait=True, cancel_futures=True)


def core_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
