"""One GPU through cuda-python's bindings: every call's return code is checked and becomes an :class:`EngineError`.

Addresses, streams and graphs are the plain handles of CUDA; ``memory`` and ``graph`` own them. The module does not know
what is copied or launched.
"""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass
from typing import Any

from reelforge.runtime.errors import EngineError, OutOfMemoryError

_NO_GPU = {35, 100}  # cudaErrorInsufficientDriver, cudaErrorNoDevice
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# Codes after which CUDA refuses everything in this process: illegal address, timeout, assert, lost device and the like.
_CORRUPTED = {214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999}


class Copy(enum.Enum):
    """Where a copy goes; values are names of ``cudaMemcpyKind``."""

    TO_DEVICE = "cudaMemcpyHostToDevice"
    TO_HOST = "cudaMemcpyDeviceToHost"
    ON_DEVICE = "cudaMemcpyDeviceToDevice"


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU: its number, name, compute capability (major, minor) and memory."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    total_bytes: int

    @property
    def architecture(self) -> str:
        """The compute capability as ``runtime.architectures`` writes it, ``sm89``."""
        return "sm{}{}".format(*self.capability)


def open_cuda(ordinal: int = 0) -> Cuda:
    """Open a GPU of this machine.

    Args:
        ordinal: Its number as CUDA counts, from 0 (after ``CUDA_VISIBLE_DEVICES``).

    Raises:
        EngineError: If cuda-python is not installed, there is no driver, no GPU, or none of that number.
    """
    try:
        bindings: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            "cuda-python is not installed, and this bundle's engines run on an NVIDIA GPU.",
            received=str(error),
            expected="the package cuda-python, version 13 or newer",
            fix="pip install reelforge[rtx] or reelforge[tensorrt]",
        ) from error
    code, count = bindings.cudaGetDeviceCount()
    if int(code) in _NO_GPU or (int(code) == 0 and count == 0):
        raise EngineError(
            "there is no NVIDIA GPU that CUDA can use.",
            received=_words(bindings, code) if int(code) else "0 devices",
            expected="a GPU and a driver for CUDA 13 or newer",
            fix="run nvidia-smi to see GPU and driver, or build the bundle with --target cpu",
        )
    if int(code):
        raise EngineError("CUDA cannot count this machine's GPUs.", received=_words(bindings, code))
    if not 0 <= ordinal < count:
        raise EngineError(
            f"this machine has no GPU {ordinal}.",
            received=ordinal,
            expected=f"0..{count - 1}",
            fix="choose another device",
        )
    return Cuda(bindings, ordinal)


