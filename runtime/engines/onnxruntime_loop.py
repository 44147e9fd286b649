"""The sampling loop on ONNX Runtime: arrays are checked and bound before the first step.

Between two steps the engine has emptied the processor's caches, and whatever Python does there is slow: what can be
done once is. On the CPU every step has a binding of its own. A GPU's binding copies a host's array when it is bound and
not when it runs, so a step binds its rows when its turn comes, and what it writes and the next one reads has to be the
GPU's own. The module does not know what the stage computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from reelforge.runtime.engines.engine import Array, check_inputs, output_targets

if TYPE_CHECKING:
    from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine


class OnnxRuntimeLoop:
    """A loop that has begun (a :class:`reelforge.runtime.sampling.StepLoop`). Make one with ``OnnxRuntimeEngine.loop``.

    Attributes:
        skipped: None ever are.
    """

    def __init__(
        self, engine: OnnxRuntimeEngine, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]
    ) -> None:
        self.skipped = 0
        self._engine = engine
        self._buffers = [latents.copy(), np.empty(latents.shape, latents.dtype)]
        # Bindings borrow memory, so all arrays are kept; a row of a contiguous array is contiguous.
        self._fixed = {name: np.ascontiguousarray(array) for name, array in fixed.items()}
        self._per_step = {name: array if array.flags.c_contiguous else array.copy() for name, array in per_step.items()}
        first = {"latents": self._buffers[0], **self._fixed, **self._row(0)}
        sizes = check_inputs(engine.name, engine.inputs, first)
        output_targets(engine.name, engine.outputs, sizes, first, {"next_latents": self._buffers[1]})
        self._shapes = {name: array.shape for name, array in first.items()}
        self._fixed_values = {name: engine.resident(array) for name, array in self._fixed.items()}
        self._values = [engine.resident(buffer) for buffer in self._buffers]
        self._bindings = [self._bound(source) for source in (0, 1)]
        steps = len(next(iter(self._per_step.values()))) if self._per_step else 0
        self._rows = [{name: engine.value(row) for name, row in self._row(step).items()} for step in range(steps)]
        # Of a loop that begins with the first step, which reads the first buffer.
        self._ready = [self._bound(step % 2, row) for step, row in enumerate(self._rows)] if engine.on_host else []
        self._written = 0

    def advance(self, step: int) -> None:
        """Run one step.

        Raises:
            EngineError: If ONNX Runtime fails.
        """
        source = self._written
        if self._ready and source == step % 2:
            binding = self._ready[step]
        else:
            binding = self._bindings[source]
            for name, value in self._rows[step].items() if self._rows else ():
                binding.bind_ortvalue_input(name, value)
        self._engine.launch(binding, self._shapes, keep_arena=True)
        self._written = 1 - source

    def latents(self) -> Array:
        """Return what was written last: the buffer itself on the CPU, a copy of a GPU's."""
        if not self._engine.on_host:
            self._buffers[self._written] = self._values[self._written].numpy()
        return self._buffers[self._written]

    def close(self) -> None:
        """Give the memory of the steps back, and let go of the bindings."""
        if self._bindings:
            self._engine.return_arena(self._bindings[self._written])
        self._bindings.clear()
        self._ready.clear()
        self._rows.clear()

    def _bound(self, source: int, row: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Return a binding that reads one of the two buffers, what all steps share and a step's row."""
        binding = self._engine.binding()
        for name, value in (*self._fixed_values.items(), *row.items(), ("latents", self._values[source])):
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("next_latents", self._values[1 - source])
        return binding

    def _row(self, step: int) -> dict[str, Array]:
        return {name: rows[step, ...] for name, rows in self._per_step.items()}  # the dots keep a scalar an array
