"""A whole sampling loop, for tests of what steps it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.sampling import begin_loop


def run_loop(
    engine: Engine,
    latents: np.ndarray,
    fixed: Mapping[str, np.ndarray],
    per_step: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Run every step, and return the final latents."""
    with begin_loop(engine, latents, fixed, per_step) as loop:
        for step in range(len(next(iter(per_step.values())))):
            loop.advance(step)
        return loop.latents()
