"""What all engines on one GPU share: the stream, the arena for activations, and the loaded TensorRT library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from reelforge.runtime.cuda.driver import Copy, Cuda, open_cuda
from reelforge.runtime.cuda.memory import Arena
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.engines.tensorrt_library import TensorRtLibrary, load_library
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend


class _Attached(Protocol):
    @property
    def arena_bytes(self) -> int:
        """What the engine has asked of the arena."""
        ...

    def close(self) -> None: ...


class DeviceSession:
    """One GPU with one stream. Make one with :func:`open_session`; one thread at a time may use it."""

    def __init__(self, cuda: Cuda, library: TensorRtLibrary) -> None:
        self.cuda = cuda
        self.library = library
        self.stream = cuda.create_stream()
        self.arena = Arena(cuda)
        self._engines: list[_Attached] = []
        self._closed = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enqueue inside of the block; at its end everything has run.

        After an error nothing is left running either, so that arrays and buffers may go.

        Raises:
            EngineError: If the session is closed, or anything enqueued has failed.
        """
        if self._closed:
            raise EngineError("the GPU was used after its session was closed.", fix="open the pipeline again")
        self.cuda.activate()
        try:
            yield
        except BaseException:
            self._settle()
            raise
        self.cuda.synchronize(self.stream)

    def upload(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous array to the device."""
        if array.nbytes:
            self.cuda.copy(address, array.ctypes.data, array.nbytes, Copy.TO_DEVICE, self.stream)

    def download(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous array, which is complete when :meth:`work` ends."""
        if array.nbytes:
            self.cuda.copy(array.ctypes.data, address, array.nbytes, Copy.TO_HOST, self.stream)

    def attach(self, engine: _Attached) -> None:
        """Remember an engine, so that it is closed before what it stands on."""
        self._engines.append(engine)

    def detach(self, engine: _Attached) -> None:
        """Forget an engine that is closed; the arena keeps what those that are still loaded need."""
        self._engines = [other for other in self._engines if other is not engine]
        self.arena.shrink(max((other.arena_bytes for other in self._engines), default=0))

    def close(self) -> None:
        """Close all engines, then the library, the arena and the stream. Closing twice is harmless."""
        if self._closed:
            return
        self.cuda.activate_to_close()
        self._settle()
        for engine in reversed(self._engines):
            engine.close()
        self._closed = True
        self.library.close()
        self.arena.close()
        self.cuda.destroy_stream(self.stream)

    def _settle(self) -> None:
        """Wait for the stream after an error that is already on its way to the user."""
        try:
            self.cuda.synchronize(self.stream)
        except EngineError:
            return


def open_session(backend: Backend, device: int) -> DeviceSession:
    """Open a GPU and load the library that runs ``backend``'s plans.

    Raises:
        EngineError: If there is no such GPU, or a package is missing.
    """
    cuda = open_cuda(device)
    return DeviceSession(cuda, load_library(backend))


def contiguous(array: Array) -> Array:
    """Return the array, or a contiguous copy of the same rank."""
    return array if array.flags.c_contiguous else np.array(array, order="C")
