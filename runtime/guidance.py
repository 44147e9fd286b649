"""Classifier-free guidance: two evaluations of the model per step, of the prompt and of what to keep away from.

``v = v_negative + s (v_prompt - v_negative)`` (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022,
arXiv:2207.12598, in the form that Stable Diffusion made usual: ``s`` = 1 is no guidance). It is for checkpoints that
are not guidance-distilled; distilled ones take an embedded guidance scale and need one evaluation. The combination and
the Euler update are the bundle's stage ``guidance``, so nothing is computed here. The module does not know the model.
"""

from __future__ import annotations

import numpy as np

from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.stage_inputs import Conditions
from reelforge.runtime.step_program import Evaluation


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
        self._guidance = guidance
        self._scale = np.array(scale, np.float32)
        # Neither evaluation's own Euler step is wanted; the second one's latents are overwritten by the guided ones.
        self._prompt = Evaluation(dit, prompt.fixed, prompt.per_step, prefix="prompt.", velocity="prompt.velocity")
        self._negative = Evaluation(
            dit, negative.fixed, negative.per_step, prefix="negative.", velocity="negative.velocity"
        )

    def __call__(self, registers: Registers, step: int) -> bool:
        """Evaluate the model twice (see :class:`reelforge.runtime.step_program.StepFunction`)."""
        self._prompt(registers, step)
        self._negative(registers, step)
        registers.write("scale", self._scale)
        registers.call(
            self._guidance,
            {
                "latents": "latents",
                "velocity": "prompt.velocity",
                "negative_velocity": "negative.velocity",
                "scale": "scale",
                "sigma_step": "prompt.sigma_step",
            },
            {"guided_velocity": "velocity", "next_latents": "next_latents"},
        )
        return True
