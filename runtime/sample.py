"""The sampling phase: steps one after the other, each with its progress; a step without room is tried again.

The module knows neither what a step computes nor where engines come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.errors import CancelledError, EngineError, OutOfMemoryError
from reelforge.runtime.events import Event, FloatArray, Progress
from reelforge.runtime.request_loop import requested_loop
from reelforge.runtime.sampling import SamplingError, take_step

if TYPE_CHECKING:
    from reelforge.runtime.preview import Previews
    from reelforge.runtime.request import ResolvedRequest
    from reelforge.runtime.stage_inputs import Conditions

Lend = Callable[[str], AbstractContextManager[Engine]]
Keep = Callable[[int, FloatArray], None]


def sampling(
    request: ResolvedRequest,
    conditions: Conditions,
    latents: FloatArray,
    lend: Lend,
    stop: Stop,
    make_room: Callable[[], bool],
    first_step: int = 0,
    previews: Previews | None = None,
    keep: Keep | None = None,
) -> Generator[Event, None, FloatArray]:
    """Step through the loop, and return the final latents ``[1, C, T, H, W]``.

    A step that runs out of memory while other stages wait in it is taken again without them, with equal results. Not
    with step caching, whose decisions depend on the steps before: there it is an error.

    Args:
        request: What to sample.
        conditions: What ``dit`` is told besides the latents.
        latents: Before ``first_step``; left as they are.
        lend: Lends the engine of a stage.
        stop: Asked before every step.
        make_room: Frees memory that others hold, and returns whether there was any.
        first_step: Where to begin.
        previews: Shows the latents, if that is wanted.
        keep: Given the next step and the latents before it when ``stop`` ends the loop.

    Raises:
        SamplingError: If a step fails, with the latents before it.
        EngineError: If an engine cannot be loaded.
        CancelledError: If ``stop`` ends it.
    """
    while True:
        try:
            return (yield from _steps(request, conditions, latents, lend, stop, first_step, previews, keep))
        except EngineError as error:
            reason = error.__cause__ if isinstance(error, SamplingError) else error
            again = isinstance(reason, OutOfMemoryError) and request.step_cache is None
            if not again or not make_room():
                raise
            if isinstance(error, SamplingError):
                first_step, latents = error.step, error.latents


def _steps(
    request: ResolvedRequest,
    conditions: Conditions,
    latents: FloatArray,
    lend: Lend,
    stop: Stop,
    first_step: int,
    previews: Previews | None,
    keep: Keep | None,
) -> Generator[Event, None, FloatArray]:
    """Take the steps; the latents come back after each, so that a failure cannot lose them."""
    total = request.steps
    with requested_loop(request, conditions, latents, lend) as loop:
        started = time.monotonic()
        for step in range(first_step, total):
            try:
                stop.check(f"step {step + 1} of {total}")
            except CancelledError:
                if keep is not None:
                    keep(step, latents)
                raise
            before, latents = latents, take_step(loop, step, total, latents)
            pace_s = (time.monotonic() - started) / (step + 1 - first_step)
            shown = None if previews is None else previews.after(step, before, latents)
            yield Progress("sampling", step + 1, total, pace_s * (total - step - 1), shown, skipped=loop.skipped)
    return latents
