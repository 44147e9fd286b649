"""Stages on ONNX Runtime, on the CPU or on a GPU.

Inputs and outputs are bound where they are (``OrtValue`` over numpy memory), so a call copies nothing. onnxruntime is
imported when the first engine is loaded. The module does not know which stage it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from reelforge.runtime.engines.engine import (
    Array,
    EngineOptions,
    check_inputs,
    output_targets,
    thread_count,
)
from reelforge.runtime.engines.narrow_weights import SETTINGS, runs_once, widens_in_the_run
from reelforge.runtime.engines.onnxruntime_library import import_onnxruntime, product_settings
from reelforge.runtime.engines.onnxruntime_loop import OnnxRuntimeLoop
from reelforge.runtime.engines.onnxruntime_providers import CPU, Device, Provider, require_active, require_available
from reelforge.runtime.errors import EngineError, OutOfMemoryError
from reelforge.runtime.host_memory import return_freed
from reelforge.runtime.manifest import StageEntry, TensorInfo

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
}
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate memory", "out of memory", "available memory of")
_SILENT = 4  # only fatal errors: everything else arrives as an exception, whose text the user gets once


class OnnxRuntimeEngine:
    """One stage. Make one with :func:`engine_from_onnx` or :func:`engine_from_bytes`."""

    def __init__(
        self,
        name: str,
        session: Any,
        runtime: ModuleType,
        entry: StageEntry,
        arena: bool = False,
        device: Device | None = None,
    ) -> None:
        self.name = name
        self._device = device
        self.inputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.inputs}
        self.outputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.outputs}
        self._session: Any | None = session
        self._runtime = runtime
        self._arena = arena
        self._keeping = _run_options(runtime)
        self._returning = _run_options(runtime)
        if arena:  # a stage that waits holds its weights and no activations
            self._returning.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs (see :class:`reelforge.runtime.engines.engine.Engine`)."""
        sizes = check_inputs(self.name, self.inputs, inputs)
        targets = output_targets(self.name, self.outputs, sizes, inputs, outputs)
        binding = self.binding()
        # The binding borrows the memory, so the arrays (among them copies of strided inputs) must outlive the call.
        borrowed = {name: array if array.flags.c_contiguous else array.copy() for name, array in inputs.items()}
        for name, array in borrowed.items():
            binding.bind_ortvalue_input(name, self.value(array))
        for name, target in targets.items():
            if target is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_ortvalue_output(name, self.value(target))
        self.launch(binding, {name: array.shape for name, array in inputs.items()})
        return self._results(binding, targets)

    def _results(self, binding: Any, targets: Mapping[str, Array | None]) -> dict[str, Array]:
        """Return a run's outputs; those without a target are where ONNX Runtime put them.

        With an arena that is in one of its blocks, which stays as long as they do: 13 MB of frames kept 412. So they
        are copied, and the block is given back.
        """
        values = dict(zip(targets, binding.get_outputs(), strict=True))
        placed = {name: target for name, target in targets.items() if target is not None}
        results = {name: placed[name] if name in placed else values[name].numpy() for name in targets}
        if self._arena and len(placed) < len(results):
            results = {name: array if name in placed else array.copy() for name, array in results.items()}
            del values
            binding.clear_binding_outputs()
            for name in results:  # a run without outputs is refused before it begins
                binding.bind_output(name, "cpu")
            self.return_arena(binding)
        return results

    def loop(self, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> OnnxRuntimeLoop:
        """Begin a sampling loop whose arrays are checked and bound once (see ``reelforge.runtime.sampling``).

        Raises:
            EngineError: If a tensor does not fit the stage.
        """
        return OnnxRuntimeLoop(self, latents, fixed, per_step)

    def binding(self) -> Any:
        """Return a new binding of arrays to the stage's tensors.

        Raises:
            EngineError: If the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"stage {self.name!r} was run after its engine was closed.")
        return self._session.io_binding()

    def value(self, array: Array) -> Any:
        """Return an array as a binding takes it: the memory is borrowed, and must outlive the binding's last run."""
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    @property
    def on_host(self) -> bool:
        """Whether the engine computes in the host's memory."""
        return self._device is None

    def resident(self, array: Array) -> Any:
        """Return an array where the engine computes: as :meth:`value` on the CPU, else a copy in the GPU's memory."""
        if self._device is None:
            return self.value(array)
        return self._runtime.OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.index)

    def launch(self, binding: Any, shapes: Mapping[str, tuple[int, ...]], keep_arena: bool = False) -> None:
        """Run on what is bound.

        Args:
            binding: From :meth:`binding`, with all inputs and the wanted outputs.
            shapes: Of the inputs, for the message.
            keep_arena: Whether the blocks of the arena stay for the next run, until :meth:`return_arena`.

        Raises:
            OutOfMemoryError: If there is too little memory.
            EngineError: If ONNX Runtime fails, or the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"stage {self.name!r} was run after its engine was closed.")
        try:
            self._session.run_with_iobinding(binding, self._keeping if keep_arena else self._returning)
        except _exceptions(self._runtime) as error:
            received = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            if _is_about_memory(error):
                raise OutOfMemoryError(
                    f"stage {self.name!r} ran out of memory in ONNX Runtime.", received=received, fix=_first_line(error)
                ) from error
            raise EngineError(
                f"stage {self.name!r} failed in ONNX Runtime.", received=received, fix=_first_line(error)
            ) from error

    def return_arena(self, binding: Any) -> None:
        """Give the blocks of the arena back to the system after runs by :meth:`launch` that kept them.

        ONNX Runtime does so only at the end of a run, so one is begun that ends before its first operator.

        Args:
            binding: What was bound for those runs.
        """
        if not self._arena or self._session is None:
            return
        self._returning.terminate = True
        try:
            self._session.run_with_iobinding(binding, self._returning)
        except _exceptions(self._runtime) as error:
            if "terminate flag" not in str(error):
                raise EngineError(
                    f"stage {self.name!r} could not give memory back in ONNX Runtime.", received=_first_line(error)
                ) from error
        finally:
            self._returning.terminate = False

    def close(self) -> None:
        """Release the session and its weights."""
        if self._session is not None:
            self._session = None
            return_freed()


def engine_from_onnx(
    path: Path, entry: StageEntry, options: EngineOptions | None = None, provider: Provider = CPU
) -> OnnxRuntimeEngine:
    """Load the stage ``entry`` from its graph.

    Args:
        path: The ONNX file; the weights that it refers to lie below its folder.
        entry: The stage's tensors as the manifest states them; the graph must have the same.
        options: Threads, spinning, optimisation and arena.
        provider: What computes.

    Raises:
        OutOfMemoryError: If there is too little memory.
        EngineError: If onnxruntime or the provider is not there, refuses the graph, or its tensors are not the
            entry's.
    """
    settings: Mapping[str, str] = product_settings() if provider is CPU else {}
    options = options or EngineOptions()
    if provider is CPU and widens_in_the_run(entry, options.widening):
        settings = {**settings, **SETTINGS}
        if runs_once(entry):
            # An arena would keep the block of the largest copy. Without one, copies come and go on malloc's heap, which
            # steps of a large `dit` leave full of holes: 1474 MB instead of 288 with 0.3 billion parameters.
            options = replace(options, arena=False)
    return _load(str(path), f"the graph {path.name!r} of stage {entry.name!r}", entry, settings, options, provider)


def engine_from_bytes(
    graph: bytes, folder: Path, entry: StageEntry, options: EngineOptions | None = None
) -> OnnxRuntimeEngine:
    """Load a graph that is in memory and refers to weights in files.

    Args:
        graph: A serialised ONNX model.
        folder: What its weights' locations are relative to.
        entry: The graph's tensors; its other fields are not looked at.
        options: Threads, spinning, optimisation and arena.

    Raises:
        EngineError: As :func:`engine_from_onnx`.
    """
    settings = {"session.model_external_initializers_file_folder_path": str(folder)}
    return _load(graph, f"a graph made from stage {entry.name!r}", entry, settings, options, CPU)


def _load(
    source: str | bytes,
    what: str,
    entry: StageEntry,
    session_settings: Mapping[str, str],
    options: EngineOptions | None,
    provider: Provider,
) -> OnnxRuntimeEngine:
    options = options or EngineOptions()
    if options.graph_optimization not in _LEVELS:
        raise EngineError(
            "the graph optimisation level is not known.",
            received=options.graph_optimization,
            expected=" or ".join(_LEVELS),
        )
    runtime = _onnxruntime_for(provider)
    providers = require_available(provider, runtime)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = thread_count(options)
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[options.graph_optimization])
    settings.log_severity_level = _SILENT
    # Blocks that are larger than malloc keeps are new pages in each step without the arena: a step of 2000 tokens in
    # INT8 takes 2.96 s without it, 2.60 s with one that is given back after each run, 2.36 s with one that is kept
    # (medians of 6 rounds, with one round the other way round).
    arena = options.arena and provider is CPU
    settings.enable_cpu_mem_arena = arena
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    # Each session has threads of its own. Without this, those of the stages before go on spinning for many steps, on
    # the cores that this stage's threads need: a video of the demonstration model took 253 ms instead of 111.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in session_settings.items():
        settings.add_session_config_entry(key, value)
    try:
        session = runtime.InferenceSession(source, settings, providers=providers)
    except _exceptions(runtime) as error:
        if _is_about_memory(error):
            raise OutOfMemoryError(
                f"there is too little memory to load {what}.",
                received=_first_line(error),
                fix="end other programs, or build with a lower precision",
            ) from error
        raise EngineError(
            f"ONNX Runtime refuses {what}.",
            received=_first_line(error),
            expected=f"a graph that onnxruntime {runtime.__version__} can load",
            fix="rebuild the bundle with build-engine, or install the onnxruntime that its manifest names",
        ) from error
    require_active(provider, session)
    _check_signature(entry, session)
    return OnnxRuntimeEngine(entry.name, session, runtime, entry, arena, provider.device)


def _onnxruntime_for(provider: Provider) -> ModuleType:
    try:
        return import_onnxruntime()
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed, and this bundle's engines run on it.",
            received=str(error),
            expected="the package onnxruntime",
            fix=f"pip install {provider.package}",
        ) from error


def _check_signature(entry: StageEntry, session: Any) -> None:
    """The graph has the tensors that the manifest states, so that later messages can rely on the manifest."""
    for kind, infos, nodes in (
        ("inputs", entry.inputs, session.get_inputs()),
        ("outputs", entry.outputs, session.get_outputs()),
    ):
        stated = {info.name: _TYPES.get(info.dtype, info.dtype) for info in infos}
        found = {node.name: node.type for node in nodes}
        if stated != found:
            raise EngineError(
                f"the graph of stage {entry.name!r} has other {kind} than its manifest states.",
                received=", ".join(f"{name} {kind}" for name, kind in found.items()),
                expected=", ".join(f"{name} {kind}" for name, kind in stated.items()),
                fix="rebuild the bundle with build-engine",
            )


def _run_options(runtime: ModuleType) -> Any:
    options = runtime.RunOptions()
    options.log_severity_level = _SILENT
    return options


def _exceptions(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises: its own classes, which have no common base, and pybind's translations."""
    state = runtime.capi.onnxruntime_pybind11_state
    own = (getattr(state, name) for name in dir(state))
    kinds = (kind for kind in own if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, RuntimeError, ValueError, MemoryError)


def _is_about_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be had: C++'s own, an allocator's words, or CUDA's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
