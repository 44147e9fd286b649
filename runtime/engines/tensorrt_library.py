"""The part of TensorRT's and TensorRT-RTX's Python API that running a plan takes, typed, and how to load it.

The two libraries have the same classes; TensorRT-RTX compiles a plan's kernels when the plan is loaded, and has
settings for that. The module knows neither plans' files nor stages.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from reelforge.runtime.engines.kernel_cache import KernelCache
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend

MODULES = {Backend.RTX: "tensorrt_rtx", Backend.TRT: "tensorrt"}
PRODUCTS = {Backend.RTX: "TensorRT-RTX", Backend.TRT: "TensorRT"}

DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
"""numpy's name (and bfloat16, which stays on the device) -> member of ``DataType``."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}

_REMEMBERED = 8
_SHOWN = ("INTERNAL_ERROR", "ERROR", "WARNING")


class ExecutionContext(Protocol):
    """``IExecutionContext``."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Choose a profile."""
        ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set the shape of an input."""
        ...

    def infer_shapes(self) -> list[str]:
        """Return the names of inputs that are not specified."""
        ...

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Return a shape; -1 where it is unknown."""
        ...

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Say where a tensor is."""
        ...

    def set_device_memory(self, memory: int, size: int) -> None:
        """Say where activations may be."""
        ...

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Enqueue the plan."""
        ...


class CudaEngine(Protocol):
    """``ICudaEngine``."""

    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""
        ...

    def get_tensor_mode(self, name: str) -> Any:
        """Return a ``TensorIOMode``."""
        ...

    def get_tensor_dtype(self, name: str) -> Any:
        """Return a ``DataType``."""
        ...

    def get_tensor_location(self, name: str) -> Any:
        """Return a ``TensorLocation``."""
        ...

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Return what activations take in a profile, in bytes."""
        ...

    def create_execution_context(self, settings: Any) -> ExecutionContext | None:
        """Make a context, given an ``ExecutionContextAllocationStrategy`` or an ``IRuntimeConfig``."""
        ...

    def create_runtime_config(self) -> Any:
        """Return an ``IRuntimeConfig``."""
        ...


class TensorRtLibrary:
    """A loaded library with its logger and runtime. Make one with :func:`load_library`.

    One serves all engines of a session: the libraries keep the logger that they were first given.
    """

    def __init__(self, module: Any, backend: Backend) -> None:
        self.module = module
        self.backend = backend
        self.name = PRODUCTS[backend]
        self.version = str(module.__version__)
        self._messages: deque[str] = deque(maxlen=_REMEMBERED)
        self._logger: Any | None = _logger(module, self._messages)
        self._runtime: Any | None = module.Runtime(self._logger)

    def deserialize(self, plan: Any) -> CudaEngine | None:
        """Load a plan, given as a buffer, onto the calling thread's GPU; None if the library refuses it."""
        assert self._runtime is not None, "the library was used after it was closed"
        engine: CudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        return engine

    def create_context(self, engine: CudaEngine, kernels: KernelCache | None = None) -> ExecutionContext | None:
        """Return a context whose activations are where its user says; None if the library refuses.

        Args:
            engine: The plan.
            kernels: Where TensorRT-RTX finds and leaves what it compiles.

        TensorRT-RTX compiles kernels for a shape at its first use, at once: with its default, one request's steps would
        come from two different kernels, depending on when a thread has finished compiling.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.backend is not Backend.RTX:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if kernels is not None and hasattr(config, "create_runtime_cache"):
            kernels.attach(config)
        return engine.create_execution_context(config)

    def can_capture(self, context: ExecutionContext, stream: int) -> bool:
        """Return whether the context's work can be recorded in a CUDA graph, as far as the library can tell."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def messages(self) -> str:
        """Return the library's last errors and warnings, and forget them."""
        text = " | ".join(self._messages)
        self._messages.clear()
        return text or f"{self.name} gave no message"

    def close(self) -> None:
        """Let the runtime and then its logger go; all engines are closed before. Closing twice is harmless."""
        self._runtime = None
        self._logger = None


def load_library(backend: Backend) -> TensorRtLibrary:
    """Import the library that runs ``backend``'s plans.

    Raises:
        EngineError: If it is not installed, or one of its own libraries is missing.
    """
    name = MODULES[backend]
    extra = {Backend.RTX: "rtx", Backend.TRT: "tensorrt"}[backend]
    try:
        module = importlib.import_module(name)
        if not hasattr(module, "Runtime"):  # a folder of type stubs, or what an uninstallation left, imports as well
            raise ImportError(f"{name} has no Runtime")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{PRODUCTS[backend]} cannot be loaded, and this bundle's engines run on it.",
            received=str(error),
            expected=f"the package {name} with its libraries",
            fix=f"pip install reelforge[{extra}]",
        ) from error
    return TensorRtLibrary(module, backend)


def _logger(module: Any, messages: deque[str]) -> Any:
    """Return a logger that keeps errors and warnings; its class has the library's as base, which is loaded late."""
    base = module.ILogger
    shown = [getattr(base, severity) for severity in _SHOWN]

    def initialise(self: Any) -> None:
        base.__init__(self)

    def log(self: Any, severity: Any, message: str) -> None:
        del self
        if severity in shown:
            messages.append(str(message).strip())

    return type("CollectingLogger", (base,), {"__init__": initialise, "log": log})()
