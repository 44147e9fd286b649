"""ModelSpec: the frozen numbers of one model family and size.

Everything that differs between two checkpoints of the same architecture is a number here, so that neither the compiler
nor the runtime asks which model it serves. The module knows no file formats and no arithmetic.

Dimension letters used across the project: ``B`` batch, ``C`` channels, ``T`` latent frames, ``H`` ``W`` latent grid,
``N`` image tokens, ``L`` text tokens, ``S = N + L``, ``D`` width.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GuidanceRounding(enum.Enum):
    """How ``guidance_scale * 1000`` is rounded before its sinusoid (specification 3.2)."""

    BF16 = "bf16"
    NONE = "none"


@dataclass(frozen=True)
class LlmSpec:
    """A LLaMA decoder used as text encoder; its state after ``used_layers`` of ``layers`` layers is the text."""

    width: int
    layers: int
    used_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    rope_theta: float
    norm_eps: float
    max_text_tokens: int  # kept after the template's prefix is cropped


@dataclass(frozen=True)
class ClipSpec:
    """A CLIP text tower; its pooled output is the final-norm state at the first end-of-text token."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    max_tokens: int
    norm_eps: float
    activation: str
    eos_token: int


@dataclass(frozen=True)
class DitSpec:
    """The diffusion transformer with its token refiner and conditioning (specification 3.1)."""

    width: int
    heads: int
    head_dim: int
    double_blocks: int
    single_blocks: int
    refiner_blocks: int
    mlp_width: int
    latent_channels: int
    patch: tuple[int, int, int]
    text_width: int
    pooled_width: int
    rope_axes: tuple[int, int, int]
    rope_theta: float
    sinusoid_width: int
    norm_eps: float
    guidance_embedding: bool


@dataclass(frozen=True)
class VaeSpec:
    """The decoder half of the causal 3D VAE (specification 5.1)."""

    latent_channels: int
    block_widths: tuple[int, ...]  # from the pixels inwards, as in the checkpoint's configuration
    layers_per_block: int  # of the encoder; the decoder has one more
    norm_groups: int
    norm_eps: float
    scaling_factor: float
    spatial_compression: int
    temporal_compression: int


@dataclass(frozen=True)
class VaeTiling:
    """Tiles of the decoder, in latents. Part of the numeric definition: GroupNorm sees whole tiles (specification 5.2).

    Spatial tiles start at multiples of ``stride`` and are up to ``tile`` wide; temporal tiles start at multiples of
    ``frame_stride`` and hold up to ``frame_window + 1`` latent frames.
    """

    tile: int
    stride: int
    frame_window: int
    frame_stride: int


@dataclass(frozen=True)
class SamplerDefaults:
    """What a request gets when it does not say otherwise (specification 4)."""

    steps: int
    shift: float
    guidance: float
    height: int
    width: int
    frames: int
    frames_per_second: int


@dataclass(frozen=True)
class ModelSpec:
    """Frozen numbers of one model family and size."""

    family: str
    llm: LlmSpec
    clip: ClipSpec
    dit: DitSpec
    vae: VaeSpec
    tiling: VaeTiling
    guidance_rounding: GuidanceRounding
    defaults: SamplerDefaults

    @property
    def pixel_multiple(self) -> int:
        """Height and width of a video must be multiples of this many pixels."""
        return self.vae.spatial_compression * self.dit.patch[1]

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """Return ``(C, T, H, W)`` of the latents of a video of ``frames`` x ``height`` x ``width`` pixels."""
        return (
            self.dit.latent_channels,
            (frames - 1) // self.vae.temporal_compression + 1,
            height // self.vae.spatial_compression,
            width // self.vae.spatial_compression,
        )

    def token_grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Return the grid ``(T, H, W)`` of image tokens of such a video."""
        _, t, h, w = self.latent_shape(height, width, frames)
        return t // self.dit.patch[0], h // self.dit.patch[1], w // self.dit.patch[2]
