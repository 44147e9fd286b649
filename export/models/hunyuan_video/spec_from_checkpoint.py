"""The ModelSpec of a checkpoint: from its configurations, or from its tensors' shapes where the layout has none.

Refuses what the stages do not compute (image-to-video variants, other norms, scaled rotary positions) with the name of
the setting. The module reads no weights and knows nothing of key tables.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

from reelforge.export.checkpoint.component import Checkpoint, Component, Layout, read_json
from reelforge.runtime.codec import CodecError, from_json
from reelforge.runtime.errors import CheckpointError
from reelforge.runtime.spec import (
    ClipSpec,
    DitSpec,
    GuidanceRounding,
    LlmSpec,
    ModelSpec,
    SamplerDefaults,
    VaeSpec,
    VaeTiling,
)

FAMILY = "hunyuan_video"
NORM_EPS = 1e-6
ROPE_THETA = 256.0
SINUSOID_WIDTH = 256
MLP_RATIO = 4
MAX_TEXT_TOKENS = 256
SKIPPED_LLM_LAYERS = 2  # the state is hidden_states[-3]
LEGACY_CLIP_EOS = 2  # configurations of that time say 2 and mean the largest id
DEFAULTS = SamplerDefaults(50, 7.0, 6.0, 720, 1280, 129, 24)
TILE_PIXELS, TILE_STRIDE_PIXELS = 256, 192


class Numerics(enum.Enum):
    """Whose numbers to follow where the two implementations differ (specification 3.2, 5.2, 10)."""

    TENCENT = "tencent"
    DIFFUSERS = "diffusers"


def model_spec(checkpoint: Checkpoint, numerics: Numerics = Numerics.TENCENT) -> ModelSpec:
    """Return the numbers of ``checkpoint``.

    Args:
        checkpoint: The opened checkpoint; it needs all four components.
        numerics: Selects the rounding of the guidance value and the VAE's tiling.

    Raises:
        CheckpointError: If a component or setting is missing, or describes a model that the stages do not compute.
    """
    transformer = checkpoint.component("transformer")
    tencent_layout = checkpoint.layout is Layout.TENCENT
    dit = _dit_from_tensors(transformer) if tencent_layout else _dit_from_config(transformer)
    vae = _vae(checkpoint.component("vae"))
    llm = _llm(checkpoint.component("text_encoder"))
    clip = _clip(checkpoint.component("text_encoder_2"))
    for what, one, other in (
        ("latent channels of transformer and vae", dit.latent_channels, vae.latent_channels),
        ("text widths of transformer and text_encoder", dit.text_width, llm.width),
        ("pooled widths of transformer and text_encoder_2", dit.pooled_width, clip.width),
    ):
        if one != other:
            raise CheckpointError(
                f"in {checkpoint.path}, the {what} differ.",
                received=f"{one} and {other}",
                expected="the same number",
                fix="take all components from one checkpoint",
            )
    return ModelSpec(
        family=FAMILY,
        llm=llm,
        clip=clip,
        dit=dit,
        vae=vae,
        tiling=_tiling(vae, numerics),
        guidance_rounding=GuidanceRounding.BF16 if numerics is Numerics.TENCENT else GuidanceRounding.NONE,
        defaults=_defaults(checkpoint),
    )


class _Config:
    """A component's configuration, with errors that name the file and the setting."""

    def __init__(self, component: Component, inner: str | None = None) -> None:
        self.where = f"the configuration of {component.name} ({component.where})"
        if component.config is None:
            raise CheckpointError(
                f"{component.name} in {component.where} has no config.json.", fix="download it next to the weights"
            )
        values: Any = component.config.get(inner, component.config) if inner else component.config
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}

    def number(self, name: str, default: float | None = None) -> Any:
        """Return a number; without a default it must be there."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error(name, value, "a number above zero")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number above zero."""
        value = self.number(name, default)
        if not isinstance(value, int):
            raise self.error(name, value, "a whole number above zero")
        return value

    def counts(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a list of whole numbers above zero."""
        value = self.values.get(name, default)
        if (
            not isinstance(value, list | tuple)
            or not value
            or not all(type(item) is int and item > 0 for item in value)
        ):
            raise self.error(name, value, "a list of whole numbers above zero")
        return tuple(value)

    def require(self, name: str, *allowed: object, absent_is_fine: bool = True) -> None:
        """Refuse any value of ``name`` but the ``allowed`` ones."""
        if name not in self.values and absent_is_fine:
            return
        if self.values.get(name) not in allowed:
            raise self.error(name, self.values.get(name), " or ".join(repr(value) for value in allowed))

    def error(self, name: str, received: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} has a setting that reelforge does not compute: {name}.",
            received=repr(received),
            expected=expected,
            fix="use a HunyuanVideo text-to-video checkpoint with its own configuration",
        )


def _dit_from_config(component: Component) -> DitSpec:
    config = _Config(component)
    config.require("_class_name", "HunyuanVideoTransformer3DModel")
    config.require("image_condition_type", None)
    config.require("qk_norm", "rms_norm")
    channels = config.count("in_channels", 16)
    config.require("out_channels", channels, absent_is_fine=channels == 16)
    # The token refiner of diffusers is four times as wide whatever the setting says: no other ratio fits one number.
    config.require("mlp_ratio", MLP_RATIO)
    heads, head_dim = config.count("num_attention_heads", 24), config.count("attention_head_dim", 128)
    axes = config.counts("rope_axes_dim", (16, 56, 56))
    if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise config.error("rope_axes_dim", list(axes), f"three even numbers that sum to {head_dim}")
    guidance = config.values.get("guidance_embeds", True)
    if not isinstance(guidance, bool):
        raise config.error("guidance_embeds", guidance, "true or false")
    patch = config.count("patch_size", 2)
    return DitSpec(
        width=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        double_blocks=config.count("num_layers", 20),
        single_blocks=config.count("num_single_layers", 40),
        refiner_blocks=config.count("num_refiner_layers", 2),
        mlp_width=heads * head_dim * MLP_RATIO,
        latent_channels=channels,
        patch=(config.count("patch_size_t", 1), patch, patch),
        text_width=config.count("text_embed_dim", 4096),
        pooled_width=config.count("pooled_projection_dim", 768),
        rope_axes=(axes[0], axes[1], axes[2]),
        rope_theta=float(config.number("rope_theta", ROPE_THETA)),
        sinusoid_width=SINUSOID_WIDTH,
        norm_eps=NORM_EPS,
        guidance_embedding=guidance,
    )


def _dit_from_tensors(component: Component) -> DitSpec:
    """Return the transformer's numbers from the shapes of Tencent's tensors and the published constants."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        ref = component.tensors.get(key)
        if ref is None or len(ref.shape) != dimensions or 0 in ref.shape:
            raise CheckpointError(
                f"the transformer in {component.where} has no usable tensor {key!r}, which tells its size.",
                received="nothing" if ref is None else list(ref.shape),
                expected=f"{dimensions} dimensions",
                fix="check that the checkpoint is complete",
            )
        return ref.shape

    def blocks(prefix: str) -> int:
        numbers = {key.removeprefix(prefix).split(".")[0] for key in component.tensors if key.startswith(prefix)}
        return len(numbers)

    width, channels, *patch = shape("img_in.proj.weight", 5)
    (head_dim,) = shape("double_blocks.0.img_attn_q_norm.weight", 1)
    outputs = shape("final_layer.linear.weight", 2)[0]
    if outputs != channels * math.prod(patch):
        raise CheckpointError(
            f"the transformer in {component.where} takes and gives different numbers of channels.",
            received=f"{channels} in, {outputs / math.prod(patch):g} out",
            expected="the same number; an image-to-video model takes more",
            fix="use the text-to-video checkpoint",
        )
    if width % head_dim or head_dim % 32:  # the three rotary axes take even parts of 2:7:7
        raise CheckpointError(
            f"the transformer in {component.where} has heads of an unexpected size.",
            received=f"width {width}, heads of {head_dim}",
            expected="heads of a multiple of 32 that divides the width",
            fix="use a HunyuanVideo text-to-video checkpoint",
        )
    return DitSpec(
        width=width,
        heads=width // head_dim,
        head_dim=head_dim,
        double_blocks=blocks("double_blocks."),
        single_blocks=blocks("single_blocks."),
        refiner_blocks=blocks("txt_in.individual_token_refiner.blocks."),
        mlp_width=shape("double_blocks.0.img_mlp.fc1.weight", 2)[0],
        latent_channels=channels,
        patch=(patch[0], patch[1], patch[2]),
        text_width=shape("txt_in.input_embedder.weight", 2)[1],
        pooled_width=shape("vector_in.in_layer.weight", 2)[1],
        rope_axes=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        rope_theta=ROPE_THETA,
        sinusoid_width=shape("time_in.mlp.0.weight", 2)[1],
        norm_eps=NORM_EPS,
        guidance_embedding="guidance_in.mlp.0.weight" in component.tensors,
    )


def _vae(component: Component) -> VaeSpec:
    config = _Config(component)
    config.require("_class_name", "AutoencoderKLHunyuanVideo", "AutoencoderKLCausal3D")
    config.require("act_fn", "silu")
    config.require("mid_block_add_attention", True)
    config.require("out_channels", 3)
    config.require("shift_factor", None, 0, 0.0)
    spatial = config.count("spatial_compression_ratio", 8)
    temporal = config.count("temporal_compression_ratio", config.count("time_compression_ratio", 4))
    widths = config.counts("block_out_channels", (128, 256, 512, 512))
    if (spatial, temporal, len(widths)) != (8, 4, 4):
        raise config.error(
            "block_out_channels and compression ratios", (widths, spatial, temporal), "four widths, ratios 8 and 4"
        )
    return VaeSpec(
        latent_channels=config.count("latent_channels", 16),
        block_widths=widths,
        layers_per_block=config.count("layers_per_block", 2),
        norm_groups=config.count("norm_num_groups", 32),
        norm_eps=NORM_EPS,
        scaling_factor=float(config.number("scaling_factor", 0.476986)),
        spatial_compression=spatial,
        temporal_compression=temporal,
    )


def _tiling(vae: VaeSpec, numerics: Numerics) -> VaeTiling:
    """Return the tiles in latents; the sizes in pixels and frames are constants of both implementations."""
    tile, stride = TILE_PIXELS // vae.spatial_compression, TILE_STRIDE_PIXELS // vae.spatial_compression
    if numerics is Numerics.TENCENT:
        return VaeTiling(tile, stride, frame_window=16, frame_stride=12)
    return VaeTiling(
        tile, stride, frame_window=16 // vae.temporal_compression, frame_stride=12 // vae.temporal_compression
    )


def _llm(component: Component) -> LlmSpec:
    config = _Config(component, inner="text_config")  # LLaVA nests it, and leaves out LLaMA's defaults
    config.require("model_type", "llama")
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    config.require("rope_scaling", None)
    rope = config.values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise config.error("rope_parameters", rope, "the default rope_type")
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise config.error("rope_theta", theta, "a number above zero")
    width, heads = config.count("hidden_size", 4096), config.count("num_attention_heads", 32)
    layers = config.count("num_hidden_layers", 32)
    if layers <= SKIPPED_LLM_LAYERS:
        raise config.error("num_hidden_layers", layers, f"more than {SKIPPED_LLM_LAYERS}")
    head_dim = config.values.get("head_dim")
    return LlmSpec(
        width=width,
        layers=layers,
        used_layers=layers - SKIPPED_LLM_LAYERS,
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=width // heads if head_dim is None else config.count("head_dim"),
        mlp_width=config.count("intermediate_size", 11008),
        vocabulary=config.count("vocab_size", 32000),
        rope_theta=float(theta),
        norm_eps=float(config.number("rms_norm_eps", 1e-6)),
        max_text_tokens=MAX_TEXT_TOKENS,
    )


def _clip(component: Component) -> ClipSpec:
    config = _Config(component, inner="text_config")  # the whole of CLIP nests its text tower
    config.require("model_type", "clip_text_model", "clip")
    config.require("hidden_act", "quick_gelu", "gelu")
    vocabulary = config.count("vocab_size", 49408)
    eos = config.count("eos_token_id", LEGACY_CLIP_EOS)
    return ClipSpec(
        width=config.count("hidden_size", 512),
        layers=config.count("num_hidden_layers", 12),
        heads=config.count("num_attention_heads", 8),
        mlp_width=config.count("intermediate_size", 2048),
        vocabulary=vocabulary,
        max_tokens=config.count("max_position_embeddings", 77),
        norm_eps=float(config.number("layer_norm_eps", 1e-5)),
        activation=str(config.values.get("hidden_act", "quick_gelu")),
        eos_token=vocabulary - 1 if eos == LEGACY_CLIP_EOS else eos,
    )


def _defaults(checkpoint: Checkpoint) -> SamplerDefaults:
    path = checkpoint.sampling_defaults
    if path is not None:
        try:
            return from_json(SamplerDefaults, read_json(path))
        except CodecError as error:
            raise CheckpointError(
                f"{path} cannot be used.",
                received=str(error),
                expected="the fields of SamplerDefaults",
                fix="correct it",
            ) from error
    shift = (checkpoint.scheduler or {}).get("shift", DEFAULTS.shift)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or shift <= 0:
        raise CheckpointError(
            f"the scheduler's configuration in {checkpoint.path} has no usable shift.",
            received=repr(shift),
            expected="a number above zero",
            fix="restore scheduler/scheduler_config.json",
        )
    return SamplerDefaults(**{**vars(DEFAULTS), "shift": float(shift)})
