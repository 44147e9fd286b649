"""The compiler's Python module, and the objects through which it calls us back.

TensorRT (``tensorrt``) and TensorRT-RTX (``tensorrt_rtx``) have one interface, so everything here takes the module as a
value. Neither carries types: this module and ``builder`` are the border at which ``Any`` ends. The module knows no
graph and no recipe.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Backend

Module = Any
"""``tensorrt`` or ``tensorrt_rtx``."""

_NAMES = {Backend.RTX: ("tensorrt_rtx", "rtx"), Backend.TRT: ("tensorrt", "tensorrt")}
_NEEDED = ("IStreamWriter", "OnnxParser", "Builder")


@dataclass(frozen=True)
class Message:
    """One line of the compiler's log.

    Attributes:
        severity: ``VERBOSE``, ``INFO``, ``WARNING``, ``ERROR`` or ``INTERNAL_ERROR``.
        text: As the compiler wrote it; layer information is one message of many lines.
    """

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the compiler calls it an error."""
        return self.severity in ("ERROR", "INTERNAL_ERROR")


def load_module(backend: Backend) -> Module:
    """Import the compiler of ``backend``.

    Raises:
        BuildError: If the backend compiles no plans, or its package is not installed, or too old.
    """
    if backend not in _NAMES:
        raise BuildError(
            f"the backend {backend.value!r} compiles no plans.",
            received=backend.value,
            expected=" or ".join(member.value for member in _NAMES),
        )
    name, extra = _NAMES[backend]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library beside it is missing
        raise BuildError(
            f"{name} cannot be imported, and plans for {backend.value!r} are compiled with it.",
            received=str(error),
            expected=f"the package {name.replace('_', '-')}",
            fix=f"pip install reelforge[export,{extra}]",
        ) from error
    missing = [needed for needed in _NEEDED if not hasattr(module, needed)]
    if missing:
        raise BuildError(
            f"this version of {name} is too old.",
            received=f"{backend_name(module)} without {', '.join(missing)}",
            expected="TensorRT-RTX 1.7, or TensorRT 10.13, or newer",
            fix=f"pip install --upgrade reelforge[export,{extra}]",
        )
    return module


def backend_name(module: Module) -> str:
    """Return library and version as receipts and manifests write them: ``tensorrt_rtx 1.7.1.116``."""
    return f"{module.__name__} {module.__version__}"


def make_logger(module: Module, receive: Callable[[Message], None]) -> Any:
    """Return a logger that passes on every message, verbose ones included."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, text: str) -> None:
            receive(Message(str(severity).rpartition(".")[2], text))

    return Logger()


def make_writer(module: Module, write: Callable[[memoryview], None]) -> Any:
    """Return a stream writer over ``write``, which must not raise: the compiler logs exceptions and carries on."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def write(self, data: bytes) -> int:
            write(memoryview(data))
            return len(data)

    return Writer()


def make_monitor(module: Module, on_step: Callable[[str, int, int], None]) -> Any:
    """Return a progress monitor that passes on phase, steps done and steps in all."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            del parent
            self.steps[phase] = steps
            on_step(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            on_step(phase, step + 1, self.steps.get(phase, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
