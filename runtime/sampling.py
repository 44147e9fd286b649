"""The sampling loop. It launches one engine per step and does no arithmetic: the Euler update is in the ``dit`` graph.

Knows neither model nor schedule; whatever differs between steps is a row of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine


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
        ``[batch, C, T, H, W]``: one of the two buffers that the steps write in turn.
    """
    buffers = (latents.copy(), np.empty_like(latents))
    steps = len(next(iter(per_step.values())))
    for step in range(steps):
        source, target = buffers[step % 2], buffers[(step + 1) % 2]
        dit.run({"latents": source, **fixed, **step_inputs(per_step, step)}, {"next_latents": target})
        on_step(step + 1)
    return buffers[steps % 2]


def step_inputs(per_step: Mapping[str, Array], step: int) -> dict[str, Array]:
    """Return a step's row of each array, as views."""
    return {name: rows[step, ...] for name, rows in per_step.items()}  # the dots keep a scalar an array
