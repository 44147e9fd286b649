"""CUDA graphs: work that is recorded once and launched many times, with the addresses that it was recorded with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reelforge.runtime.cuda.driver import Cuda
from reelforge.runtime.errors import EngineError


class CudaGraph:
    """Recorded work. Make one with :func:`capture`.

    Everything that it reads and writes must outlive it, where it was.
    """

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda = cuda
        self._executable: Any | None = executable

    def launch(self, stream: int) -> None:
        """Enqueue the recorded work."""
        assert self._executable is not None, "a graph was launched after it was closed"
        self._cuda.launch(self._executable, stream)

    def close(self) -> None:
        """Destroy the graph, which must not be running; closing twice is harmless."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._cuda.destroy_executable(executable)


def capture(cuda: Cuda, stream: int, enqueue: Callable[[], None]) -> CudaGraph:
    """Record what ``enqueue`` enqueues on ``stream``; nothing of it runs.

    Raises:
        EngineError: If ``enqueue`` raises it, or does what a graph cannot hold. The stream is usable afterwards.
    """
    cuda.begin_capture(stream)
    try:
        enqueue()
    except BaseException:
        _abandon(cuda, stream)
        raise
    graph = cuda.end_capture(stream)
    try:
        return CudaGraph(cuda, cuda.instantiate(graph))
    finally:
        cuda.destroy_graph(graph)


def _abandon(cuda: Cuda, stream: int) -> None:
    """Leave capture mode after a failure, of which CUDA would only say once more that the capture is invalid."""
    try:
        graph = cuda.end_capture(stream)
    except EngineError:
        return
    cuda.destroy_graph(graph)
