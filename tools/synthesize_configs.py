"""Configuration files of a checkpoint, from a ModelSpec, in the words of diffusers, transformers and Tencent's code.

The module knows nothing of weights or of how the files are read.
"""

from __future__ import annotations

from typing import Any

from reelforge.runtime.spec import ModelSpec
from reelforge.tools import synthesize_text as text

CLIP_LEGACY_EOS = 2  # written in OpenAI's configuration, whatever the tokenizer says

MODEL_INDEX = {
    "_class_name": "HunyuanVideoPipeline",
    "_diffusers_version": "0.32.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.32.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 7.0,
    "use_dynamic_shifting": False,
}


def transformer_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the transformer's ``config.json`` in diffusers' words."""
    dit = spec.dit
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "_diffusers_version": "0.32.0",
        "attention_head_dim": dit.head_dim,
        "guidance_embeds": dit.guidance_embedding,
        "in_channels": dit.latent_channels,
        "mlp_ratio": dit.mlp_width / dit.width,
        "num_attention_heads": dit.heads,
        "num_layers": dit.double_blocks,
        "num_refiner_layers": dit.refiner_blocks,
        "num_single_layers": dit.single_blocks,
        "out_channels": dit.latent_channels,
        "patch_size": dit.patch[1],
        "patch_size_t": dit.patch[0],
        "pooled_projection_dim": dit.pooled_width,
        "qk_norm": "rms_norm",
        "rope_axes_dim": list(dit.rope_axes),
        "rope_theta": dit.rope_theta,
        "text_embed_dim": dit.text_width,
    }


def vae_config(spec: ModelSpec, tencent: bool) -> dict[str, Any]:
    """Return the VAE's ``config.json`` in diffusers' words, or in Tencent's."""
    vae = spec.vae
    levels = len(vae.block_widths)
    shared = {
        "act_fn": "silu",
        "block_out_channels": list(vae.block_widths),
        "down_block_types": ["DownEncoderBlockCausal3D" if tencent else "HunyuanVideoDownBlock3D"] * levels,
        "in_channels": 3,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": vae.norm_groups,
        "out_channels": 3,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": ["UpDecoderBlockCausal3D" if tencent else "HunyuanVideoUpBlock3D"] * levels,
    }
    if tencent:
        sizes = {"sample_size": 256, "sample_tsize": 64, "time_compression_ratio": vae.temporal_compression}
        return {"_class_name": "AutoencoderKLCausal3D", "_diffusers_version": "0.4.2", **shared, **sizes}
    ratios = {
        "spatial_compression_ratio": vae.spatial_compression,
        "temporal_compression_ratio": vae.temporal_compression,
    }
    return {"_class_name": "AutoencoderKLHunyuanVideo", "_diffusers_version": "0.32.0", **shared, **ratios}


def llm_config(spec: ModelSpec, torch_dtype: str, architecture: str) -> dict[str, Any]:
    """Return the LLM's ``config.json``."""
    llm = spec.llm
    specials = text.llm_specials(llm)
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": specials[text.BEGIN],
        "eos_token_id": specials[text.END],
        "head_dim": llm.head_dim,
        "hidden_act": "silu",
        "hidden_size": llm.width,
        "initializer_range": 0.02,
        "intermediate_size": llm.mlp_width,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llm.heads,
        "num_hidden_layers": llm.layers,
        "num_key_value_heads": llm.kv_heads,
        "pad_token_id": specials[text.PAD],
        "rms_norm_eps": llm.norm_eps,
        "rope_scaling": None,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": llm.vocabulary,
    }


def clip_config(spec: ModelSpec, torch_dtype: str, legacy: bool) -> dict[str, Any]:
    """Return the CLIP text tower's ``config.json``; ``legacy`` writes the token ids of OpenAI's file."""
    clip = spec.clip
    specials = text.clip_specials(clip)
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0 if legacy else specials[text.CLIP_BEGIN],
        "eos_token_id": CLIP_LEGACY_EOS if legacy else specials[text.CLIP_END],
        "hidden_act": clip.activation,
        "hidden_size": clip.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": clip.mlp_width,
        "layer_norm_eps": clip.norm_eps,
        "max_position_embeddings": clip.max_tokens,
        "model_type": "clip_text_model",
        "num_attention_heads": clip.heads,
        "num_hidden_layers": clip.layers,
        "pad_token_id": 1 if legacy else specials[text.CLIP_END],
        "projection_dim": clip.width,
        "torch_dtype": torch_dtype,
        "vocab_size": clip.vocabulary,
    }


CLIP_SPECIAL_TOKENS = {
    "bos_token": text.CLIP_BEGIN,
    "eos_token": text.CLIP_END,
    "pad_token": text.CLIP_END,
    "unk_token": text.CLIP_END,
}


def llm_tokenizer_config() -> dict[str, Any]:
    """Return the LLM's ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text.BEGIN,
        "eos_token": text.END,
        "pad_token": text.PAD,
        "padding_side": "right",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }


def clip_tokenizer_config(spec: ModelSpec) -> dict[str, Any]:
    """Return CLIP's ``tokenizer_config.json``."""
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": spec.clip.max_tokens, **CLIP_SPECIAL_TOKENS}
