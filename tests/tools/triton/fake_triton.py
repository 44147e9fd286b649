"""``triton_python_backend_utils`` without a server: models are ONNX Runtime sessions over the exported files.

What is asked of a model is held against its configuration as the server does it: names, types, ranks, fixed sizes, and
that only the outputs asked for come back. A scalar is ``[1]`` outside and of rank 0 inside, as the server's ONNX
Runtime backend has it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format

from tests.tools.triton.triton_schema import data_type, read_repository, schema

Array = np.ndarray[Any, Any]


class Code(enum.Enum):
    INTERNAL = 1
    INVALID_ARG = 2
    UNAVAILABLE = 3
    CANCELLED = 4


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = Code

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class Tensor:
    def __init__(self, name: str, array: Array) -> None:
        assert array.ndim >= 1, "the server has no tensors of rank 0"
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class Response:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.output_tensors = list(output_tensors)
        self.failure = error

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> TritonError | None:
        return self.failure

    def get(self, name: str) -> Array:
        return next(tensor.as_numpy() for tensor in self.output_tensors if tensor.name() == name)


@dataclass
class ClientRequest:
    """What a client of the pipeline's model sends."""

    tensors: dict[str, Array]
    outputs: tuple[str, ...] = ("pixels",)
    timeout_us: int = 0
    cancel_after: int | None = None
    asked: int = 0

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)

    def timeout(self) -> int:
        return self.timeout_us

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.cancel_after is not None and self.asked > self.cancel_after


class FakeServer:
    """The models of a repository, and the module that the Python backend would give."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.configs = read_repository(root)
        self.calls: list[str] = []
        self.fail: Callable[[str], Any] = lambda model: None
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.module = ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest:
            def __init__(
                self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: object
            ) -> None:
                self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

            def exec(self) -> Response:
                return server.infer(self.model, self.wanted, {t.name(): t.as_numpy() for t in self.inputs})

        values = {
            "InferenceRequest": InferenceRequest,
            "InferenceResponse": Response,
            "PreferredMemory": lambda kind, number: (kind, number),
            "TRITONSERVER_MEMORY_CPU": "cpu",
            "Tensor": Tensor,
            "TritonError": TritonError,
            "get_input_tensor_by_name": lambda request, name: (
                Tensor(name, request.tensors[name]) if name in request.tensors else None
            ),
            "get_output_tensor_by_name": lambda response, name: next(
                (tensor for tensor in response.output_tensors if tensor.name() == name), None
            ),
        }
        for name, value in values.items():
            setattr(self.module, name, value)

    def arguments(self, model: str) -> dict[str, str]:
        """Return what ``initialize`` is told."""
        config = json_format.MessageToDict(self.configs[model], preserving_proto_field_name=True)
        return {
            "model_config": json.dumps(config),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(self.root / model),
            "model_version": "1",
            "model_name": model,
        }

    def infer(self, model: str, wanted: list[str], inputs: dict[str, Array]) -> Response:
        self.calls.append(model)
        if error := self.fail(model):
            return Response(error=error)
        config = self.configs[model]
        assert config.platform == "onnxruntime_onnx"
        assert inputs.keys() == {tensor.name for tensor in config.input}
        for tensor in config.input:
            _check(tensor, inputs[tensor.name])
        session = self._session(config)
        scalars = {node.name for node in session.get_inputs() if not node.shape}
        given = {name: array.reshape(()) if name in scalars else array for name, array in inputs.items()}
        results = session.run(wanted, given)
        stated = {tensor.name: tensor for tensor in config.output}
        answers = [np.asarray(array).reshape(np.shape(array) or (1,)) for array in results]
        for name, array in zip(wanted, answers, strict=True):
            _check(stated[name], array)
            array.setflags(write=False)
        return Response([Tensor(name, array) for name, array in zip(wanted, answers, strict=True)])

    def _session(self, config: Any) -> onnxruntime.InferenceSession:
        if config.name not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            assert config.instance_group[0].kind == schema().ModelInstanceGroup.KIND_CPU
            path = self.root / config.name / "1" / config.default_model_filename
            self._sessions[config.name] = onnxruntime.InferenceSession(path, options)
        return self._sessions[config.name]


def _check(tensor: Any, array: Array) -> None:
    assert array.dtype == data_type(tensor), tensor.name
    assert array.ndim == len(tensor.dims), tensor.name
    assert all(want in (-1, size) for want, size in zip(tensor.dims, array.shape, strict=True)), tensor.name
