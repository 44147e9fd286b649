"""The flow-matching schedule: noise levels and timesteps of a sampling run (specification 4).

Computed in float32 in the order of operations of the reference implementations (Tencent's
``FlowMatchDiscreteScheduler`` and diffusers' ``FlowMatchEulerDiscreteScheduler``), because the timestep's sinusoid
multiplies by up to 1000: a last-bit difference here would be visible in every modulation vector. Knows no model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

TRAIN_TIMESTEPS = 1000


def flow_match_sigmas(steps: int, shift: float) -> FloatArray:
    """Return the noise levels ``sigma_0 .. sigma_steps``.

    ``s_i = 1 - i / steps``, ``sigma_i = shift * s_i / (1 + (shift - 1) * s_i)``, and ``sigma_steps = 0``.

    Args:
        steps: Number of sampling steps, at least 1.
        shift: Positive; above 1 it spends more steps at high noise.

    Returns:
        float32 ``[steps + 1]``, strictly decreasing from 1 to 0.
    """
    levels = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shifted = np.float32(shift) * levels / (np.float32(1) + np.float32(shift - 1) * levels)
    return np.append(shifted, np.float32(0)).astype(np.float32)


def timesteps(sigmas: FloatArray) -> FloatArray:
    """Return the timestep fed to the model at each step, ``1000 * sigma_i``: float32 ``[steps]``."""
    return sigmas[:-1] * np.float32(TRAIN_TIMESTEPS)


def sigma_steps(sigmas: FloatArray) -> FloatArray:
    """Return ``sigma_{i+1} - sigma_i`` (negative), by which the Euler update multiplies: float32 ``[steps]``."""
    return np.diff(sigmas)
