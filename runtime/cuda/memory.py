"""Memory with an owner: device buffers, page-locked host buffers, and the arena that stages share.

A buffer is freed once, by ``close`` or the end of its ``with`` block, and has no address afterwards. Whoever closes one
has synchronised the streams that use it. The module does not know what the bytes mean.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.cuda.driver import Cuda

ALIGNMENT = 256
"""Of every address that TensorRT is given, in bytes."""


def aligned(size_bytes: int) -> int:
    """Round up to a multiple of :data:`ALIGNMENT`; at least that, since CUDA has no empty allocations."""
    return max(-(-size_bytes // ALIGNMENT), 1) * ALIGNMENT


class DeviceBuffer:
    """``size_bytes`` of device memory (rounded up to :data:`ALIGNMENT`)."""

    def __init__(self, cuda: Cuda, size_bytes: int, purpose: str) -> None:
        self._cuda = cuda
        self.size_bytes = aligned(size_bytes)
        self._address: int | None = cuda.allocate(self.size_bytes, purpose)

    @property
    def address(self) -> int:
        """Where it begins."""
        assert self._address is not None, "a device buffer was used after it was freed"
        return self._address

    def close(self) -> None:
        """Free the memory; closing twice is harmless."""
        address, self._address = self._address, None
        if address is not None:
            self._cuda.free(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PinnedBuffer:
    """Page-locked host memory; :attr:`bytes` is a view of it, not to be kept beyond its end."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self._cuda = cuda
        self.size_bytes = aligned(size_bytes)
        self._address: int | None = cuda.allocate_pinned(self.size_bytes)

    @property
    def address(self) -> int:
        """Where it begins."""
        assert self._address is not None, "a page-locked buffer was used after it was freed"
        return self._address

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The memory as uint8 ``[size_bytes]``."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size_bytes).from_address(self.address))

    def close(self) -> None:
        """Free the memory; closing twice is harmless."""
        address, self._address = self._address, None
        if address is not None:
            self._cuda.free_pinned(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Arena:
    """One block of device memory that stages use in turn, as large as the largest of those that are loaded needs.

    Its content is lost when it grows or shrinks, and :attr:`generation` counts how often that was: whoever recorded its
    address compares.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._block: DeviceBuffer | None = None
        self.generation = 0

    @property
    def size_bytes(self) -> int:
        """How large it is now."""
        return 0 if self._block is None else self._block.size_bytes

    def reserve(self, size_bytes: int, purpose: str) -> DeviceBuffer:
        """Return the block, grown to at least ``size_bytes``. Nothing that uses it may be running.

        Raises:
            EngineError: If there is not enough memory.
        """
        if self._block is None or self._block.size_bytes < size_bytes:
            self.close()  # first, so that the two are never there together
            self._block = DeviceBuffer(self._cuda, size_bytes, purpose)
            self.generation += 1
        return self._block

    def shrink(self, size_bytes: int) -> None:
        """Free the block if it is larger than ``size_bytes`` ask for; nothing that uses it may be running.

        Another is made by the next :meth:`reserve`: whoever gives things back must not be refused memory.
        """
        if self._block is not None and self._block.size_bytes > (aligned(size_bytes) if size_bytes else 0):
            self.close()
            self.generation += 1

    def close(self) -> None:
        """Free the block; a later :meth:`reserve` allocates another."""
        block, self._block = self._block, None
        if block is not None:
            block.close()
