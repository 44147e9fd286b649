"""Runs kernels on the CPU, in Triton's interpreter: for tests and the numerics table, far too slow for anything else.

Whether kernels are interpreted is decided when Triton is imported, so it happens in a process that is kept for it.
The interpreter shows what a kernel computes. It cannot show accumulation in fewer bits than fp32, races, or how data
lies in registers. Two of its operations are replaced here: its cast from fp32 to e4m3 loses the carry of the mantissa
(31.6 becomes 16), and its matrix product takes the bits of bf16 operands for integers.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.schema import PLUGINS, DType

_SWITCH = "TRITON_INTERPRET"


class Interpreter:
    """A process that interprets kernels; a context manager."""

    def __init__(self) -> None:
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "1"  # read by the child when it imports Triton
        try:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context)
            self._pool.submit(_start).result()
        finally:
            os.environ.pop(_SWITCH) if before is None else os.environ.update({_SWITCH: before})

    def run(
        self, plugin: str, inputs: Mapping[str, NDArray[Any]], constants: Mapping[str, int | float], activation: DType
    ) -> dict[str, NDArray[Any]]:
        """Return a plugin's outputs.

        Args:
            plugin: A key of PLUGINS.
            inputs: By name, in the schema's types and shapes.
            constants: Compile-time constants that the schema does not fix.
            activation: The type of 16-bit tensors.

        Raises:
            ValueError: If an input's shape is not the schema's.
        """
        return self._pool.submit(_run, plugin, dict(inputs), dict(constants), activation).result()

    def cast_to_e4m3(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Return ``values`` cast by the interpreter, so that a test can compare it with ``ml_dtypes``'s cast."""
        codes: NDArray[Any] = self._pool.submit(_cast, values).result()
        return codes

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start() -> None:
    import ml_dtypes
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    original = interpreter._convert_float

    def convert(value: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        if source == tl.float32 and target == tl.float8e4nv:
            # The hardware's cast saturates; ml_dtypes makes NaN of what is too large.
            codes: NDArray[Any] = np.clip(value, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            return codes
        return np.asarray(original(value, source, target, rounding))

    def dot(_: Any, a: Any, b: Any, d: Any, *_options: object) -> Any:
        # Products of 8-bit integers are exact in fp32 too, up to 1024 of them, and faster.
        product = np.matmul(_as_float32(a, original), _as_float32(b, original)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _as_float32(handle: Any, convert: Any) -> NDArray[np.float32]:
    import triton.language as tl

    data: NDArray[Any] = handle.data
    if handle.dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if handle.dtype == tl.float8e4nv:
        data = convert(data, handle.dtype, tl.float16, None).view(np.float16)
    return data.astype(np.float32)


def _cast(values: NDArray[np.float32]) -> NDArray[Any]:
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter

    codes: NDArray[Any] = interpreter._convert_float(values, tl.float32, tl.float8e4nv, None)
    return codes.view(ml_dtypes.float8_e4m3fn)


def _run(
    plugin: str, inputs: dict[str, NDArray[Any]], constants: dict[str, int | float], activation: DType
) -> dict[str, NDArray[Any]]:
    import torch

    schema = PLUGINS[plugin]
    constants = {**schema.constants, **constants}
    shapes = {name: array.shape for name, array in inputs.items()}
    schema.check_inputs(shapes, constants)
    sizes = schema.sizes(shapes)
    outputs = {}
    for tensor in schema.outputs:
        dtype = getattr(torch, (tensor.dtype or activation).numpy_name)
        shape = schema.output_shapes(sizes, constants)[tensor.name]
        outputs[tensor.name] = torch.full(shape, 113, dtype=torch.float32).to(dtype)  # what is not written shows
    arguments: list[Any] = [_torch(inputs[tensor.name]) for tensor in schema.inputs]
    arguments += [sizes[extra.name] for extra in schema.extras]
    arguments += list(outputs.values())
    kernel = getattr(importlib.import_module(f"reelforge.plugins.kernels.{schema.kernel}"), schema.function)
    kernel[tuple(extent.of(sizes, constants) for extent in schema.grid)](*arguments, **constants)
    return {name: _numpy(tensor) for name, tensor in outputs.items()}


def _torch(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype.kind == "V" or array.dtype.name in ("bfloat16", "float8_e4m3fn"):
        bits = torch.from_numpy(np.ascontiguousarray(array).view(f"int{8 * array.dtype.itemsize}").copy())
        return bits.view(getattr(torch, array.dtype.name))
    return torch.from_numpy(np.ascontiguousarray(array).copy())


def _numpy(tensor: Any) -> NDArray[Any]:
    import ml_dtypes
    import torch

    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float8_e4m3fn, torch.int8)):
        if tensor.dtype == dtype:
            name = str(dtype).removeprefix("torch.")
            return np.asarray(tensor.view(bits).numpy().view(getattr(ml_dtypes, name)))
    return np.asarray(tensor.numpy())
