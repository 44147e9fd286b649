"""The sampling loop. It launches one engine per step and does no arithmetic: the Euler update is in the ``dit`` graph.

Knows neither model nor schedule; whatever differs between steps is a row of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine


class StepLoop(Protocol):
    """A sampling loop that has begun."""

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
        """Begin a loop; the arguments are those of :func:`sample`."""
        ...


class HostLoop:
    """A loop whose latents are in two arrays that the steps write in turn."""

    def __init__(self, dit: Engine, latents: Array, fixed: Mapping[str, Array], per_step: Mapping[str, Array]) -> None:
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


def sample(
    dit: Engine,
    latents: Array,
    fixed: Mapping[str, Array],
    per_step: Mapping[str, Array],
    on_step: Callable[[int], None],
) -> Array:
    """Run every step and return the final latents.

    Args:
        dit: Takes ``latents``, ``fixed`` and one row of ``per_step``; gives ``next_latents``.
        latents: Initial noise ``[batch, C, T, H, W]``, left as it is.
        fixed: Inputs that all steps share.
        per_step: Inputs whose first axis is the step; a step gets its row as a view.
        on_step: Called with the number of finished steps.

    Returns:
        ``[batch, C, T, H, W]``, an array of the caller's own.
    """
    begin = dit.loop if isinstance(dit, LoopingEngine) else partial(HostLoop, dit)
    with closing(begin(latents, fixed, per_step)) as loop:
        for step in range(len(next(iter(per_step.values())))):
            loop.advance(step)
            on_step(step + 1)
        return loop.latents()


def step_inputs(per_step: Mapping[str, Array], step: int) -> dict[str, Array]:
    """Return a step's row of each array, as views."""
    return {name: rows[step, ...] for name, rows in per_step.items()}  # the dots keep a scalar an array
