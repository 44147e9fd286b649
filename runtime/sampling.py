"""The sampling loop. It launches one engine per step and does no arithmetic: the Euler update is in the ``dit`` graph.

Knows neither model nor schedule; whatever differs between steps is a row of an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.errors import EngineError, NotFiniteError


class SamplingError(EngineError):
    """A step failed. What the steps before it made is not lost.

    Attributes:
        step: The step that failed, from 0.
        latents: ``[batch, C, T, H, W]`` before that step.
    """

    def __init__(
        self, where: str, step: int, latents: Array, *, received: object = None, expected: str = "", fix: str = ""
    ) -> None:
        super().__init__(where, received=received, expected=expected, fix=fix)
        self.step = step
        self.latents = latents


class NotFiniteLatentsError(SamplingError, NotFiniteError):
    """A step gave latents that are not finite numbers."""


class StepLoop(Protocol):
    """A sampling loop that has begun.

    Attributes:
        skipped: Steps so far for which the model was not evaluated.
    """

    skipped: int

    def advance(self, step: int) -> None:
        """Run one step, to its end."""
        ...

    def latents(self) -> Array:
        """Return the latents after the steps so far, ``[batch, C, T, H, W]``."""
        ...

    def close(self) -> None:
        """Give back what the loop holds."""
        ...


@runtime_checkable
class LoopingEngine(Protocol):
    """An engine that keeps the latents where it computes; others are given the two buffers of :class:`HostLoop`."""

    def loop(self, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> StepLoop:
        """Begin a loop; the arguments are those of :func:`begin_loop`."""
        ...


class HostLoop:
    """A loop whose latents are in two arrays that the steps write in turn."""

    def __init__(self, dit: Engine, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> None:
        self.skipped = 0
        self._dit = dit
        self._fixed = fixed
        self._per_step = per_step
        self._source, self._target = latents.copy(), np.empty_like(latents)

    def advance(self, step: int) -> None:
        """Run one step."""
        inputs = {"latents": self._source, **self._fixed, **step_inputs(self._per_step, step)}
        self._dit.run(inputs, {"next_latents": self._target})
        self._source, self._target = self._target, self._source

    def latents(self) -> Array:
        """Return the buffer that was written last."""
        return self._source

    def close(self) -> None:
        """Nothing to give back."""


def begin_loop(
    dit: Engine, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]
) -> closing[StepLoop]:
    """Begin a loop, to be used in a ``with`` block that gives back what it holds.

    Args:
        dit: Takes ``latents``, ``fixed`` and one row of ``per_step``; gives ``next_latents``.
        latents: ``[batch, C, T, H, W]``, left as they are.
        fixed: Inputs that all steps share.
        per_step: Inputs whose first axis is the step; a step gets its row as a view.
    """
    begin = dit.loop if isinstance(dit, LoopingEngine) else partial(HostLoop, dit)
    return closing(begin(latents, fixed, per_step))


def take_step(loop: StepLoop, step: int, total: int, latents: Array) -> Array:
    """Run one step and return its latents, which stay as they are until the step after the next.

    Args:
        loop: A loop that has begun.
        step: From 0.
        total: For the message.
        latents: As the step before left them.

    Raises:
        SamplingError: If the engine fails, with ``latents``.
        NotFiniteLatentsError: If its numbers are not finite; likewise.
    """
    try:
        loop.advance(step)
        following = loop.latents()
    except EngineError as error:
        raise SamplingError(
            f"step {step + 1} of {total} of stage 'dit' failed: {error.where}",
            step,
            latents,
            received=error.received,
            expected=error.expected,
            fix=error.fix,
        ) from error
    if not all_finite(following):
        bad = int(np.count_nonzero(~np.isfinite(following)))
        raise NotFiniteLatentsError(
            f"step {step + 1} of {total} of stage 'dit' gave latents that are not finite numbers.",
            step,
            latents,
            received=f"{bad} of {following.size} values",
            fix="rebuild the bundle with --precision fp32, or check its parity with reelforge verify",
        )
    return following


def all_finite(values: Array) -> bool:
    """Return whether there is neither NaN nor infinity, in one pass without a temporary array where that suffices.

    A sum of squares is finite if all values are and none is above 1e19 or so; else every value is looked at. Of NumPy's
    products this one looks at no flags of the processor, so that nothing needs to be told to ignore an overflow.
    """
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def step_inputs(per_step: Mapping[str, Array], step: int) -> dict[str, Array]:
    """Return a step's row of each array, as views."""
    return {name: rows[step, ...] for name, rows in per_step.items()}  # the dots keep a scalar an array
