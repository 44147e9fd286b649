"""Which sampling loop a request asks for: the plain one, or a step function wrapped for guidance and step caching.

The module knows what wraps what; what each does is in ``guidance`` and ``step_cache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.events import FloatArray
from reelforge.runtime.guidance import GuidedEvaluation
from reelforge.runtime.registers import registers_for
from reelforge.runtime.request import GUIDANCE_STAGE, ResolvedRequest
from reelforge.runtime.sampling import StepLoop, begin_loop
from reelforge.runtime.schedule import flow_match_sigmas
from reelforge.runtime.stage_inputs import Conditions
from reelforge.runtime.step_cache.cached_step import cached_step
from reelforge.runtime.step_program import Evaluation, RegisterLoop, StepFunction


@contextmanager
def requested_loop(
    request: ResolvedRequest,
    conditions: Conditions,
    latents: FloatArray,
    lend: Callable[[str], AbstractContextManager[Engine]],
) -> Iterator[StepLoop]:
    """Begin the loop that a request asks for, and end it with the ``with`` block.

    Args:
        request: What to sample.
        conditions: What ``dit`` is told besides the latents.
        latents: ``[1, C, T, H, W]``, left as they are.
        lend: Lends the engine of a stage.

    Raises:
        EngineError: If an engine cannot be loaded, or the conditions do not fit ``dit``.
    """
    with ExitStack() as stack:

        def engine(stage: str) -> Engine:
            return stack.enter_context(lend(stage))

        dit = engine("dit")
        if conditions.negative is None and request.step_cache is None:
            yield stack.enter_context(begin_loop(dit, latents, conditions.fixed, conditions.per_step))
            return
        step: StepFunction = Evaluation(dit, conditions.fixed, conditions.per_step)
        if conditions.negative is not None:
            guidance = engine(GUIDANCE_STAGE)
            step = GuidedEvaluation(dit, guidance, conditions, conditions.negative, request.cfg_scale)
        if request.step_cache is not None:
            sigmas = flow_match_sigmas(request.steps, request.shift)
            step = cached_step(step, request.step_cache, engine, sigmas, conditions.per_step["double_modulation"])
        yield stack.enter_context(closing(RegisterLoop(registers_for(dit), step, latents)))
