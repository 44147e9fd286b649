"""The stages of step caching: how much the velocity will have changed, and a step that reuses earlier velocities.

Elementwise arithmetic and means over latents, compiled so that the runtime computes nothing between engines. EasyCache
(arXiv 2507.02860) needs ``step_change`` and ``step_reuse``, MagCache (arXiv 2506.09045) the latter, and ``step_change``
to measure its ratios; TeaCache (arXiv 2411.19108) looks at what the first block is given, so that ``input_change`` has
the patch embedding of ``dit``. What decides about steps is in ``runtime.step_cache``.

Letters: ``B`` batch, ``C`` channels, ``T`` ``H`` ``W`` latent grid; ``x`` latents, ``v`` velocities; steps ``i``, the
last computed one ``c``, and ``e`` the computed one before it.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from reelforge.export.models.hunyuan_video.dit import to_patches
from reelforge.export.models.hunyuan_video.layers import modulate
from reelforge.export.stage import Part, Stage, Value
from reelforge.runtime.spec import DitSpec, ModelSpec


class StepChange(nn.Module):
    """What both methods ask about the last computed steps."""

    def forward(
        self,
        latents: Tensor,
        previous_latents: Tensor,
        computed_latents: Tensor,
        velocity: Tensor,
        earlier_latents: Tensor,
        earlier_velocity: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(predicted_change, residual_ratio)``, both fp32 [].

        ``predicted_change`` is EasyCache's ``k |x_i - x_{i-1}| / |v_c|`` with ``k = |v_c - v_e| / |x_c - x_e|``, where
        ``|.|`` is the mean of absolute values. ``residual_ratio`` is MagCache's mean over positions of
        ``|v_c - x_c| / |v_e - x_e|``, where ``|.|`` is the norm over channels.

        Args:
            latents: ``x_i``, fp32 [B, C, T, H, W], and so are all.
            previous_latents: ``x_{i-1}``.
            computed_latents: ``x_c``.
            velocity: ``v_c``.
            earlier_latents: ``x_e``.
            earlier_velocity: ``v_e``.
        """
        rate = (velocity - earlier_velocity).abs().mean() / (computed_latents - earlier_latents).abs().mean()
        change = rate * (latents - previous_latents).abs().mean() / velocity.abs().mean()
        residual, earlier = velocity - computed_latents, earlier_velocity - earlier_latents
        ratios = (residual * residual).sum(dim=1).sqrt() / (earlier * earlier).sum(dim=1).sqrt()
        return change, ratios.mean()


class StepReuse(nn.Module):
    """An Euler step with ``v_c + residual_weight (x_i - x_c) + trend_weight (v_c - v_e)``."""

    def forward(
        self,
        latents: Tensor,
        computed_latents: Tensor,
        velocity: Tensor,
        earlier_velocity: Tensor,
        residual_weight: Tensor,
        trend_weight: Tensor,
        sigma_step: Tensor,
    ) -> Tensor:
        """Return ``next_latents``, fp32 [B, C, T, H, W].

        Args:
            latents: ``x_i``, fp32 [B, C, T, H, W].
            computed_latents: ``x_c``.
            velocity: ``v_c``.
            earlier_velocity: ``v_e``.
            residual_weight: fp32 []; 1 keeps the residual ``v - x``, as both papers do, and 0 the velocity.
            trend_weight: fp32 []; ``(sigma_i - sigma_c) / (sigma_c - sigma_e)`` continues the velocity's line.
            sigma_step: fp32 [].
        """
        reused = (
            velocity + residual_weight * (latents - computed_latents) + trend_weight * (velocity - earlier_velocity)
        )
        return latents + sigma_step * reused


class InputChange(nn.Module):
    """How far what the first block's image stream is given has moved in one step: TeaCache's measure."""

    def __init__(self, spec: DitSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        features = spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
        self.patch_embed = nn.Linear(features, spec.width)
        self.eps = spec.norm_eps

    def forward(
        self, latents: Tensor, previous_latents: Tensor, modulation: Tensor, previous_modulation: Tensor
    ) -> Tensor:
        """Return ``|f_i - f_{i-1}| / |f_{i-1}|``, fp32 [], where ``|.|`` is the mean of absolute values.

        ``f`` are the embedded patches of the latents, normalised and modulated as the first double block does it
        before its attention (TeaCache, equation 6; the order of tokens means nothing to a mean).

        Args:
            latents: ``x_i``, fp32 [B, C, T, H, W].
            previous_latents: ``x_{i-1}``.
            modulation: The first double block's at step ``i``, fp32 [B, 2, 6, D] as in ``dit``.
            previous_modulation: At step ``i - 1``.
        """
        before = self._given(previous_latents, previous_modulation)
        return (self._given(latents, modulation) - before).abs().mean() / before.abs().mean()

    def _given(self, latents: Tensor, modulation: Tensor) -> Tensor:
        tokens = self.patch_embed(to_patches(latents, self.patch).to(self.patch_embed.weight.dtype))
        return modulate(tokens, modulation[:, 0, 0:1], modulation[:, 0, 1:2], self.eps).float()


def step_cache_stages(spec: ModelSpec, batch: int, tolerance: dict[str, float]) -> tuple[Stage, ...]:
    """Return ``step_change``, ``step_reuse`` and ``input_change`` for a model of the given size."""
    videos: int | str = 1 if batch == 1 else "batch"
    channels = spec.dit.latent_channels
    latents = Value("float32", (videos, channels, "latent_frames", "latent_height", "latent_width"))
    scalar = Value("float32", ())
    tensors = ("latents", "previous_latents", "computed_latents", "velocity", "earlier_latents", "earlier_velocity")
    measures = ("predicted_change", "residual_ratio")
    change = Stage(
        name="step_change",
        component="transformer",
        parts=(Part("", StepChange, tensors, measures),),
        values={**dict.fromkeys(tensors, latents), **dict.fromkeys(measures, scalar)},
        inputs=tensors,
        outputs=measures,
        tolerance=tolerance,
    )
    reused = ("latents", "computed_latents", "velocity", "earlier_velocity")
    weights = ("residual_weight", "trend_weight", "sigma_step")
    reuse = Stage(
        name="step_reuse",
        component="transformer",
        parts=(Part("", StepReuse, (*reused, *weights), ("next_latents",)),),
        values={**dict.fromkeys((*reused, "next_latents"), latents), **dict.fromkeys(weights, scalar)},
        inputs=(*reused, *weights),
        outputs=("next_latents",),
        tolerance=tolerance,
    )
    modulation = Value("float32", (videos, spec.dit.double_blocks, 2, 6, spec.dit.width))
    given = ("latents", "previous_latents", "double_modulation", "previous_modulation")
    first_block = (*given[:2], "double_modulation[i]", "previous_modulation[i]")
    moved = Stage(
        name="input_change",
        component="transformer",
        parts=(Part("", partial(InputChange, spec.dit), first_block, ("input_change",)),),
        values={**dict.fromkeys(given[:2], latents), **dict.fromkeys(given[2:], modulation), "input_change": scalar},
        inputs=given,
        outputs=("input_change",),
        tolerance=tolerance,
        weights_of="dit",
    )
    return change, reuse, moved
