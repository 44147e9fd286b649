"""A step function that skips evaluations of the one that it wraps.

The module knows the registers of step functions and the stage ``step_reuse``; which steps are skipped is a criterion's
matter, and what an evaluation is that of the wrapped function.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.dit_parts import PartedStep
from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.step_cache.criteria import Criterion, EasyCache, FirstBlockCache, MagCache, TeaCache
from reelforge.runtime.step_cache.settings import (
    CHANGE_STAGE,
    HEAD_CHANGE_STAGE,
    INPUT_STAGE,
    LEAST_WARMUP,
    REUSE_STAGE,
    Method,
    Reuse,
    StepCache,
)
from reelforge.runtime.step_program import StepFunction

_REUSE_INPUTS = ("latents", "computed_latents", "velocity", "earlier_velocity", "residual_weight", "trend_weight")


class CachedStep:
    """Evaluates the model, or makes a step of what it said before (a :class:`StepFunction`).

    Args:
        evaluate: The step function to wrap. Of one in parts the head is run in every step, before it is decided.
        criterion: Decides between warm-up and last step.
        reuse: The stage ``step_reuse``; None where tokens are reused.
        sigma_steps: ``[n]`` float32, ``sigma_{i+1} - sigma_i`` of all steps.
        warmup: How many first steps are always evaluated; the first two of a loop are in any case, also of one that
            begins at a later step.
        how: What stands for a skipped step's velocity.
    """

    def __init__(
        self,
        evaluate: StepFunction,
        criterion: Criterion,
        reuse: Engine | None,
        sigma_steps: Array,
        warmup: int = LEAST_WARMUP,
        how: Reuse = Reuse.EXTRAPOLATE,
    ) -> None:
        self._evaluate = evaluate
        self._parts = evaluate if isinstance(evaluate, PartedStep) else None
        self._criterion = criterion
        self._reuse = reuse
        self._sigma_steps = np.asarray(sigma_steps, np.float32)
        self._sigmas = np.concatenate([[0.0], np.cumsum(self._sigma_steps, dtype=np.float64)])  # from the first step's
        self._warmup = max(warmup, LEAST_WARMUP)
        self._how = how
        self._computed = self._earlier = 0  # the last two evaluated steps
        self._evaluations = 0  # a loop that goes on from the middle has none either when it begins

    def __call__(self, registers: Registers, step: int) -> bool:
        """Make ``next_latents`` (see :class:`StepFunction`)."""
        if self._parts is not None:
            self._parts.begin(registers, step)
        between = self._warmup <= step < len(self._sigma_steps) - 1
        if between and self._evaluations >= LEAST_WARMUP and self._criterion.skips(registers, step):
            self._step_from_cache(registers, step)
            evaluated = False
        else:
            self._criterion.computed()
            if self._evaluations:
                registers.let("earlier_latents", "computed_latents")
                registers.let("earlier_velocity", "velocity")
            if self._parts is not None:
                self._parts.complete(registers)
            else:
                self._evaluate(registers, step)
            registers.let("computed_latents", "latents")
            self._earlier, self._computed = self._computed, step
            self._evaluations += 1
            evaluated = True
        registers.let("previous_latents", "latents")
        return evaluated

    def _step_from_cache(self, registers: Registers, step: int) -> None:
        if self._how is Reuse.TOKENS:
            assert self._parts is not None, "tokens are reused by a step in parts"
            registers.let("kept_velocity", "velocity")  # of the last computed step, which the tail's is not
            self._parts.from_tokens(registers)
            registers.let("velocity", "kept_velocity")
            return
        assert self._reuse is not None, "velocities are reused with step_reuse"
        residual, trend = 0.0, 0.0
        if self._how is Reuse.RESIDUAL:
            residual = 1.0
        elif self._how is Reuse.EXTRAPOLATE:
            since, before = self._sigmas[step] - self._sigmas[self._computed], self._sigmas[self._earlier]
            # No further than the line was followed to find it: beyond that it leads away (benchmarks/step_cache.md).
            trend = min(float(since / (self._sigmas[self._computed] - before)), 1.0)
        registers.write("residual_weight", np.array(residual, np.float32))
        registers.write("trend_weight", np.array(trend, np.float32))
        registers.write("sigma_step", self._sigma_steps[step, ...])
        inputs = {name: name for name in (*_REUSE_INPUTS, "sigma_step")}
        registers.call(self._reuse, inputs, {"next_latents": "next_latents"})


def cached_step(
    evaluate: StepFunction,
    cache: StepCache,
    engine_of: Callable[[str], Engine],
    sigmas: NDArray[np.float32],
    modulation: Array,
    prefix: str = "",
) -> CachedStep:
    """Wrap a step function as a request asks for.

    Args:
        evaluate: Computes a step.
        cache: What was asked for; it has no problems.
        engine_of: Returns the engine of a stage, for as long as the step function is used.
        sigmas: ``[n + 1]``, from :func:`reelforge.runtime.schedule.flow_match_sigmas`.
        modulation: ``[n, ...]``, what ``dit`` is told as ``double_modulation``; with guidance, about the prompt.
        prefix: Of the registers of the evaluation that is asked, if it is in parts.
    """
    steps = len(sigmas) - 1
    criterion: Criterion
    if cache.method is Method.EASYCACHE:
        criterion = EasyCache(engine_of(CHANGE_STAGE), cache.threshold, cache.longest_run())
    elif cache.method is Method.TEACACHE:
        assert cache.coefficients is not None
        change = engine_of(INPUT_STAGE)
        criterion = TeaCache(change, modulation, cache.coefficients, cache.threshold, cache.longest_run())
    elif cache.method is Method.FBCACHE:
        criterion = FirstBlockCache(engine_of(HEAD_CHANGE_STAGE), cache.threshold, cache.longest_run(), prefix)
    else:
        assert cache.ratios is not None
        criterion = MagCache(cache.ratios.at(sigmas[:-1]).tolist(), cache.threshold, cache.longest_run())
    reuse = None if cache.reuse is Reuse.TOKENS else engine_of(REUSE_STAGE)
    return CachedStep(evaluate, criterion, reuse, np.diff(sigmas), cache.first_steps(steps), cache.reuse)
