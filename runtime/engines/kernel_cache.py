"""Kernels that TensorRT-RTX compiled for this GPU, kept beside the user's other caches for the next time.

A plan of TensorRT-RTX is compiled for the GPU when it first runs with a shape, which takes seconds to minutes. What
came of it is the library's ``IRuntimeCache``: it is filled from a file before the plan's context is made, and written
back when the plan has run with shapes that were not seen before. The library itself refuses what another version,
driver or GPU left; that the bytes are those that were written is checked here, since it takes broken plans for whole.

A file is ``rfkernel``, the sha256 of the rest, and the rest. It is named after what it belongs to and replaced by one
rename, so that processes may share it; the last one wins. A cache is never a reason for a generation to fail: what is
wrong with it is logged as a warning, and the kernels are compiled again. The module knows nothing of stages.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from reelforge.runtime.cache_folder import default_folder
from reelforge.runtime.cuda.driver import DeviceInfo

LIMIT_BYTES = 4 * 10**9
"""Of the whole folder; what was not used for longest is removed first."""

_MAGIC = b"rfkernel"
_HEADER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_SUFFIX = ".kernels"
_LOG = logging.getLogger(__name__)


class RuntimeCache(Protocol):
    """``IRuntimeCache``, of TensorRT-RTX only."""

    def deserialize(self, blob: bytes) -> bool:
        """Take what an earlier process left; False if it is not for this GPU, driver and version."""
        ...

    def serialize(self) -> Any:
        """Return everything as a buffer."""
        ...


class KernelCache:
    """The kernels of one plan on one GPU, and the file that they are kept in.

    The library's object has to outlive the context that fills it: close the context first.

    Args:
        path: The file; see :func:`kernel_file`.
        limit_bytes: What all files of its folder may take.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path = path
        self._limit_bytes = limit_bytes
        self._cache: RuntimeCache | None = None
        self._stored = b""  # digest of what the file holds, as far as this process knows

    def attach(self, config: Any) -> None:
        """Let a context that is made with ``config``, an ``IRuntimeConfig``, use the kernels of earlier processes."""
        cache: RuntimeCache = config.create_runtime_cache()
        kernels = self._read()
        if kernels is not None:
            if cache.deserialize(kernels):
                self._stored = hashlib.sha256(kernels).digest()
            else:
                self._warn("are not for this GPU, driver and library, and are compiled again")
        if config.set_runtime_cache(cache):
            self._cache = cache
        else:
            self._warn("are not kept: the library refused its own cache")

    def save(self) -> None:
        """Write the kernels, if there are others than in the file. Nothing that uses them may be running."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        if memory is None:
            self._warn("are not kept: the library gave none")
            return
        kernels = bytes(memory)
        digest = hashlib.sha256(kernels).digest()
        if digest == self._stored:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, _MAGIC + digest + kernels)
            _make_room(self.path, self._limit_bytes)
        except OSError as error:
            self._warn(f"are not kept: {error}")
        else:
            self._stored = digest

    def close(self) -> None:
        """Let go of the library's object. Closing twice is harmless."""
        self._cache = None

    def _read(self) -> bytes | None:
        try:
            content = self.path.read_bytes()
            os.utime(self.path)  # for whoever makes room
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read and are compiled again: {error}")
            return None
        digest, kernels = content[len(_MAGIC) : _HEADER_BYTES], content[_HEADER_BYTES:]
        if content.startswith(_MAGIC) and hashlib.sha256(kernels).digest() == digest:
            return kernels
        self._warn("are damaged and are compiled again")
        return None

    def _warn(self, what: str) -> None:
        _LOG.warning("the compiled kernels in %s %s", self.path, what)


def kernel_file(plan_sha256: str, library: str, device: DeviceInfo) -> Path:
    """Return where the kernels of a plan are kept, below ``$XDG_CACHE_HOME/reelforge/kernels``.

    Args:
        plan_sha256: Of the plan's bytes.
        library: Name and version, ``tensorrt_rtx 1.7.1.116``.
        device: The GPU: kernels belong to a product, not only to an architecture.
    """
    content = "\n".join([plan_sha256, library, device.name, device.architecture])
    name = hashlib.sha256(content.encode()).hexdigest() + _SUFFIX
    return default_folder(os.environ, Path.home()) / "kernels" / name


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there; a partial one is removed."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _make_room(kept: Path, limit_bytes: int) -> None:
    """Remove files until the folder keeps to its limit, the longest unused first, but not ``kept``."""
    files = [(path.stat(), path) for path in kept.parent.glob(f"*{_SUFFIX}")]
    total = sum(status.st_size for status, _ in files)
    for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
        if total > limit_bytes and path != kept:
            path.unlink(missing_ok=True)  # another process may have been here first
            total -= status.st_size
