"""A pipeline that records what it does: tokenising, each engine's loading, every call, every copy.

The pipeline lends its engines as always; each is put into a wrapper that times its calls when it is loaded. What the
host does around them is seen from the events of ``Pipeline.stream`` (see ``measure``). On a GPU a call returns when the
device has finished, so its time is the device's and the host's together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reelforge.runtime.budget import parse_budget
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import Array, Engine, EngineOptions
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.registers import RegisteringEngine, Registers
from reelforge.runtime.request import ResolvedRequest
from reelforge.runtime.sampling import LoopingEngine, StepLoop, step_inputs
from reelforge.runtime.stage_inputs import Conditions, StageInputs, TextEncoding, TextInputs
from reelforge.runtime.stages import Stages
from reelforge.tools.profiling.recorder import Recorder
from reelforge.tools.profiling.schema import Kind

if TYPE_CHECKING:
    from reelforge.runtime.cuda.driver import Cuda
    from reelforge.runtime.engines.device_session import DeviceSession

PHASES = {
    "llm": "text",
    "clip": "text",
    "refiner": "conditioning",
    "modulation": "conditioning",
    "dit": "sampling",
    "dit_head": "sampling",
    "vae_decoder": "decoding",
}
"""Stage -> what a generation calls its part; memory is reported by it. What else a step needs is lent after ``dit``."""


class ProfilingPipeline(Pipeline):
    """A pipeline whose work is recorded by ``recorder``, which may be another one for each run.

    Nothing is remembered from one run to the next, so that every stage runs every time.

    Args:
        bundle: The bundle.
        options: How engines execute.
        recorder: Of the first run.
        memory_budget: As :meth:`Pipeline.open` has it: which engines stay loaded between runs.
        gpu: That ONNX Runtime computes on, whose memory is asked for after each stage; None without one. Plans have a
            session of their own, which knows its GPU.

    Attributes:
        recorder: Of the present run.
        kept: Stage -> a copy of the inputs of its last call, while ``keep_inputs`` is on.
        keep_inputs: Whether to copy them, which takes time: not during a run that counts.
        device_layers: Stage -> (layer, milliseconds) in the order of execution, as the library's profiler reports them;
            None while no plan that is loaded shall have a profiler.
        loading: The stage that was loaded last.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions | None,
        recorder: Recorder,
        memory_budget: int | str | None = None,
        gpu: Cuda | None = None,
    ) -> None:
        super().__init__(bundle, options)
        self.recorder = recorder
        self.gpu = gpu
        self.kept: dict[str, dict[str, Array]] = {}
        self.keep_inputs = False
        self.device_layers: dict[str, list[tuple[str, float]]] | None = None
        self.loading = ""
        self.inputs = _TimedInputs(bundle, self)
        self._stages = _TimedStages(self, parse_budget(memory_budget))

    @property
    def device_name(self) -> str | None:
        """The GPU's name; None before it is opened, or without one."""
        return None if self._session is None else self._session.cuda.device.name

    def device(self) -> DeviceSession:
        """Return the GPU's session, whose copies are timed; it is opened with the first engine."""
        return self._device()

    def _device(self) -> DeviceSession:
        if self._session is None:
            from reelforge.tools.profiling.device import open_timed_session

            self._session = open_timed_session(self)
        return self._session


class _TimedStages(Stages):
    """Stages whose loading is recorded, and whose engines record their calls and their end."""

    def __init__(self, pipeline: ProfilingPipeline, budget: int | None) -> None:
        super().__init__(pipeline.bundle, pipeline.options, pipeline.device, budget, 0)
        self._pipeline = pipeline

    @contextmanager
    def lease(self, stage: str) -> Iterator[Engine]:
        recorder = self._pipeline.recorder
        recorder.enter(PHASES.get(stage, recorder.phase))
        with super().lease(stage) as engine:
            yield engine
            if self._pipeline.gpu is not None:
                free, total = self._pipeline.gpu.memory()
                self._pipeline.recorder.device_bytes = total - free

    def _load(self, stage: str) -> Engine:
        self._pipeline.loading = stage
        with self._pipeline.recorder.span(f"load {stage}", Kind.LOAD, stage):
            return timed(super()._load(stage), self._pipeline)