class Cuda:
    """One GPU, as the threads that called :meth:`activate` see it. Make one with :func:`open_cuda`."""

    def __init__(self, bindings: Any, ordinal: int) -> None:
        self._bindings = bindings
        self._ordinal = ordinal
        self._corrupted = False
        self.activate()
        properties = self._call("cudaGetDeviceProperties", ordinal, doing="read the GPU's properties")
        name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else str(properties.name)
        capability = (int(properties.major), int(properties.minor))
        self.device = DeviceInfo(ordinal, name.rstrip("\0"), capability, int(properties.totalGlobalMem))

    def activate(self) -> None:
        """Make this the calling thread's GPU; CUDA keeps one per thread."""
        self._call("cudaSetDevice", self._ordinal, doing=f"choose GPU {self._ordinal}")

    def activate_to_close(self) -> None:
        """Like :meth:`activate`, but silent after a fault: what is left to do is to give things back."""
        self._release("cudaSetDevice", self._ordinal, doing=f"choose GPU {self._ordinal}")

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of device memory."""
        free, total = self._call("cudaMemGetInfo", doing="ask for free memory")
        return int(free), int(total)

    def allocate(self, size_bytes: int, purpose: str) -> int:
        """Allocate device memory and return its address, a multiple of 256.

        Raises:
            OutOfMemoryError: If there is not enough, saying how much is free.
        """
        code, address = self._bindings.cudaMalloc(size_bytes)
        if int(code) == _OUT_OF_MEMORY:
            self._bindings.cudaGetLastError()  # or the next call of a library would report it as its own
            free, total = self.memory()
            raise OutOfMemoryError(
                f"GPU {self._ordinal} ({self.device.name}) has too little memory for {purpose}.",
                received=f"{free} of {total} bytes free",
                expected=f"{size_bytes} bytes",
                fix="make a smaller or shorter video, or end other programs that use this GPU (nvidia-smi lists them)",
            )
        self._check("cudaMalloc", code, f"allocate {size_bytes} bytes for {purpose}")
        return int(address)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._release("cudaFree", address, doing="free device memory")

    def allocate_pinned(self, size_bytes: int) -> int:
        """Allocate page-locked host memory, from and to which copies are asynchronous, and return its address."""
        flags = self._bindings.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", size_bytes, flags, doing=f"page-lock {size_bytes} bytes"))

    def free_pinned(self, address: int) -> None:
        """Free page-locked host memory."""
        self._release("cudaFreeHost", address, doing="free page-locked memory")

    def copy(self, target: int, source: int, size_bytes: int, kind: Copy, stream: int) -> None:
        """Enqueue a copy; both ranges must stay as they are until the stream has come to it."""
        direction = getattr(self._bindings.cudaMemcpyKind, kind.value)
        self._call("cudaMemcpyAsync", target, source, size_bytes, direction, stream, doing=f"copy {size_bytes} bytes")

    def fill(self, target: int, byte: int, size_bytes: int, stream: int) -> None:
        """Enqueue setting every byte of a range of device memory."""
        self._call("cudaMemsetAsync", target, byte, size_bytes, stream, doing=f"fill {size_bytes} bytes")

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        flags = self._bindings.cudaStreamNonBlocking
        return int(self._call("cudaStreamCreateWithFlags", flags, doing="create a stream"))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._release("cudaStreamDestroy", stream, doing="destroy a stream")

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on a stream is done.

        Raises:
            EngineError: If any of it failed: kernels report their faults here and not where they are launched.
        """
        self._call("cudaStreamSynchronize", stream, doing="run what was enqueued on the GPU")

    def create_event(self) -> int:
        """Create an event that records time."""
        return int(self._call("cudaEventCreateWithFlags", self._bindings.cudaEventDefault, doing="create an event"))

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._release("cudaEventDestroy", event, doing="destroy an event")

    def record_event(self, event: int, stream: int) -> None:
        """Enqueue an event."""
        self._call("cudaEventRecord", event, stream, doing="record an event")

    def elapsed_ms(self, start: int, end: int) -> float:
        """Wait for ``end`` and return the milliseconds between two events."""
        self._call("cudaEventSynchronize", end, doing="wait for an event")
        return float(self._call("cudaEventElapsedTime", start, end, doing="read two events' times"))

    def begin_capture(self, stream: int) -> None:
        """Record what this thread enqueues on a stream instead of running it."""
        mode = self._bindings.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode, doing="begin to capture a graph")

    def end_capture(self, stream: int) -> Any:
        """End recording and return the graph.

        Raises:
            EngineError: If something was enqueued that a graph cannot hold.
        """
        return self._call("cudaStreamEndCapture", stream, doing="end capturing a graph")

    def instantiate(self, graph: Any) -> Any:
        """Return an executable form of a graph."""
        return self._call("cudaGraphInstantiate", graph, 0, doing="make a graph executable")

    def launch(self, executable: Any, stream: int) -> None:
        """Enqueue a graph."""
        self._call("cudaGraphLaunch", executable, stream, doing="launch a graph")

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph; executables made from it stay."""
        self._release("cudaGraphDestroy", graph, doing="destroy a graph")

    def destroy_executable(self, executable: Any) -> None:
        """Destroy an executable graph that is not running."""
        self._release("cudaGraphExecDestroy", executable, doing="destroy an executable graph")

    def _call(self, name: str, *arguments: object, doing: str) -> Any:
        code, *values = getattr(self._bindings, name)(*arguments)
        self._check(name, code, doing)
        return values[0] if len(values) == 1 else tuple(values)

    def _release(self, name: str, *arguments: object, doing: str) -> None:
        """Call a function that gives something back.

        After a fault CUDA answers every call with the code of that fault, which was raised where it happened; the
        process' end gives the memory back.
        """
        code, *_ = getattr(self._bindings, name)(*arguments)
        if not self._corrupted:
            self._check(name, code, doing)

    def _check(self, name: str, code: Any, doing: str) -> None:
        if int(code) == 0:
            return
        self._bindings.cudaGetLastError()
        self._corrupted = self._corrupted or int(code) in _CORRUPTED
        kind = OutOfMemoryError if int(code) == _OUT_OF_MEMORY else EngineError
        raise kind(
            f"GPU {self._ordinal} cannot {doing}.",
            received=f"{name}: {_words(self._bindings, code)}",
            fix="restart the program: CUDA does not recover from this in a running process" if self._corrupted else "",
        )


def _words(bindings: Any, code: Any) -> str:
    name, text = (bindings.cudaGetErrorName(code)[1], bindings.cudaGetErrorString(code)[1])
    return f"{name.decode()} ({int(code)}): {text.decode()}"
