"""A GPU's session whose copies are timed by events on its stream, and whose plans can tell how long each layer takes.

Copies within a sampling step are recorded in a CUDA graph together with the plan, and count to the step. The module is
imported for bundles with plans only. It was tested on stand-ins for CUDA and TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reelforge.runtime.cuda.driver import Cuda, open_cuda
from reelforge.runtime.engines.device_session import DeviceSession
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.engines.kernel_cache import KernelCache
from reelforge.runtime.engines.tensorrt_library import (
    CudaEngine,
    ExecutionContext,
    TensorRtLibrary,
    load_library,
)
from reelforge.tools.profiling.schema import Kind

if TYPE_CHECKING:
    from reelforge.tools.profiling.instrument import ProfilingPipeline

TO_DEVICE, TO_HOST = "copy to device", "copy to host"


@dataclass(frozen=True)
class _Copy:
    name: str
    size_bytes: int
    started_ms: float
    events: tuple[int, int]


class TimedDeviceSession(DeviceSession):
    """A session that records every upload and download outside of recorded graphs."""

    def __init__(self, cuda: Cuda, library: TensorRtLibrary, pipeline: ProfilingPipeline) -> None:
        super().__init__(cuda, library)
        self._pipeline = pipeline
        self._copies: list[_Copy] = []

    @contextmanager
    def work(self) -> Iterator[None]:
        """Enqueue inside of the block; at its end everything has run and the copies' times are known."""
        try:
            with super().work():
                yield
            self._record_copies()
        finally:
            for copy in self._copies:
                for event in copy.events:
                    self.cuda.destroy_event(event)
            self._copies.clear()

    def upload(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous array to the device, between two events."""
        with self._between_events(TO_DEVICE, array.nbytes):
            super().upload(address, array)

    def download(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous array, between two events."""
        with self._between_events(TO_HOST, array.nbytes):
            super().download(array, address)

    @contextmanager
    def _between_events(self, name: str, size_bytes: int) -> Iterator[None]:
        events = (self.cuda.create_event(), self.cuda.create_event())
        self._copies.append(_Copy(name, size_bytes, self._pipeline.recorder.now_ms(), events))
        self.cuda.record_event(events[0], self.stream)
        yield
        self.cuda.record_event(events[1], self.stream)

    def _record_copies(self) -> None:
        recorder = self._pipeline.recorder
        for copy in self._copies:
            elapsed_ms = self.cuda.elapsed_ms(*copy.events)
            # The device's clock is not the host's: the span begins where the copy was enqueued.
            end_ms = copy.started_ms + elapsed_ms
            recorder.add(copy.name, Kind.COPY, "", copy.started_ms, end_ms, copy.size_bytes)
        free, total = self.cuda.memory()
        recorder.device_bytes = total - free


class ProfiledLibrary(TensorRtLibrary):
    """A library whose contexts report the time of every layer, while the pipeline asks for it.

    TensorRT times layers by events between them, which costs a little: such runs are not counted.
    """

    def __init__(self, library: TensorRtLibrary, pipeline: ProfilingPipeline) -> None:
        # The library itself, not a second one: all engines of a process share the logger that came first.
        self.__dict__.update(library.__dict__)
        self._pipeline = pipeline

    def create_context(self, engine: CudaEngine, kernels: KernelCache | None = None) -> ExecutionContext | None:
        """Return a context, with a profiler if layers are wanted."""
        context: Any = super().create_context(engine, kernels)
        reports = self._pipeline.device_layers
        if context is not None and reports is not None:
            context.profiler = _layer_profiler(self.module, reports.setdefault(self._pipeline.loading, []))
            context.enqueue_emits_profile = True
        return context  # type: ignore[no-any-return]


def open_timed_session(pipeline: ProfilingPipeline) -> TimedDeviceSession:
    """Open the GPU of a pipeline's options.

    Raises:
        EngineError: If there is no such GPU, or a package is missing.
    """
    cuda = open_cuda(pipeline.options.device)
    library = load_library(pipeline.bundle.manifest.target.backend)
    return TimedDeviceSession(cuda, ProfiledLibrary(library, pipeline), pipeline)


def _layer_profiler(module: Any, reports: list[tuple[str, float]]) -> Any:
    """Return an ``IProfiler`` that appends (layer name, milliseconds); its base is the library's, loaded late."""
    base = module.IProfiler

    def initialise(self: Any) -> None:
        base.__init__(self)

    def report_layer_time(self: Any, layer_name: str, ms: float) -> None:
        del self
        reports.append((layer_name, ms))

    return type("LayerProfiler", (base,), {"__init__": initialise, "report_layer_time": report_layer_time})()
