"""PlanWriter: a plan's bytes as they come, onto a disk, under their final name only when they are complete.

The compilers ignore what a stream writer returns and carry on after its exceptions, so the first failure is kept here
and raised at the end. The module does not know what the bytes mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from reelforge.runtime.errors import BuildError

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 1 << 26  # the digest and the disk take turns, rather than one after the other over many gigabytes


class PlanWriter:
    """Writes to ``<path>.partial``; :meth:`finish` makes it ``path``.

    Attributes:
        bytes: Written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._failure: OSError | None = None
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def write(self, data: memoryview) -> None:
        """Append ``data``; a failure is kept for :meth:`finish`, and later data is dropped."""
        if self._failure is not None or self._descriptor is None:
            return
        try:
            for start in range(0, len(data), _BLOCK):
                block = data[start : start + _BLOCK]
                self._digest.update(block)
                while block:
                    block = block[os.write(self._descriptor, block) :]
            self.bytes += len(data)
        except OSError as error:
            self._failure = error

    def raise_failure(self) -> None:
        """Raise what a write failed with, if one did.

        Raises:
            BuildError: Likewise.
        """
        if self._failure is not None:
            raise _write_error(self.path, self._failure) from self._failure

    @property
    def sha256(self) -> str:
        """The digest of the bytes so far, in hexadecimal."""
        return self._digest.hexdigest()

    def finish(self) -> None:
        """Make the file durable and give it its name.

        Raises:
            BuildError: If any write failed; the partial file is gone then.
        """
        try:
            if self._failure is not None:
                raise self._failure
            if self._descriptor is not None:
                os.fsync(self._descriptor)
            self._close()
            self.partial.replace(self.path)
        except OSError as error:
            self.discard()
            raise _write_error(self.path, error) from error

    def discard(self) -> None:
        """Remove what was written; harmless after :meth:`finish`."""
        self._close()
        self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return where ``path`` is written to until it is complete."""
    return path.with_name(f"{path.name}.partial")


def _write_error(path: Path, error: OSError) -> BuildError:
    return BuildError(
        f"{path} cannot be written.",
        received=os.strerror(error.errno) if error.errno else str(error),
        expected="room for the plan, which is about as large as the stage's weights",
        fix="free space on the disk, or build elsewhere" if error.errno in _FULL_DISK else "check the folder",
    )
