"""A stage as a model of the same server: an :class:`reelforge.runtime.engines.engine.Engine` that asks Triton.

Inputs and outputs of a call are on the host; where the model computes is Triton's matter. The module knows one call and
not the chain of stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import numpy as np

from reelforge.runtime.engines.engine import Array, check_inputs, output_targets
from reelforge.runtime.errors import EngineError, OutOfMemoryError
from reelforge.runtime.manifest import StageEntry, TensorInfo

_OUT_OF_MEMORY = ("out of memory", "bad_alloc", "failed to allocate", "unable to allocate", "no space left")


class TritonEngine:
    """A stage that another model of the server runs.

    Args:
        utilities: ``triton_python_backend_utils``, which only exists inside of Triton.
        model: The model's name.
        entry: The stage.
    """

    def __init__(self, utilities: ModuleType, model: str, entry: StageEntry) -> None:
        self.name = entry.name
        self.inputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.inputs}
        self.outputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.outputs}
        self._utilities = utilities
        self._model = model

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs (see :class:`reelforge.runtime.engines.engine.Engine`).

        Raises:
            OutOfMemoryError: If Triton says that there was too little memory.
            EngineError: If a tensor does not fit the stage, or the model fails.
        """
        sizes = check_inputs(self.name, self.inputs, inputs)
        targets = output_targets(self.name, self.outputs, sizes, inputs, outputs)
        # A tensor of rank 0 travels as [1], as the model's configuration states it.
        sent = [
            self._utilities.Tensor(name, np.ascontiguousarray(array).reshape(array.shape or (1,)))
            for name, array in inputs.items()
        ]
        request = self._utilities.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(targets),
            inputs=sent,
            preferred_memory=self._utilities.PreferredMemory(self._utilities.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise self._failed(response.error().message(), inputs)
        return {name: self._received(response, name, target) for name, target in targets.items()}

    def close(self) -> None:
        """Nothing to give back: the model is the server's."""

    def _received(self, response: object, name: str, target: Array | None) -> Array:
        tensor = self._utilities.get_output_tensor_by_name(response, name)
        if tensor is None:
            raise EngineError(f"model {self._model!r} left out the output {name!r}.", fix="write the repository again")
        values: Array = tensor.as_numpy()
        rank = len(self.outputs[name].shape)
        values = values.reshape(values.shape if rank else ())
        if target is None:
            return np.array(values)  # Triton's memory ends with the response
        if values.shape != target.shape or values.dtype != target.dtype:
            raise EngineError(
                f"model {self._model!r} gave the output {name!r} another type or shape.",
                received=f"{values.dtype} {list(values.shape)}",
                expected=f"{target.dtype} {list(target.shape)}",
                fix="write the repository again with reelforge export-triton",
            )
        target[...] = values
        return target

    def _failed(self, message: str, inputs: Mapping[str, Array]) -> EngineError:
        kind = OutOfMemoryError if any(words in message.lower() for words in _OUT_OF_MEMORY) else EngineError
        return kind(
            f"stage {self.name!r} failed in Triton's model {self._model!r}.",
            received=", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items()),
            fix=message.strip().splitlines()[0][:500] if message.strip() else "see Triton's log",
        )
