"""A reference pipeline run once, with everything kept that candidates are compared with.

Engines are loaded once for all prompts and closed before the next stage's are. What the stages before ``dit`` answered
is remembered, so that a candidate which shares a stage does not run it again. Latents and velocities of all steps stay
in memory, ``2 * steps`` latents per prompt. The module does not know what candidates are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import RequestError, VerificationError
from reelforge.runtime.events import FloatArray, Progress
from reelforge.runtime.manifest import StageEntry, TensorInfo
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import OnProgress, Pipeline
from reelforge.runtime.recipe import VideoShape
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.sampling import step_inputs
from reelforge.runtime.stage_inputs import Conditions, TextEncoding

TEXT_STAGES = frozenset(("llm", "clip"))
CONDITION_STAGES = frozenset(("refiner", "modulation"))

T = TypeVar("T")
Memory = dict[tuple[str, str], dict[str, Array]]


@dataclass(frozen=True)
class ReferenceVideo:
    """Everything about one prompt's generation that a candidate is compared with.

    ``latents`` has the noise first, then the latents after each step; ``velocities`` one per step.
    """

    request: ResolvedRequest
    text: TextEncoding
    conditions: Conditions
    latents: tuple[FloatArray, ...]
    velocities: tuple[FloatArray, ...]


@dataclass(frozen=True)
class ReferenceRun:
    """What :func:`run_reference` returns; ``memory`` holds outputs of the stages before ``dit`` by their inputs."""

    pipeline: Pipeline
    videos: tuple[ReferenceVideo, ...]
    memory: Memory


def run_reference(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seed: int,
    steps: int | None = None,
    shape: VideoShape | None = None,
    on_progress: OnProgress | None = None,
) -> ReferenceRun:
    """Generate ``prompts`` up to their final latents and keep what candidates are compared with.

    Args:
        pipeline: The reference.
        prompts: At least one.
        seed: Of the first prompt's noise; then counted up.
        steps: Sampling steps; None means the bundle's default.
        shape: Size of the videos; None means the bundle's default.
        on_progress: Told about finished prompts of the phases before sampling, and about finished steps.

    Raises:
        RequestError: If there are no prompts, or the bundle does not support the request.
        VerificationError: If the reference gives numbers that are not finite.
        EngineError: If an engine fails.
    """
    if not prompts:
        raise RequestError("there is no prompt to compare videos of.", expected="at least one prompt")
    general = Request("", steps=steps)
    if shape is not None:
        general = replace(general, height=shape.height, width=shape.width, frames=shape.frames)
    requests = [
        pipeline.resolve(replace(general, prompt=prompt, seed=seed + number)) for number, prompt in enumerate(prompts)
    ]
    report = on_progress or ignore_progress
    memory: Memory = {}
    held = HeldPipeline(pipeline, memory)
    with held.phase():
        texts = [held.encode_text(request.prompt) for request in _counted(requests, "reference text", report)]
    with held.phase():
        pairs = _counted(list(zip(requests, texts, strict=True)), "reference conditioning", report)
        conditions = [held.condition(request, text) for request, text in pairs]
    videos: list[ReferenceVideo] = []
    with held.phase(), held.engine("dit") as dit:
        total = sum(request.steps for request in requests)
        for request, text, condition in zip(requests, texts, conditions, strict=True):
            latents = [_noise(pipeline, request)]
            velocities = []
            for step in range(request.steps):
                velocity, following = run_step(dit, latents[-1], condition, step, ("velocity", "next_latents"))
                velocities.append(velocity)
                latents.append(following)
                report(Progress("reference sampling", len(videos) * request.steps + step + 1, total))
            videos.append(ReferenceVideo(request, text, condition, tuple(latents), tuple(velocities)))
    return ReferenceRun(pipeline, tuple(videos), memory)


class HeldPipeline(Pipeline):
    """A pipeline that keeps its engines loaded during a phase, and remembers the stages before ``dit``."""

    def __init__(self, inner: Pipeline, memory: Memory) -> None:
        super().__init__(inner.bundle, inner.options)
        self._inner = inner
        self._memory = memory
        self._stack = ExitStack()
        self._engines: dict[str, Engine] = {}

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Close, at the end, whatever was loaded inside."""
        with ExitStack() as self._stack:
            try:
                yield
            finally:
                self._engines.clear()

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Return the stage's engine; of a remembered stage, one that loads it when there is something to compute."""
        if stage in TEXT_STAGES | CONDITION_STAGES:
            yield RememberingEngine(self.bundle.stage(stage), self._memory, lambda: self._load(stage))
        else:
            yield self._load(stage)

    def _load(self, stage: str) -> Engine:
        if stage not in self._engines:
            self._engines[stage] = self._stack.enter_context(self._inner.engine(stage))
        return self._engines[stage]


