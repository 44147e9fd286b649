"""Copies of large files that keep their holes, so that a sparse checkpoint of 40 GB stays small on another disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def copy_with_holes(source: Path, target: Path) -> None:
    """Copy ``source`` to the new file ``target``; ranges without data on the disk stay without data.

    Raises:
        OSError: If a file cannot be read or written; ``target`` may be left incomplete.
    """
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size
        end = 0
        while end < size:
            try:
                start = os.lseek(reader.fileno(), end, os.SEEK_DATA)
                end = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data up to the end of the file
                    break
                if error.errno != errno.EINVAL or end:
                    raise
                shutil.copyfileobj(reader, writer, _BLOCK_BYTES)  # a file system without knowledge of holes
                return
            reader.seek(start)
            writer.seek(start)
            while left := end - reader.tell():
                block = reader.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise OSError(errno.EIO, f"{source} became shorter while it was copied")
                _write_all(writer.fileno(), block)
        writer.truncate(size)


def _write_all(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
