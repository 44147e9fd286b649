"""The pipeline's model: prompts in, videos out, by Triton's Python backend.

``TritonPythonModel`` is what Triton calls. The chain of stages, the sampling loop and the decoding are the runtime's
:class:`Pipeline`; its engines are other models of the server where the repository has them. The module knows Triton's
requests and responses, and no arithmetic.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from reelforge.runtime.budget import parse_budget
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Engine, EngineOptions
from reelforge.runtime.errors import CancelledError, OutOfMemoryError, ReelforgeError, RequestError
from reelforge.runtime.events import Frames, Notice, Pixels
from reelforge.runtime.pipeline import MEMO_BYTES, Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.runtime.video import VideoWriter
from reelforge.tools.triton.carried_bundle import open_carried
from reelforge.tools.triton.engine import TritonEngine
from reelforge.tools.triton.model_config import NOTICES, PIXELS, REQUEST_TENSORS, VIDEO

_TEXTS = ("prompt", "negative_prompt", "step_cache")


class ModelsPipeline(Pipeline):
    """A pipeline, some stages of which are other models.

    Args:
        bundle: Manifest and tokenizers, and the files of the stages that are none.
        engines: Stage -> the model that runs it.
        options: Of the stages that run here.
        memory_budget: Likewise.
    """

    def __init__(
        self, bundle: Bundle, engines: Mapping[str, Engine], options: EngineOptions, memory_budget: int | str | None
    ) -> None:
        super().__init__(bundle, options, memory_budget, MEMO_BYTES)
        self._models = dict(engines)

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Lend a stage's engine (see :meth:`Pipeline.engine`)."""
        if stage in self._models:
            yield self._models[stage]
            return
        with super().engine(stage) as engine:
            yield engine


class TritonPythonModel:
    """The model, as Triton's Python backend knows it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the pipeline.

        Raises:
            BundleError: If a file of the model's folder is missing or altered.
        """
        self._utilities: ModuleType = importlib.import_module("triton_python_backend_utils")
        values = json.loads(args["model_config"]).get("parameters", {})
        settings = {key: value["string_value"] for key, value in values.items()}
        models: dict[str, str] = json.loads(settings["models"])
        inside = [stage for stage in settings.get("inside", "").split(",") if stage]
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        bundle = open_carried(folder, inside)
        engines = {stage: TritonEngine(self._utilities, model, bundle.stage(stage)) for stage, model in models.items()}
        device = int(args["model_instance_device_id"]) if args.get("model_instance_kind") == "GPU" else 0
        budget = parse_budget(settings["memory_budget"]) if "memory_budget" in settings else None
        self._pipeline = ModelsPipeline(bundle, engines, EngineOptions(device=device), budget)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Make the video of each request; what is wrong with one is its own response and not another's."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Close the pipeline."""
        self._pipeline.close()

    def _answer(self, request: Any) -> Any:
        try:
            tensors = self._made(request)
        except (ReelforgeError, MemoryError) as error:
            return self._utilities.InferenceResponse(error=self._error(error))
        return self._utilities.InferenceResponse(
            output_tensors=[self._utilities.Tensor(name, array) for name, array in tensors.items()]
        )

    def _made(self, request: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Make a video, and return those of the outputs that are wanted."""
        wanted = set(request.requested_output_names())
        asked = self._request(request)
        resolved = self._pipeline.resolve(asked)
        allowed_us = request.timeout()
        stop = Stop(allowed_us / 1e6 if allowed_us else None)
        shape, rate = resolved.shape, self._pipeline.spec.defaults.frames_per_second
        pixels: list[Pixels] = []
        notices: list[str] = []
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="reelforge-") as folder:
            path = Path(folder) / "video.mp4"
            video = VideoWriter(path, shape.height, shape.width, shape.frames, rate) if VIDEO in wanted else None
            with nullcontext() if video is None else video:
                for event in self._pipeline.stream(asked, stop=stop):
                    if request.is_cancelled():
                        stop.set("the client cancelled it")
                    if isinstance(event, Notice):
                        notices.append(event.text)
                    elif isinstance(event, Frames):
                        some = event.pixels
                        if video is not None:
                            video.write(some)
                        if PIXELS in wanted:
                            pixels.append(some)
            if video is not None:
                tensors[VIDEO] = np.array([path.read_bytes()], dtype=np.object_)
        if PIXELS in wanted:
            tensors[PIXELS] = np.concatenate(pixels)
        if NOTICES in wanted:
            tensors[NOTICES] = np.array([text.encode() for text in notices], dtype=np.object_)
        return tensors

    def _request(self, request: Any) -> Request:
        values: dict[str, Any] = {}
        for name in REQUEST_TENSORS:
            tensor = self._utilities.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values[name] = _single(name, tensor.as_numpy())
        if "step_cache" in values:
            values["step_cache"] = StepCache.parse(values["step_cache"], files=False) if values["step_cache"] else None
        return Request(**values)

    def _error(self, error: Exception) -> Any:
        known = self._utilities.TritonError
        if isinstance(error, RequestError):
            return known(str(error), known.INVALID_ARG)
        if isinstance(error, CancelledError):
            return known(str(error), known.CANCELLED)
        if isinstance(error, OutOfMemoryError | MemoryError):
            return known(str(error) or "out of memory", known.UNAVAILABLE)
        return known(str(error), known.INTERNAL)


def _single(name: str, array: np.ndarray[Any, Any]) -> str | int | float:
    """Return the one value of a request's tensor.

    Raises:
        RequestError: If there is not exactly one, or a text is not UTF-8.
    """
    if array.size != 1:
        raise RequestError(
            f"the input {name!r} does not hold one value.", received=f"{list(array.shape)}", expected="[1]"
        )
    value = array.reshape(-1)[0]
    if name not in _TEXTS:
        number: int | float = value.item()
        if isinstance(number, float) and not math.isfinite(number):
            raise RequestError(f"the input {name!r} is not a finite number.", received=number)
        return number
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the input {name!r} is not UTF-8.", received=str(error), fix="encode the text as UTF-8"
        ) from error
