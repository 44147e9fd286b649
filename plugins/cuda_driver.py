"""Launches compiled kernels through the CUDA driver, for tests and benchmarks on a GPU.

In an engine TensorRT does this. What is launched is the shipped PTX with the schema's parameters, so that a test here
covers what an engine runs. Memory, streams and the context are the caller's (PyTorch's), which must be initialised.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from reelforge.plugins.compile import CompiledKernel
from reelforge.runtime.errors import EngineError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LIBRARY = "libcuda.so.1"


class LoadedKernel:
    """A kernel in the current CUDA context.

    Args:
        kernel: For the architecture of the current GPU.

    Raises:
        EngineError: If there is no driver, or it refuses the code.
    """

    def __init__(self, kernel: CompiledKernel) -> None:
        try:
            self._cuda = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise EngineError("there is no CUDA driver.", expected=_LIBRARY, fix="install NVIDIA's driver") from error
        self.kernel = kernel
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        code = kernel.ptx.encode() + b"\0"
        self._check("cuModuleLoadData", self._cuda.cuModuleLoadData(ctypes.byref(module), code))
        name = kernel.entry.encode()
        self._check("cuModuleGetFunction", self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, name))
        shared = kernel.sheet.shared_bytes
        result = self._cuda.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared)
        self._check("cuFuncSetAttribute", result)

    def launch(self, pointers: Mapping[str, int], sizes: Mapping[str, int], stream: int) -> None:
        """Start the kernel on ``stream``.

        Args:
            pointers: Device addresses of all inputs and outputs by name.
            sizes: Symbols of shapes, see ``PluginSchema.sizes``.
            stream: A CUDA stream's handle.

        Raises:
            EngineError: If the driver refuses the launch.
        """
        schema = self.kernel.variant.schema
        values: list[ctypes.c_uint64 | ctypes.c_int32] = []
        values += [ctypes.c_uint64(pointers[tensor.name]) for tensor in schema.inputs]
        values += [ctypes.c_int32(sizes[extra.name]) for extra in schema.extras]
        values += [ctypes.c_uint64(pointers[tensor.name]) for tensor in schema.outputs]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = self.grid(sizes)
        result = self._cuda.cuLaunchKernel(
            self._function,
            *(ctypes.c_uint(size) for size in (*grid, self.kernel.threads, 1, 1, self.kernel.sheet.shared_bytes)),
            ctypes.c_void_p(stream),
            arguments,
            None,
        )
        self._check("cuLaunchKernel", result)

    def grid(self, sizes: Mapping[str, int]) -> Sequence[int]:
        """Return the number of blocks in x, y and z."""
        constants = self.kernel.variant.constants()
        return [extent.of(sizes, constants) for extent in self.kernel.variant.schema.grid]

    def _check(self, call: str, result: int) -> None:
        if result != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(result, ctypes.byref(text))
            raise EngineError(
                f"{call} failed for {self.kernel.variant.name}.",
                received=f"{result}: {(text.value or b'unknown').decode()}",
                expected=f"a GPU of compute capability {self.kernel.variant.architecture}, with a recent driver",
            )
