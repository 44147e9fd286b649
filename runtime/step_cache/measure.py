"""Measures how the residual of a checkpoint's velocity grows: MagCache's ratios, by running whole generations.

The ratio of two steps is computed by the stage ``step_change``; here the means over generations are taken. Knows the
pipeline's phases; what a ratio is used for is in ``criteria``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.noise import gaussian_noise
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.registers import Registers, registers_for
from reelforge.runtime.request import Request
from reelforge.runtime.sampling import take_step
from reelforge.runtime.schedule import flow_match_sigmas
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.settings import CHANGE_STAGE
from reelforge.runtime.step_program import Evaluation, RegisterLoop, StepFunction

OnStep = Callable[[int, int], None]


class RatioRecorder:
    """A step function that evaluates every step and keeps the residual's ratio to the step before.

    Attributes:
        ratios: Of each step so far; the first is 1.
    """

    def __init__(self, evaluate: StepFunction, change: Engine) -> None:
        self.ratios: list[float] = []
        self._evaluate = evaluate
        self._change = change

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model, and measure (see :class:`StepFunction`)."""
        if step:
            registers.let("earlier_latents", "computed_latents")
            registers.let("earlier_velocity", "velocity")
        self._evaluate(registers, step)
        registers.let("computed_latents", "latents")
        ratio = 1.0
        if step:
            registers.let("previous_latents", "earlier_latents")
            registers.call(self._change, {name: name for name in self._change.inputs}, {"residual_ratio": "ratio"})
            ratio = float(registers.read("ratio"))
        self.ratios.append(ratio)
        return True


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
    pipeline.bundle.stage(CHANGE_STAGE)
    rows: list[list[float]] = []
    resolved = [pipeline.resolve(request) for request in requests]
    total = sum(request.steps for request in resolved)
    for request in resolved:
        conditions = pipeline.condition(request, pipeline.encode_text(request.prompt))
        latents = gaussian_noise(pipeline.inputs.latent_shape(request.shape), request.seed)
        with pipeline.engine("dit") as dit, pipeline.engine(CHANGE_STAGE) as change:
            recorder = RatioRecorder(Evaluation(dit, conditions.fixed, conditions.per_step), change)
            with closing(RegisterLoop(registers_for(dit), recorder, latents)) as loop:
                for step in range(request.steps):
                    latents = take_step(loop, step, request.steps, latents)
                    if on_step is not None:
                        on_step(len(rows) * request.steps + step + 1, total)
        rows.append(recorder.ratios)
    sigmas = flow_match_sigmas(resolved[0].steps, resolved[0].shift)[:-1]
    return MagnitudeRatios(
        tuple(float(sigma) for sigma in sigmas),
        tuple(float(ratio) for ratio in np.mean(rows, axis=0)),
        tuple(float(deviation) for deviation in np.std(rows, axis=0)),
        len(rows),
        pipeline.bundle.manifest.content_digest,
    )