class TimedEngine:
    """An engine whose calls are recorded."""

    def __init__(self, engine: Engine, pipeline: ProfilingPipeline) -> None:
        self.wrapped = engine
        self.name = engine.name
        self.inputs = engine.inputs
        self.outputs = engine.outputs
        self._pipeline = pipeline

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute the outputs (see :class:`reelforge.runtime.engines.engine.Engine`)."""
        self.keep(inputs)
        with self.call():
            return self.wrapped.run(inputs, outputs)

    def keep(self, inputs: Mapping[str, Array]) -> None:
        """Copy the inputs of a call, while the pipeline wants them."""
        if self._pipeline.keep_inputs:
            self._pipeline.kept[self.name] = {name: array.copy() for name, array in inputs.items()}

    def close(self) -> None:
        """Close the engine, and record how long that takes."""
        with self._pipeline.recorder.span(f"close {self.name}", Kind.CLOSE, self.name):
            self.wrapped.close()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Record one call."""
        recorder = self._pipeline.recorder
        recorder.calls[self.name] += 1
        with recorder.span(f"{self.name} {recorder.calls[self.name]}", Kind.RUN, self.name):
            yield


class TimedLoopingEngine(TimedEngine):
    """An engine with a sampling loop of its own, whose calls are recorded."""

    def loop(self, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> StepLoop:
        """Begin a loop (see :class:`reelforge.runtime.sampling.LoopingEngine`)."""
        assert isinstance(self.wrapped, LoopingEngine)
        with self._pipeline.recorder.span(f"{self.name} begin loop", Kind.HOST, self.name):
            loop = self.wrapped.loop(latents, fixed, per_step)
        return _TimedLoop(loop, self, {**fixed, "latents": latents}, per_step)


class TimedRegisteringEngine(TimedEngine):
    """An engine with registers of its own, whose calls are recorded."""

    def registers(self) -> Registers:
        """Return registers (see :class:`reelforge.runtime.registers.RegisteringEngine`)."""
        assert isinstance(self.wrapped, RegisteringEngine)
        return _TimedRegisters(self.wrapped.registers())


class TimedDeviceEngine(TimedLoopingEngine, TimedRegisteringEngine):
    """An engine with both."""


_KINDS: Mapping[tuple[bool, bool], type[TimedEngine]] = {
    (False, False): TimedEngine,
    (True, False): TimedLoopingEngine,
    (False, True): TimedRegisteringEngine,
    (True, True): TimedDeviceEngine,
}


def timed(engine: Engine, pipeline: ProfilingPipeline) -> Engine:
    """Return an engine of the same abilities whose calls are recorded: what is timed is the loop that others get."""
    return _KINDS[isinstance(engine, LoopingEngine), isinstance(engine, RegisteringEngine)](engine, pipeline)


class _TimedLoop:
    def __init__(
        self, loop: StepLoop, engine: TimedEngine, inputs: Mapping[str, Array], per_step: Mapping[str, Array]
    ) -> None:
        self.skipped = loop.skipped
        self._loop = loop
        self._engine = engine
        self._inputs = inputs
        self._per_step = per_step

    def advance(self, step: int) -> None:
        self._engine.keep({**self._inputs, **step_inputs(self._per_step, step)})
        with self._engine.call():
            self._loop.advance(step)
        self.skipped = self._loop.skipped

    def latents(self) -> Array:
        return self._loop.latents()

    def close(self) -> None:
        self._loop.close()


class _TimedRegisters:
    """Registers that take engines in their wrappers."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers
        self.write, self.read = registers.write, registers.read
        self.let, self.drop, self.close = registers.let, registers.drop, registers.close

    def call(self, engine: Engine, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        if not isinstance(engine, TimedEngine):
            self._registers.call(engine, inputs, outputs)
            return
        with engine.call():
            self._registers.call(engine.wrapped, inputs, outputs)


class _TimedInputs(StageInputs):
    """Stage inputs whose making is recorded."""

    def __init__(self, bundle: Bundle, pipeline: ProfilingPipeline) -> None:
        super().__init__(bundle)
        self._pipeline = pipeline

    def text(self, prompt: str) -> TextInputs:
        with self._pipeline.recorder.span("tokenise", Kind.TOKENISE):
            return super().text(prompt)

    def refiner(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        with self._pipeline.recorder.span("inputs of refiner", Kind.HOST, "refiner"):
            return super().refiner(request, text)

    def modulation(self, request: ResolvedRequest, text: TextEncoding) -> dict[str, Array]:
        with self._pipeline.recorder.span("inputs of modulation", Kind.HOST, "modulation"):
            return super().modulation(request, text)

    def conditions(self, request: ResolvedRequest, refined: Array, vectors: Mapping[str, Array]) -> Conditions:
        with self._pipeline.recorder.span("inputs of dit", Kind.HOST, "dit"):
            return super().conditions(request, refined, vectors)
