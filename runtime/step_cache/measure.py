"""Measures of a checkpoint what step caches have to know beforehand, by running whole generations.

MagCache's ratios and TeaCache's polynomial. What is measured of a step is computed by the stages ``step_change`` and
``input_change``; here means are taken and a line is fitted. Knows the pipeline's phases; what the numbers are used for
is in ``criteria``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import RequestError
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.registers import Registers, registers_for
from reelforge.runtime.request import Request, ResolvedRequest
from reelforge.runtime.sampling import take_step
from reelforge.runtime.schedule import flow_match_sigmas
from reelforge.runtime.step_cache.criteria import input_change
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.rescaling import DEGREE, Rescaling, fit
from reelforge.runtime.step_cache.settings import CHANGE_STAGE, INPUT_STAGE
from reelforge.runtime.step_program import Evaluation, RegisterLoop, StepFunction

OnStep = Callable[[int, int], None]
Measure = Callable[[Registers, int], float]
"""Of a step that was computed, from the second on, to a number (see :class:`StepRecorder`)."""


class StepRecorder:
    """A step function that evaluates every step and measures it against the step before.

    A measure finds ``latents`` and ``velocity`` of this step as ``computed_latents`` and ``velocity`` too, and those of
    the step before as ``previous_latents`` and ``earlier_latents``, and ``earlier_velocity``.

    Attributes:
        measured: Of each measure what it found, from the second step on.
    """

    def __init__(self, evaluate: StepFunction, *measures: Measure) -> None:
        self.measured: list[list[float]] = [[] for _ in measures]
        self._evaluate = evaluate
        self._measures = measures

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model, and measure (see :class:`StepFunction`)."""
        if step:
            registers.let("earlier_latents", "computed_latents")
            registers.let("earlier_velocity", "velocity")
        self._evaluate(registers, step)
        registers.let("computed_latents", "latents")
        if step:
            registers.let("previous_latents", "earlier_latents")
            for measure, found in zip(self._measures, self.measured, strict=True):
                found.append(measure(registers, step))
        return True


def residual_ratio(change: Engine) -> Measure:
    """Return what MagCache asks: how the residual's magnitude has grown.

    Args:
        change: The stage ``step_change``.
    """

    def measure(registers: Registers, step: int) -> float:  # noqa: ARG001
        registers.call(change, {name: name for name in change.inputs}, {"residual_ratio": "ratio"})
        return float(registers.read("ratio"))

    return measure


def velocity_change(change: Engine) -> Measure:
    """Return what TeaCache predicts: ``|v_i - v_{i-1}| / |v_{i-1}|``, where ``|.|`` is the mean of absolute values.

    The stage computes ``(|v_c - v_e| / |x_c - x_e|) |x - x_p| / |v_c|``: with both steps in each other's place and the
    same latents twice, the latents cancel.

    Args:
        change: The stage ``step_change``.
    """
    inputs = {
        "latents": "earlier_latents",
        "previous_latents": "computed_latents",
        "computed_latents": "earlier_latents",
        "velocity": "earlier_velocity",
        "earlier_latents": "computed_latents",
        "earlier_velocity": "velocity",
    }

    def measure(registers: Registers, step: int) -> float:  # noqa: ARG001
        registers.call(change, inputs, {"predicted_change": "moved"})
        return float(registers.read("moved"))

    return measure


def measure_ratios(pipeline: Pipeline, requests: Sequence[Request], on_step: OnStep | None = None) -> MagnitudeRatios:
    """Run the sampling loops of some requests and return the mean ratios.

    Args:
        pipeline: Of the bundle to measure, which must have the stage ``step_change``.
        requests: At least one; all with the same steps and shift. The paper measures one prompt.
        on_step: Told how many of how many steps are done.

    Raises:
        BundleError: If the bundle lacks the stage.
        RequestError: If the bundle does not support a request.
        EngineError: If an engine fails or its numbers are not finite.
    """

    def measures(modulation: Array, change: Engine) -> tuple[Measure, ...]:  # noqa: ARG001
        return (residual_ratio(change),)

    resolved = [pipeline.resolve(request) for request in requests]
    rows = [[1.0, *ratios] for (ratios,) in _measured(pipeline, resolved, (CHANGE_STAGE,), measures, on_step)]
    sigmas = flow_match_sigmas(resolved[0].steps, resolved[0].shift)[:-1]
    return MagnitudeRatios(
        tuple(float(sigma) for sigma in sigmas),
        tuple(float(ratio) for ratio in np.mean(rows, axis=0)),
        tuple(float(deviation) for deviation in np.std(rows, axis=0)),
        len(rows),
        pipeline.bundle.manifest.content_digest,
    )


def measure_rescaling(pipeline: Pipeline, requests: Sequence[Request], on_step: OnStep | None = None) -> Rescaling:
    """Run the sampling loops of some requests and return the polynomial from the input's change to the velocity's.

    Args:
        pipeline: Of the bundle to measure, which must have the stages ``input_change`` and ``step_change``.
        requests: With more steps than the polynomial has powers, together. The paper's authors take 70 prompts.
        on_step: Told how many of how many steps are done.

    Raises:
        BundleError: If the bundle lacks a stage.
        RequestError: If the bundle does not support a request, or there are too few steps.
        EngineError: If an engine fails or its numbers are not finite.
    """

    def measures(modulation: Array, moves: Engine, change: Engine) -> tuple[Measure, ...]:
        return (lambda registers, step: input_change(registers, moves, modulation, step)), velocity_change(change)

    resolved = [pipeline.resolve(request) for request in requests]
    pairs = sum(request.steps - 1 for request in resolved)
    if pairs <= DEGREE:
        raise RequestError(
            "there are too few steps to fit a polynomial to.",
            received=f"{pairs} pairs of steps",
            expected=f"at least {DEGREE + 1}",
            fix="measure more steps, or several prompts",
        )
    changes: list[float] = []
    moved: list[float] = []
    for one, other in _measured(pipeline, resolved, (INPUT_STAGE, CHANGE_STAGE), measures, on_step):
        changes += one
        moved += other
    return fit(changes, moved, len(resolved), pipeline.bundle.manifest.content_digest)


def _measured(
    pipeline: Pipeline,
    requests: Sequence[ResolvedRequest],
    stages: Sequence[str],
    measures: Callable[..., tuple[Measure, ...]],
    on_step: OnStep | None,
) -> Iterator[list[list[float]]]:
    """Run the sampling loops, and yield what was measured of each.

    Args:
        pipeline: Of the bundle.
        requests: What to sample.
        stages: Which stages measure.
        measures: Given ``double_modulation`` of all steps and the stages' engines, returns the measures.
        on_step: Told how many of how many steps are done.
    """
    for stage in stages:
        pipeline.bundle.stage(stage)
    done, total = 0, sum(request.steps for request in requests)
    for request in requests:
        conditions = pipeline.condition(request, pipeline.encode_text(request.prompt))
        latents = gaussian_noise(pipeline.inputs.latent_shape(request.shape), request.seed)
        with ExitStack() as stack:
            dit, *engines = (stack.enter_context(pipeline.engine(stage)) for stage in ("dit", *stages))
            evaluate = Evaluation(dit, conditions.fixed, conditions.per_step)
            recorder = StepRecorder(evaluate, *measures(conditions.per_step["double_modulation"], *engines))
            loop = stack.enter_context(closing(RegisterLoop(registers_for(dit), recorder, latents)))
            for step in range(request.steps):
                latents = take_step(loop, step, request.steps, latents)
                done += 1
                if on_step is not None:
                    on_step(done, total)
        yield recorder.measured
