"""A stand-in for ``cuda.bindings.runtime`` that runs nothing early and forgives nothing.

What is enqueued runs when the stream is synchronised, so that reading too soon reads rubbish and altering a source too
soon alters the result. Addresses are never given out twice, so that a freed one stays wrong. Every call is in ``log``.
Enumerations, error names and error texts are the real package's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

SUCCESS = real.cudaError_t.cudaSuccess
OUT_OF_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation
ILLEGAL_ADDRESS = real.cudaError_t.cudaErrorIllegalAddress
CAPTURE_UNSUPPORTED = real.cudaError_t.cudaErrorStreamCaptureUnsupported
CAPTURE_INVALIDATED = real.cudaError_t.cudaErrorStreamCaptureInvalidated

VALUES = {
    "cudaMemGetInfo": 2,
    **dict.fromkeys(
        ("cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags",
         "cudaEventCreateWithFlags", "cudaEventElapsedTime", "cudaStreamEndCapture", "cudaGraphInstantiate"), 1,
    ),
}  # fmt: skip
"""How many values a function returns besides its code."""

Work = Callable[[], None]


@dataclass
class Stream:
    queue: list[Work] = field(default_factory=list)
    recorded: list[Work] | None = None  # not None: capturing
    valid: bool = True


class Misuse(AssertionError):
    """Something that a GPU would answer with a crash, or with wrong numbers."""


class FakeCuda:
    """Attributes that begin with ``cuda`` are those of the bindings; the others are for tests."""

    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaEventDefault = real.cudaEventDefault
    cudaHostAllocDefault = real.cudaHostAllocDefault

    def __init__(self, capability: tuple[int, int] = (8, 9), total_bytes: int = 1 << 30, devices: int = 1) -> None:
        self.capability, self.total_bytes, self.devices = capability, total_bytes, devices
        self.log: list[str] = []
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, int | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.failures: dict[str, list[Any]] = {}  # function -> codes of its next calls
        self.fault: Any = None  # what a fault on the GPU left behind
        self.fault_at_synchronize: Any = None
        self.peak_bytes = 0
        self._next = 0x7000_0000_0000
        self._handle = 100
        self._clock = 0

    # For tests and for the fake of TensorRT.

    def used_bytes(self) -> int:
        return sum(block.nbytes for block in self.device.values())

    def leaks(self) -> dict[str, int]:
        kinds = ("device", "pinned", "streams", "events", "graphs", "executables")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def view(self, address: int, size_bytes: int) -> np.ndarray:
        """The bytes of a range, which must lie in one live allocation."""
        for base, block in self.device.items():
            if base <= address and address + size_bytes <= base + block.nbytes:
                return block[address - base : address - base + size_bytes]
        raise Misuse(f"{size_bytes} bytes at {address:#x} are not inside of one live allocation")

    def enqueue(self, stream: int, work: Work) -> Any:
        target = self.streams.get(int(stream))
        if target is None:
            raise Misuse(f"stream {int(stream)} does not exist")
        (target.queue if target.recorded is None else target.recorded).append(work)
        return SUCCESS

    def capturing(self, stream: int) -> bool:
        return self.streams[int(stream)].recorded is not None

    # The bindings.

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._call("cudaGetDeviceCount", lambda: (self.devices,))

    def cudaSetDevice(self, ordinal: int) -> tuple[Any, ...]:
        return self._call("cudaSetDevice", tuple, ordinal)

    def cudaGetDeviceProperties(self, ordinal: int) -> tuple[Any, ...]:
        major, minor = self.capability
        properties = SimpleNamespace(name=b"Fake GPU", major=major, minor=minor, totalGlobalMem=self.total_bytes)
        return self._call("cudaGetDeviceProperties", lambda: (properties,))

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._call("cudaMemGetInfo", lambda: (self.total_bytes - self.used_bytes(), self.total_bytes))

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self.fault or SUCCESS,)

    def cudaGetErrorName(self, code: Any) -> tuple[Any, ...]:
        return real.cudaGetErrorName(code)

    def cudaGetErrorString(self, code: Any) -> tuple[Any, ...]:
        return real.cudaGetErrorString(code)

    def cudaMalloc(self, size_bytes: int) -> tuple[Any, ...]:
        if size_bytes <= 0:
            raise Misuse("an empty allocation")
        if self.used_bytes() + size_bytes > self.total_bytes:
            self.log.append("cudaMalloc fails")
            return (OUT_OF_MEMORY, None)
        return self._unsafe("cudaMalloc", lambda: (self._allocate(self.device, size_bytes),), size_bytes)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._unsafe("cudaFree", lambda: self._give_back(self.device, address))

    def cudaHostAlloc(self, size_bytes: int, flags: int) -> tuple[Any, ...]:
        def allocate() -> tuple[int]:
            block = np.full(size_bytes, 0xCD, np.uint8)
            self.pinned[block.ctypes.data] = block
            return (block.ctypes.data,)

        return self._unsafe("cudaHostAlloc", allocate, size_bytes)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._unsafe("cudaFreeHost", lambda: self._give_back(self.pinned, address))

    def cudaMemcpyAsync(self, target: int, source: int, size_bytes: int, kind: Any, stream: int) -> tuple[Any, ...]:
        kinds = self.cudaMemcpyKind
        work: Work
        if kind == kinds.cudaMemcpyDeviceToDevice:
            self.view(target, size_bytes), self.view(source, size_bytes)

            def work() -> None:
                self.view(target, size_bytes)[:] = self.view(source, size_bytes)
        elif kind == kinds.cudaMemcpyDeviceToHost:
            self.view(source, size_bytes)

            def work() -> None:
                _host(target, size_bytes)[:] = self.view(source, size_bytes)
        else:
            self.view(target, size_bytes)
            pinned = any(base <= source and source + size_bytes <= base + b.nbytes for base, b in self.pinned.items())
            if not pinned and self.capturing(stream):
                raise Misuse("a graph would copy from memory that is not page-locked")
            # Pageable memory is read before the call returns; page-locked memory when the stream comes to it.
            staged = None if pinned else _host(source, size_bytes).copy()

            def work() -> None:
                if staged is None and not any(base <= source < base + b.nbytes for base, b in self.pinned.items()):
                    raise Misuse("a copy from page-locked memory that is freed")
                self.view(target, size_bytes)[:] = _host(source, size_bytes) if staged is None else staged

        return self._enqueued("cudaMemcpyAsync", stream, work, kind.name, size_bytes)

    def cudaMemsetAsync(self, target: int, byte: int, size_bytes: int, stream: int) -> tuple[Any, ...]:
        def work() -> None:
            self.view(target, size_bytes)[:] = byte

        return self._enqueued("cudaMemsetAsync", stream, work, byte, size_bytes)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        return self._call("cudaStreamCreateWithFlags", lambda: (self._new(self.streams, Stream()),))

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return self._call("cudaStreamDestroy", lambda: self._drop(self.streams, stream))

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        target = self.streams[int(stream)]
        if target.recorded is not None:
            target.valid = False
            self.log.append("cudaStreamSynchronize fails")
            return (CAPTURE_UNSUPPORTED,)

        def run() -> tuple[()]:
            queue, target.queue = target.queue, []
            for work in queue:
                work()
            return ()

        if self.fault_at_synchronize is not None:
            self.fault, self.fault_at_synchronize = self.fault_at_synchronize, None
        return self._call("cudaStreamSynchronize", run)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._call("cudaEventCreateWithFlags", lambda: (self._new(self.events, None),))

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        return self._call("cudaEventDestroy", lambda: self._drop(self.events, event))

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        def work() -> None:
            self._clock += 1
            self.events[int(event)] = self._clock

        return self._enqueued("cudaEventRecord", stream, work)

    def cudaEventSynchronize(self, event: int) -> tuple[Any, ...]:
        def run() -> tuple[()]:
            for handle in self.streams:
                self.cudaStreamSynchronize(handle)
            return ()

        return self._call("cudaEventSynchronize", run)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:
        first, last = self.events[int(start)], self.events[int(end)]
        assert first is not None
        assert last is not None
        return self._call("cudaEventElapsedTime", lambda: (float(last - first),))

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        def begin() -> tuple[()]:
            self.streams[int(stream)].recorded, self.streams[int(stream)].valid = [], True
            return ()

        return self._call("cudaStreamBeginCapture", begin)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        target = self.streams[int(stream)]
        work, target.recorded = target.recorded, None
        assert work is not None, "no capture to end"
        if not target.valid:
            self.log.append("cudaStreamEndCapture fails")
            return (CAPTURE_INVALIDATED, None)
        return self._call("cudaStreamEndCapture", lambda: (self._new(self.graphs, work),))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        work = self.graphs[int(graph)]
        return self._call("cudaGraphInstantiate", lambda: (self._new(self.executables, work),), len(work))

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._call("cudaGraphDestroy", lambda: self._drop(self.graphs, graph))

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        nodes = self.executables[int(executable)]

        def work() -> None:
            for node in nodes:
                node()

        return self._enqueued("cudaGraphLaunch", stream, work)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        return self._call("cudaGraphExecDestroy", lambda: self._drop(self.executables, executable))

    def _call(self, name: str, run: Callable[[], tuple[Any, ...]], *shown: object) -> tuple[Any, ...]:
        planned = self.failures.get(name)
        code = planned.pop(0) if planned else self.fault
        if code is not None:
            self.log.append(f"{name} fails")
            return (code, *(None for _ in range(VALUES.get(name, 0))))
        self.log.append(" ".join([name, *map(str, shown)]))
        return (SUCCESS, *run())

    def _unsafe(self, name: str, run: Callable[[], tuple[Any, ...]], *shown: object) -> tuple[Any, ...]:
        """Allocations: not while a stream records, and not given back while work that may use them waits."""
        for stream in self.streams.values():
            if stream.recorded is not None:
                stream.valid = False
                return (CAPTURE_UNSUPPORTED, None)
            if name.startswith("cudaFree") and stream.queue and self.fault is None:
                raise Misuse(f"{name} while work is enqueued")
        return self._call(name, run, *shown)

    def _enqueued(self, name: str, stream: int, work: Work, *shown: object) -> tuple[Any, ...]:
        if int(stream) not in self.streams:
            raise Misuse(f"{name} on stream {stream}, which does not exist")

        def run() -> tuple[()]:
            self.enqueue(stream, work)
            return ()

        return self._call(name, run, *shown)

    def _allocate(self, blocks: dict[int, np.ndarray], size_bytes: int) -> int:
        address = self._next
        self._next += -(-size_bytes // 512) * 512 + (1 << 20)
        blocks[address] = np.full(size_bytes, 0xCD, np.uint8)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())
        return address

    def _give_back(self, blocks: dict[int, np.ndarray], address: int) -> tuple[()]:
        if address not in blocks:
            raise Misuse(f"{address:#x} is not allocated")
        del blocks[address]
        return ()

    def _new(self, objects: dict[int, Any], value: object) -> int:
        self._handle += 1
        objects[self._handle] = value
        return self._handle

    def _drop(self, objects: dict[int, Any], handle: int) -> tuple[()]:
        if int(handle) not in objects:
            raise Misuse(f"handle {int(handle)} does not exist")
        del objects[int(handle)]
        return ()


def _host(address: int, size_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, modules: dict[str, object]) -> Iterator[None]:
    """Imports of these names, late ones too, give the fakes; None makes an import fail as a missing package does."""
    import importlib

    genuine = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name not in modules:
            return genuine(name, package)
        if modules[name] is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return modules[name]

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", fake)
        yield
