"""A step in three calls, head, body and tail of the transformer, so that a wrapper can look in after the first.

The module knows the parts' tensors by name, and neither what decides about steps (``step_cache``) nor what the parts
compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.sampling import step_inputs
from reelforge.runtime.step_cache.settings import PARTS, TOKEN_REUSE_STAGE


@dataclass(frozen=True)
class DitParts:
    """The engines of a step in parts.

    Attributes:
        head: Gives ``head_image`` and whatever the body reads.
        body: Gives ``tokens``.
        tail: Gives ``velocity`` and ``next_latents``.
        reuse: The stage ``token_reuse``; None if nothing of the body's is ever reused.
    """

    head: Engine
    body: Engine
    tail: Engine
    reuse: Engine | None = None

    @classmethod
    def of(cls, engine_of: Callable[[str], Engine], *, reuse: bool) -> DitParts:
        """Return the parts of a bundle, with ``token_reuse`` if it is needed."""
        head, body, tail = (engine_of(stage) for stage in PARTS)
        return cls(head, body, tail, engine_of(TOKEN_REUSE_STAGE) if reuse else None)


@runtime_checkable
class PartedStep(Protocol):
    """A step function that can be stopped after its head (a :class:`reelforge.runtime.step_program.StepFunction`)."""

    def __call__(self, registers: Registers, step: int) -> bool:
        """Do all of it."""
        ...

    def begin(self, registers: Registers, step: int) -> None:
        """Run the head."""
        ...

    def complete(self, registers: Registers) -> None:
        """Run body and tail of the step that was begun."""
        ...

    def from_tokens(self, registers: Registers) -> None:
        """Run the tail alone, on what the body added in the last step that was completed."""
        ...


class PartedEvaluation:
    """One evaluation of the model in parts (a :class:`PartedStep`).

    Args:
        parts: The engines.
        fixed: Inputs that all steps share.
        per_step: Inputs whose first axis is the step.
        prefix: Of the registers that hold inputs and tokens, so that two evaluations can share registers.
        velocity: The register for the velocity.
        next_latents: The register for the latents after an Euler step.
    """

    def __init__(
        self,
        parts: DitParts,
        fixed: Mapping[str, Array],
        per_step: Mapping[str, Array],
        *,
        prefix: str = "",
        velocity: str = "velocity",
        next_latents: str = "next_latents",
    ) -> None:
        self._parts = parts
        self._prefix = prefix
        read = {*parts.head.inputs, *parts.body.inputs, *parts.tail.inputs}
        self._fixed = {name: array for name, array in fixed.items() if name in read}
        self._per_step = {name: rows for name, rows in per_step.items() if name in read}
        self._outputs = {"velocity": velocity, "next_latents": next_latents}
        self._written = False

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model (see :class:`PartedStep`)."""
        self.begin(registers, step)
        self.complete(registers)
        return True

    def begin(self, registers: Registers, step: int) -> None:
        """See :class:`PartedStep`."""
        if not self._written:
            for name, array in self._fixed.items():
                registers.write(self._prefix + name, array)
            self._written = True
        for name, row in step_inputs(self._per_step, step).items():
            registers.write(self._prefix + name, row)
        head = self._parts.head
        registers.call(head, self._registers(head), {name: self._prefix + name for name in head.outputs})

    def complete(self, registers: Registers) -> None:
        """See :class:`PartedStep`."""
        body = self._parts.body
        registers.call(body, self._registers(body), {"tokens": f"{self._prefix}tokens"})
        registers.let(f"{self._prefix}computed_head_image", f"{self._prefix}head_image")
        self._finish(registers, "tokens")

    def from_tokens(self, registers: Registers) -> None:
        """See :class:`PartedStep`."""
        reuse = self._parts.reuse
        assert reuse is not None, "parts without token_reuse were asked for a step that reuses tokens"
        registers.call(reuse, self._registers(reuse), {"reused_tokens": f"{self._prefix}reused_tokens"})
        self._finish(registers, "reused_tokens")

    def _finish(self, registers: Registers, tokens: str) -> None:
        tail = self._parts.tail
        registers.call(tail, {**self._registers(tail), "tokens": self._prefix + tokens}, self._outputs)

    def _registers(self, engine: Engine) -> dict[str, str]:
        return {name: name if name == "latents" else self._prefix + name for name in engine.inputs}
