"""A sampling loop made of functions over registers, for what wraps a step: guidance with two evaluations, step caching.

A :class:`StepFunction` makes one step's latents; a wrapper takes one and returns another. The plain loop does not need
any of this and keeps the latents' two buffers, or its CUDA graph (see ``runtime.sampling``).

All step functions know the registers ``latents`` (before the step), ``velocity`` and ``next_latents`` (what it makes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.sampling import step_inputs


class StepFunction(Protocol):
    """One sampling step over registers."""

    def __call__(self, registers: Registers, step: int) -> bool:
        """Make ``next_latents``, and ``velocity`` if the model was evaluated, from ``latents``, which stay.

        Args:
            registers: Hold ``latents`` and whatever inputs all steps share.
            step: From 0, ascending.

        Returns:
            Whether the model was evaluated.

        Raises:
            EngineError: If an engine fails.
        """
        ...


class Evaluation:
    """The plain step: one call of ``dit``.

    Args:
        dit: Takes ``latents``, ``fixed`` and one row of ``per_step``; gives ``velocity`` and ``next_latents``.
        fixed: Inputs that all steps share.
        per_step: Inputs whose first axis is the step.
        prefix: Of the registers that hold the inputs, so that two evaluations can share registers.
        latents: The register that ``dit`` reads as its latents.
        velocity: The register for the velocity.
        next_latents: The register for the latents after an Euler step.
    """

    def __init__(
        self,
        dit: Engine,
        fixed: Mapping[str, Array],
        per_step: Mapping[str, Array],
        *,
        prefix: str = "",
        latents: str = "latents",
        velocity: str = "velocity",
        next_latents: str = "next_latents",
    ) -> None:
        self._dit = dit
        self._fixed = fixed
        self._per_step = per_step
        self._prefix = prefix
        self._inputs = {"latents": latents, **{name: prefix + name for name in (*fixed, *per_step)}}
        self._outputs = {"velocity": velocity, "next_latents": next_latents}
        self._written = False

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model (see :class:`StepFunction`)."""
        if not self._written:
            for name, array in self._fixed.items():
                registers.write(self._prefix + name, array)
            self._written = True
        for name, row in step_inputs(self._per_step, step).items():
            registers.write(self._prefix + name, row)
        registers.call(self._dit, self._inputs, self._outputs)
        return True


class RegisterLoop:
    """A loop over a step function (a :class:`reelforge.runtime.sampling.StepLoop`).

    Attributes:
        skipped: Steps so far for which the model was not evaluated.
    """

    def __init__(self, registers: Registers, step: StepFunction, latents: Array) -> None:
        self.skipped = 0
        self._registers = registers
        self._step = step
        registers.write("latents", latents.copy())

    def advance(self, step: int) -> None:
        """Run one step."""
        if not self._step(self._registers, step):
            self.skipped += 1
        self._registers.let("latents", "next_latents")

    def latents(self) -> Array:
        """Return the latents after the steps so far, ``[batch, C, T, H, W]``."""
        return self._registers.read("latents")

    def close(self) -> None:
        """Give back the registers."""
        self._registers.close()
