"""Registers in the memory of a GPU (see ``runtime.registers``).

Each call is waited for, so that errors belong to it. Values that the host writes are uploaded when a call first reads
them. Memory is freed when the registers are closed, not before: a step after the first allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reelforge.runtime.cuda.memory import DeviceBuffer, aligned
from reelforge.runtime.engines.device_session import DeviceSession, contiguous
from reelforge.runtime.engines.engine import Array, Engine, check_inputs, dtype_of
from reelforge.runtime.engines.tensorrt_library import ITEM_BYTES
from reelforge.runtime.engines.tensorrt_plan import Shape
from reelforge.runtime.errors import EngineError
from reelforge.runtime.registers import empty_register

if TYPE_CHECKING:
    from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine


@dataclass(eq=False)
class _Value:
    """What a register holds: an array of the host, a place on the device, or both."""

    shape: Shape
    dtype: str
    array: Array | None = None
    buffer: DeviceBuffer | None = None

    def outline(self) -> Array:
        """Return an array of this shape and type without memory, to check."""
        return np.ndarray(self.shape, dtype_of(self.dtype), bytes(16), 0, (0,) * len(self.shape))


class DeviceRegisters:
    """Registers of one session. Make them with :meth:`TensorRtEngine.registers`."""

    def __init__(self, session: DeviceSession) -> None:
        self._session = session
        self._values: dict[str, _Value] = {}
        self._buffers: list[DeviceBuffer] = []
        self._closed = False
        self.arena_bytes = 0  # values have memory of their own
        session.attach(self)

    def write(self, name: str, array: Array) -> None:
        """See :class:`reelforge.runtime.registers.Registers`."""
        array = contiguous(array)
        self._values[name] = _Value(array.shape, array.dtype.name, array)

    def read(self, name: str) -> Array:
        """See :class:`reelforge.runtime.registers.Registers`."""
        value = self._value(name)
        if value.array is None:
            assert value.buffer is not None
            array = np.empty(value.shape, dtype_of(value.dtype))
            with self._session.work():
                self._session.download(array, value.buffer.address)
            value.array = array
        return value.array

    def let(self, name: str, source: str) -> None:
        """See :class:`reelforge.runtime.registers.Registers`."""
        self._values[name] = self._value(source)

    def drop(self, name: str) -> None:
        """See :class:`reelforge.runtime.registers.Registers`."""
        self._values.pop(name, None)

    def call(self, engine: Engine, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """See :class:`reelforge.runtime.registers.Registers`."""
        values = {tensor: self._value(register) for tensor, register in inputs.items()}
        gpu = self._require_own(engine)
        gpu.require_free()
        check_inputs(gpu.name, gpu.inputs, {tensor: value.outline() for tensor, value in values.items()})
        if unknown := sorted(set(outputs) - set(gpu.outputs)):
            raise EngineError(
                f"stage {gpu.name!r} has no such output.", received=unknown, expected=", ".join(gpu.outputs)
            )
        waiting = [value for value in dict.fromkeys(values.values()) if value.buffer is None]
        try:
            results = self._run(gpu, values, waiting, outputs)
        except BaseException:
            for value in waiting:
                value.buffer = None  # nobody knows whether it was uploaded
            raise
        gpu.keep_kernels()
        self._values.update({register: results[tensor] for tensor, register in outputs.items()})

    def close(self) -> None:
        """See :class:`reelforge.runtime.registers.Registers`."""
        if self._closed:
            return
        self._closed = True
        self._session.cuda.activate_to_close()
        self._values.clear()
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self._session.detach(self)

    def _run(
        self, engine: TensorRtEngine, values: Mapping[str, _Value], waiting: list[_Value], outputs: Mapping[str, str]
    ) -> dict[str, _Value]:
        """Upload what waits for it, and run the engine; returns its outputs, which no register holds yet."""
        with self._session.work():
            taken: list[DeviceBuffer] = []
            for value in waiting:
                value.buffer = self._take(value, taken)
            shapes = engine.prepare({tensor: value.shape for tensor, value in values.items()})
            results = {tensor: _Value(shapes[tensor], engine.outputs[tensor].dtype) for tensor in outputs}
            for value in results.values():
                value.buffer = self._take(value, taken)
            engine.bind(shapes, {tensor: _address(value) for tensor, value in {**values, **results}.items()})
            for value in waiting:
                assert value.array is not None
                self._session.upload(_address(value), value.array)
            engine.enqueue()
        return results

    def _value(self, name: str) -> _Value:
        if self._closed:
            raise EngineError("registers were used after they were closed.")
        try:
            return self._values[name]
        except KeyError:
            raise empty_register(name) from None

    def _take(self, value: _Value, taken: list[DeviceBuffer]) -> DeviceBuffer:
        """Return a buffer for a value: one of its size that no register holds, or a new one."""
        size_bytes = aligned(math.prod(value.shape) * ITEM_BYTES[value.dtype])
        held = [other.buffer for other in self._values.values()] + taken
        for buffer in self._buffers:
            if buffer.size_bytes == size_bytes and not any(buffer is other for other in held):
                break
        else:
            buffer = DeviceBuffer(self._session.cuda, size_bytes, "a register of the sampling loop")
            self._buffers.append(buffer)
        taken.append(buffer)
        return buffer

    def _require_own(self, engine: Engine) -> TensorRtEngine:
        from reelforge.runtime.engines.tensorrt_engine import TensorRtEngine  # which makes these registers

        if not isinstance(engine, TensorRtEngine) or engine.session is not self._session:
            raise EngineError(
                f"stage {engine.name!r} does not compute where these registers are.",
                received=type(engine).__name__,
                expected="an engine of the same GPU",
            )
        return engine


def _address(value: _Value) -> int:
    assert value.buffer is not None
    return value.buffer.address
