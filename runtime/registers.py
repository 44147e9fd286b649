"""Registers: named tensors that stay where the engines compute, so that what wraps a step is written once.

A register is a name for values, as a variable is in Python: :meth:`Registers.let` gives values a second name and copies
nothing, and a call never overwrites values that have a name. Arrays that no name refers to any more are used again.
``HostRegisters`` keeps NumPy arrays; those of a GPU are in ``engines.device_registers``. The module knows engines; it
does not know what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import EngineError


class Registers(Protocol):
    """Named tensors. One thread at a time may use them."""

    def write(self, name: str, array: Array) -> None:
        """Let a register hold the values of an array, which must not change while any register does."""
        ...

    def read(self, name: str) -> Array:
        """Return a register's values as an array, not to be changed; reused once no register holds it.

        Raises:
            EngineError: If the register holds nothing, or the values cannot be brought to the host.
        """
        ...

    def let(self, name: str, source: str) -> None:
        """Let ``name`` hold what ``source`` holds; both keep it whatever the other is given later."""
        ...

    def drop(self, name: str) -> None:
        """Forget a register; its memory is used again. A name that holds nothing is no error."""
        ...

    def call(self, engine: Engine, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Run an engine on registers, to its end.

        Args:
            engine: Of the backend that the registers belong to.
            inputs: Every input tensor of the engine -> register that holds it.
            outputs: Output tensor -> register that will hold it; others are not kept. A register may be among the
                inputs too: it is given its new values when the call has succeeded.

        Raises:
            EngineError: If a register holds nothing or does not fit the stage, or the engine fails. All registers
                are then as before.
        """
        ...

    def close(self) -> None:
        """Give back all memory. Closing twice is harmless."""
        ...


@runtime_checkable
class RegisteringEngine(Protocol):
    """An engine whose tensors need not be on the host."""

    def registers(self) -> Registers:
        """Return new registers in the memory in which this engine, and all others of its device, compute."""
        ...


def registers_for(engine: Engine) -> Registers:
    """Return new registers where ``engine`` computes."""
    return engine.registers() if isinstance(engine, RegisteringEngine) else HostRegisters()


class HostRegisters:
    """Registers in NumPy arrays: engines read and write them in place."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        self._own: dict[int, Array] = {}  # made by engines, by id: those may be written again
        self._shapes: dict[tuple[object, ...], tuple[tuple[int, ...], str]] = {}

    def write(self, name: str, array: Array) -> None:
        """See :class:`Registers`; the array is borrowed, not copied."""
        self._arrays[name] = array

    def read(self, name: str) -> Array:
        """See :class:`Registers`."""
        try:
            return self._arrays[name]
        except KeyError:
            raise empty_register(name) from None

    def let(self, name: str, source: str) -> None:
        """See :class:`Registers`."""
        self._arrays[name] = self.read(source)

    def drop(self, name: str) -> None:
        """See :class:`Registers`."""
        self._arrays.pop(name, None)

    def call(self, engine: Engine, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """See :class:`Registers`."""
        arrays = {tensor: self.read(register) for tensor, register in inputs.items()}
        targets: dict[str, Array | None] = {}
        if outputs:
            case = (engine.name, *(array.shape for array in arrays.values()))
            free = self._free()
            for tensor in outputs:
                targets[tensor] = self._take(free, self._shapes.get((tensor, *case)))
        results = engine.run(arrays, targets)
        for tensor, register in outputs.items():
            result = results[tensor]
            self._own[id(result)] = result
            self._shapes[(tensor, *case)] = (result.shape, result.dtype.str)
            self._arrays[register] = result

    def close(self) -> None:
        """See :class:`Registers`."""
        self._arrays.clear()
        self._own.clear()

    def _free(self) -> list[Array]:
        held = {id(array) for array in self._arrays.values()}
        return [array for key, array in self._own.items() if key not in held]

    @staticmethod
    def _take(free: list[Array], wanted: tuple[tuple[int, ...], str] | None) -> Array | None:
        """Return an array that nothing holds and take it off the list; None lets the engine make one."""
        for index, array in enumerate(free):
            if (array.shape, array.dtype.str) == wanted:
                return free.pop(index)
        return None


def empty_register(name: str) -> EngineError:
    """Return the error for a register that was read before anything was written into it."""
    return EngineError(f"the register {name!r} was read before it was written.")
