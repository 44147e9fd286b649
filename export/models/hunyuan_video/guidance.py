"""The stage ``guidance``: two velocities become one, and the latents take the Euler step with it.

No parameters: it is what a sampling step with classifier-free guidance does after its two evaluations, compiled so that
the runtime does no arithmetic between engines. Specification 4.

Letters: ``B`` batch, ``C`` channels, ``T`` ``H`` ``W`` latent grid.
"""

from __future__ import annotations

from torch import Tensor, nn

from reelforge.export.stage import Part, Stage, Value
from reelforge.runtime.spec import ModelSpec


class Guidance(nn.Module):
    """``v = v_negative + scale (v_prompt - v_negative)``, ``x + sigma_step v``."""

    def forward(
        self, latents: Tensor, velocity: Tensor, negative_velocity: Tensor, scale: Tensor, sigma_step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the guided velocity and the next latents.

        Args:
            latents: float32 ``[B, C, T, H, W]``.
            velocity: Likewise, of the prompt.
            negative_velocity: Likewise, of the negative prompt.
            scale: float32 ``[]``.
            sigma_step: float32 ``[]``.
        """
        guided = negative_velocity + scale * (velocity - negative_velocity)
        return guided, latents + sigma_step * guided


def guidance_stage(spec: ModelSpec, batch: int, tolerance: dict[str, float]) -> Stage:
    """Return the stage for a model of the given size."""
    videos: int | str = 1 if batch == 1 else "batch"
    channels = spec.dit.latent_channels
    latents = Value("float32", (videos, channels, "latent_frames", "latent_height", "latent_width"))
    scalar = Value("float32", ())
    inputs = ("latents", "velocity", "negative_velocity", "scale", "sigma_step")
    outputs = ("guided_velocity", "next_latents")
    tensors = dict.fromkeys((*inputs[:3], *outputs), latents)
    return Stage(
        name="guidance",
        component="transformer",
        parts=(Part("", Guidance, inputs, outputs),),
        values={**tensors, "scale": scalar, "sigma_step": scalar},
        inputs=inputs,
        outputs=outputs,
        tolerance=tolerance,
    )