class RememberingEngine:
    """An engine that answers what it was asked before from memory; nothing that it returns may be altered."""

    def __init__(self, entry: StageEntry, memory: Memory, load: Callable[[], Engine]) -> None:
        self.name = entry.name
        self.inputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.inputs}
        self.outputs: Mapping[str, TensorInfo] = {info.name: info for info in entry.outputs}
        self._identity = stage_identity(entry)
        self._memory = memory
        self._load = load

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:
        """Compute all outputs, or remember them."""
        assert outputs is None
        sha = hashlib.sha256()
        for name, array in sorted(inputs.items()):
            sha.update(f"{name}{array.dtype}{array.shape}".encode())
            sha.update(array.tobytes())
        key = (self._identity, sha.hexdigest())
        if key not in self._memory:
            self._memory[key] = self._load().run(inputs)
        return self._memory[key]

    def close(self) -> None:
        """Do nothing: the phase closes what was loaded."""


def stage_identity(entry: StageEntry) -> str:
    """Return a digest of what a stage computes: its graph and its weights."""
    weights = sorted((weight.name, weight.sha256) for weight in entry.weights)
    return hashlib.sha256(repr((entry.graph_digest, weights)).encode()).hexdigest()


def _noise(pipeline: Pipeline, request: ResolvedRequest) -> FloatArray:
    shape = pipeline.spec.latent_shape(request.shape.height, request.shape.width, request.shape.frames)
    return gaussian_noise((1, *shape), request.seed)


def run_step(
    dit: Engine, latents: FloatArray, conditions: Conditions, step: int, wanted: tuple[str, ...]
) -> tuple[FloatArray, ...]:
    """Run one step and return the ``wanted`` outputs.

    Raises:
        VerificationError: If one of them is not finite.
        EngineError: If the engine fails.
    """
    rows = step_inputs(conditions.per_step, step)
    outputs = dit.run({"latents": latents, **conditions.fixed, **rows}, dict.fromkeys(wanted))
    for name in wanted:
        require_finite(outputs[name], f"{name} of stage 'dit' at step {step}")
    return tuple(outputs[name] for name in wanted)


def require_finite(values: FloatArray, what: str) -> None:
    """Refuse ``values`` with NaN or infinities; ``what`` begins the message.

    Raises:
        VerificationError: If there are any.
    """
    if not np.isfinite(values).all():
        raise not_finite(what, f"{int(np.count_nonzero(~np.isfinite(values)))} NaN or infinite of {values.size} values")


def not_finite(what: str, received: object) -> VerificationError:
    """Return the error for numbers that are none."""
    return VerificationError(
        f"{what} is not finite.",
        received=received,
        expected="finite numbers",
        fix="keep more layers of the stage in high precision, or calibrate again",
    )


def _counted(items: Sequence[T], phase: str, report: OnProgress) -> Iterator[T]:
    for number, item in enumerate(items):
        yield item
        report(Progress(phase, number + 1, len(items)))


def ignore_progress(progress: Progress) -> None:
    """Do nothing: for callers that want to hear nothing."""
    del progress
