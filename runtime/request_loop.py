"""Which sampling loop a request asks for: the plain one, or a step function wrapped for guidance and step caching.

The module knows what wraps what; what each does is in ``guidance`` and ``step_cache``, imported when a request asks for
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.events import FloatArray
from reelforge.runtime.request import GUIDANCE_STAGE, ResolvedRequest
from reelforge.runtime.sampling import StepLoop, begin_loop
from reelforge.runtime.schedule import flow_match_sigmas

if TYPE_CHECKING:
    from reelforge.runtime.stage_inputs import Conditions
    from reelforge.runtime.step_program import StepFunction

MODULATION = "double_modulation"


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

        if conditions.negative is None and request.step_cache is None:
            yield stack.enter_context(begin_loop(engine("dit"), latents, conditions.fixed, conditions.per_step))
            return
        from reelforge.runtime.registers import registers_for
        from reelforge.runtime.step_cache.cached_step import cached_step
        from reelforge.runtime.step_program import RegisterLoop

        first, step, prefix = _evaluation(request, conditions, engine)
        if request.step_cache is not None:
            sigmas, modulation = flow_match_sigmas(request.steps, request.shift), conditions.per_step[MODULATION]
            step = cached_step(step, request.step_cache, engine, sigmas, modulation, prefix)
        yield stack.enter_context(closing(RegisterLoop(registers_for(first), step, latents)))


def _evaluation(
    request: ResolvedRequest, conditions: Conditions, engine: Callable[[str], Engine]
) -> tuple[Engine, StepFunction, str]:
    """Return an engine of the model, a step that evaluates it, and the prefix of what it is told about the prompt."""
    from reelforge.runtime.dit_parts import DitParts, PartedEvaluation
    from reelforge.runtime.guidance import PROMPT, GuidedEvaluation, GuidedParts
    from reelforge.runtime.step_cache.settings import Reuse
    from reelforge.runtime.step_program import Evaluation

    cache, negative, scale = request.step_cache, conditions.negative, request.cfg_scale
    if cache is None or not cache.parted:
        dit = engine("dit")
        if negative is None:
            return dit, Evaluation(dit, conditions.fixed, conditions.per_step), ""
        return dit, GuidedEvaluation(dit, engine(GUIDANCE_STAGE), conditions, negative, scale), PROMPT
    parts = DitParts.of(engine, reuse=cache.reuse is Reuse.TOKENS)
    if negative is None:
        return parts.head, PartedEvaluation(parts, conditions.fixed, conditions.per_step), ""
    return parts.head, GuidedParts(parts, engine(GUIDANCE_STAGE), conditions, negative, scale), PROMPT
