"""Classifier-free guidance: two evaluations of the model per step, of the prompt and of what to keep away from.

``v = v_negative + s (v_prompt - v_negative)`` (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022,
arXiv:2207.12598, in the form that Stable Diffusion made usual: ``s`` = 1 is no guidance). It is for checkpoints that
are not guidance-distilled; distilled ones take an embedded guidance scale and need one evaluation. The combination and
the Euler update are the bundle's stage ``guidance``, so nothing is computed here. The module does not know the model.
"""

from __future__ import annotations

import numpy as np

from reelforge.runtime.dit_parts import DitParts, PartedEvaluation
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.stage_inputs import Conditions
from reelforge.runtime.step_program import Evaluation

PROMPT = "prompt."
"""Prefix of the registers of the evaluation of the prompt."""


class GuidedEvaluation:
    """A step with two evaluations (a :class:`reelforge.runtime.step_program.StepFunction`).

    Args:
        dit: The model; gives ``velocity``.
        guidance: The engine of the stage ``guidance``: ``latents``, ``velocity``, ``negative_velocity``, ``scale``
            float32 [] and ``sigma_step`` float32 [] to ``guided_velocity`` and ``next_latents``.
        prompt: What ``dit`` is told about the prompt.
        negative: What it is told about the negative prompt.
        scale: ``s``.
    """

    def __init__(self, dit: Engine, guidance: Engine, prompt: Conditions, negative: Conditions, scale: float) -> None:
        self._guide = _Guide(guidance, scale)
        # Neither evaluation's own Euler step is wanted; the second one's latents are overwritten by the guided ones.
        self._prompt = Evaluation(dit, prompt.fixed, prompt.per_step, prefix=PROMPT, velocity=f"{PROMPT}velocity")
        self._negative = Evaluation(
            dit, negative.fixed, negative.per_step, prefix="negative.", velocity="negative.velocity"
        )

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model twice (see :class:`reelforge.runtime.step_program.StepFunction`)."""
        self._prompt(registers, step)
        self._negative(registers, step)
        self._guide(registers)
        return True


class GuidedParts:
    """A step with two evaluations in parts (a :class:`reelforge.runtime.dit_parts.PartedStep`); both skip the same.

    Args:
        parts: The model's.
        guidance: As of :class:`GuidedEvaluation`, and so are the others.
        prompt: What the model is told about the prompt.
        negative: About the negative prompt.
        scale: ``s``.
    """

    def __init__(
        self, parts: DitParts, guidance: Engine, prompt: Conditions, negative: Conditions, scale: float
    ) -> None:
        self._guide = _Guide(guidance, scale)
        self._both = tuple(
            PartedEvaluation(parts, one.fixed, one.per_step, prefix=prefix, velocity=f"{prefix}velocity")
            for prefix, one in ((PROMPT, prompt), ("negative.", negative))
        )

    def __call__(self, registers: Registers, step: int) -> bool:
        """See :class:`reelforge.runtime.dit_parts.PartedStep`."""
        self.begin(registers, step)
        self.complete(registers)
        return True

    def begin(self, registers: Registers, step: int) -> None:
        """See :class:`reelforge.runtime.dit_parts.PartedStep`."""
        for one in self._both:
            one.begin(registers, step)

    def complete(self, registers: Registers) -> None:
        """See :class:`reelforge.runtime.dit_parts.PartedStep`."""
        for one in self._both:
            one.complete(registers)
        self._guide(registers)

    def from_tokens(self, registers: Registers) -> None:
        """See :class:`reelforge.runtime.dit_parts.PartedStep`."""
        for one in self._both:
            one.from_tokens(registers)
        self._guide(registers)


class _Guide:
    """Makes the guided velocity, and the step with it, of both evaluations' velocities."""

    def __init__(self, guidance: Engine, scale: float) -> None:
        self._guidance = guidance
        self._scale = np.array(scale, np.float32)

    def __call__(self, registers: Registers) -> None:
        registers.write("scale", self._scale)
        registers.call(
            self._guidance,
            {
                "latents": "latents",
                "velocity": f"{PROMPT}velocity",
                "negative_velocity": "negative.velocity",
                "scale": "scale",
                "sigma_step": f"{PROMPT}sigma_step",
            },
            {"guided_velocity": "velocity", "next_latents": "next_latents"},
        )
