"""What a cached step costs the host besides its engines: engines that do nothing, and a clock around the loop."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.registers import HostRegisters
from reelforge.runtime.step_cache.cached_step import CachedStep
from reelforge.runtime.step_cache.criteria import EasyCache
from reelforge.runtime.step_program import Evaluation, RegisterLoop, StepFunction

STEPS = 2000
SHAPE = (1, 16, 3, 8, 8)
_CHANGE = ("latents", "previous_latents", "computed_latents", "velocity", "earlier_latents", "earlier_velocity")


class IdleEngine:
    """An engine that computes nothing; its outputs have these shapes and are zero at first."""

    def __init__(self, name: str, inputs: tuple[str, ...], outputs: Mapping[str, tuple[int, ...]]) -> None:
        self.name = name
        self.inputs: Mapping[str, TensorInfo] = {tensor: TensorInfo(tensor, "float32", ()) for tensor in inputs}
        self.outputs: Mapping[str, TensorInfo] = {
            tensor: TensorInfo(tensor, "float32", shape) for tensor, shape in outputs.items()
        }
        self._shapes = outputs

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None] | None = None) -> dict[str, Array]:  # noqa: ARG002
        """Return the arrays that were given, or new ones."""
        wanted = outputs or {}
        return {
            name: np.zeros(self._shapes[name], np.float32) if array is None else array for name, array in wanted.items()
        }

    def close(self) -> None:
        """Nothing to give back."""


def overhead_us(threshold: float | None) -> list[float]:
    """Return the host's time of each step but the first ones, in microseconds.

    Args:
        threshold: Of EasyCache: 0 asks about every step and computes it, above that every step is skipped. None is a
            loop of evaluations without a cache.
    """
    dit: Engine = IdleEngine("dit", (), {"velocity": SHAPE, "next_latents": SHAPE})
    change: Engine = IdleEngine("step_change", _CHANGE, {"predicted_change": ()})
    reuse: Engine = IdleEngine("step_reuse", (), {"next_latents": SHAPE})
    rows = {name: np.zeros((STEPS, 4), np.float32) for name in ("text", "double", "single", "final")}
    sigma_steps = np.full(STEPS, -1 / STEPS, np.float32)
    step: StepFunction = Evaluation(dit, {"cos": rows["text"]}, {**rows, "sigma_step": sigma_steps})
    if threshold is not None:
        step = CachedStep(step, EasyCache(change, threshold), reuse, sigma_steps)
    loop = RegisterLoop(HostRegisters(), step, np.zeros(SHAPE, np.float32))
    times = []
    for number in range(STEPS - 1):  # the last one is always computed
        began = time.perf_counter()
        loop.advance(number)
        times.append((time.perf_counter() - began) * 1e6)
    loop.close()
    return times[100:]
