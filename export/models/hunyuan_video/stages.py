"""The stages of HunyuanVideo as data: which parts, which values flow between them, which dimensions are dynamic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from reelforge.export.models.hunyuan_video.conditioning import (
    ConditioningVector,
    DoubleModulation,
    LinearModulation,
    RefinerBlock,
    RefinerEmbedding,
    RefinerOutput,
)
from reelforge.export.models.hunyuan_video.dit import (
    DoubleBlock,
    FinalLayer,
    JoinStreams,
    KeyLengths,
    PatchEmbedding,
    SingleBlock,
)
from reelforge.export.models.hunyuan_video.dit_sparse import SparseDoubleBlock, SparseSingleBlock
from reelforge.export.models.hunyuan_video.guidance import guidance_stage
from reelforge.export.models.hunyuan_video.parted import parted_stages
from reelforge.export.models.hunyuan_video.step_cache import step_cache_stages
from reelforge.export.models.hunyuan_video.text_encoders import (
    ClipEmbedding,
    ClipLayer,
    ClipPooled,
    Float32Output,
    LlamaEmbedding,
    LlamaLayer,
)
from reelforge.export.models.hunyuan_video.vae_decoder import VaeDecoder
from reelforge.export.stage import COMPUTE, Part, Stage, Value
from reelforge.runtime.recipe import SparseAttention, SparseKind
from reelforge.runtime.spec import ModelSpec

STAGE_NAMES = (
    "llm",
    "clip",
    "refiner",
    "modulation",
    "dit",
    "guidance",
    "step_change",
    "step_reuse",
    "input_change",
    "vae_decoder",
)
# Largest absolute difference from an independent fp32 implementation at output scale 1-4. fp32: re-association of sums
# only. fp16: 11-bit products through up to 60 residual blocks; measured on random weights, with a factor of two in
# hand.
_TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2}
# bf16: 8-bit products; in it the demonstration checkpoint's decoder is 3.4e-2 off at most (fp16: 5e-3).
_VAE_TOLERANCE = {**_TOLERANCE, "bf16": 1e-1}


def hunyuan_video_stages(
    spec: ModelSpec, batch: int = 1, sparse: SparseAttention | None = None, parted: bool = False
) -> tuple[Stage, ...]:
    """Return the stages of a HunyuanVideo of the given size.

    Args:
        spec: The model's numbers.
        batch: Largest number of videos per call of ``dit``; above one it takes ``text_lengths`` and masks keys.
        sparse: How the attention of ``dit`` leaves out keys; only for one video per call.
        parted: Whether there are head, body and tail of ``dit`` too; not with sparse attention.
    """
    dit = _dit(spec, batch) if sparse is None else _sparse_dit(spec, sparse)
    guidance = guidance_stage(spec, batch, _TOLERANCE)
    caching = step_cache_stages(spec, batch, _TOLERANCE)
    looped = (dit, guidance, *caching, *(parted_stages(spec, dit) if parted else ()))
    return (_llm(spec), _clip(spec), _refiner(spec), _modulation(spec), *looped, _vae_decoder(spec))


def _llm(spec: ModelSpec) -> Stage:
    llm = spec.llm
    states = Value(COMPUTE, ("batch", "prompt_tokens", llm.width))
    rotary = Value(COMPUTE, (1, "prompt_tokens", llm.head_dim))
    return Stage(
        name="llm",
        component="text_encoder",
        parts=(
            Part("", partial(LlamaEmbedding, llm), ("input_ids",), ("states", "cos", "sin")),
            Part("layers.{i}", partial(LlamaLayer, llm), ("states", "cos", "sin"), ("states",), llm.used_layers),
            Part("", Float32Output, ("states",), ("prompt_states",)),
        ),
        values={
            "input_ids": Value("int64", ("batch", "prompt_tokens")),
            "states": states,
            "cos": rotary,
            "sin": rotary,
            "prompt_states": Value("float32", states.shape),
        },
        inputs=("input_ids",),
        outputs=("prompt_states",),
        tolerance=_TOLERANCE,
    )


def _clip(spec: ModelSpec) -> Stage:
    clip = spec.clip
    return Stage(
        name="clip",
        component="text_encoder_2",
        parts=(
            Part("embeddings", partial(ClipEmbedding, clip), ("clip_ids",), ("states",)),
            Part("encoder.layers.{i}", partial(ClipLayer, clip), ("states",), ("states",), clip.layers),
            Part("", partial(ClipPooled, clip), ("states",), ("pooled_text",)),
        ),
        values={
            "clip_ids": Value("int64", ("batch", "clip_tokens")),
            "states": Value(COMPUTE, ("batch", "clip_tokens", clip.width)),
            "pooled_text": Value("float32", ("batch", clip.width)),
        },
        inputs=("clip_ids",),
        outputs=("pooled_text",),
        tolerance=_TOLERANCE,
    )


def _refiner(spec: ModelSpec) -> Stage:
    dit = spec.dit
    tokens = Value(COMPUTE, ("steps", "text_tokens", dit.width))
    return Stage(
        name="refiner",
        component="transformer",
        parts=(
            Part("", partial(RefinerEmbedding, dit), ("text_states", "timestep_embedding"), ("tokens", "vector")),
            Part("blocks.{i}", partial(RefinerBlock, dit), ("tokens", "vector"), ("tokens",), dit.refiner_blocks),
            Part("", RefinerOutput, ("tokens",), ("text",)),
        ),
        values={
            "text_states": Value("float32", (1, "text_tokens", dit.text_width)),
            "timestep_embedding": Value("float32", ("steps", dit.sinusoid_width)),
            "tokens": tokens,
            "vector": Value(COMPUTE, ("steps", dit.width)),
            "text": Value("float32", tokens.shape),
        },
        inputs=("text_states", "timestep_embedding"),
        outputs=("text",),
        tolerance=_TOLERANCE,
    )


def _modulation(spec: ModelSpec) -> Stage:
    dit = spec.dit
    inputs = ("timestep_embedding", "pooled_text", *(("guidance_embedding",) if dit.guidance_embedding else ()))
    vector = ("vector",)
    return Stage(
        name="modulation",
        component="transformer",
        parts=(
            Part("", partial(ConditioningVector, dit), inputs, vector),
            Part("double.{i}", partial(DoubleModulation, dit), vector, ("double_modulation[i]",), dit.double_blocks),
            Part("single.{i}", partial(LinearModulation, dit, 3), vector, ("single_modulation[i]",), dit.single_blocks),
            Part("final", partial(LinearModulation, dit, 2), vector, ("final_modulation",)),
        ),
        values={
            "timestep_embedding": Value("float32", ("steps", dit.sinusoid_width)),
            "pooled_text": Value("float32", (1, dit.pooled_width)),
            "guidance_embedding": Value("float32", (1, dit.sinusoid_width)),
            "vector": Value(COMPUTE, ("steps", dit.width)),
            "double_modulation": Value("float32", ("steps", dit.double_blocks, 2, 6, dit.width)),
            "single_modulation": Value("float32", ("steps", dit.single_blocks, 3, dit.width)),
            "final_modulation": Value("float32", ("steps", 2, dit.width)),
        },
        inputs=inputs,
        outputs=("double_modulation", "single_modulation", "final_modulation"),
        tolerance=_TOLERANCE,
    )


def _dit(spec: ModelSpec, batch: int) -> Stage:
    dit = spec.dit
    videos: int | str = 1 if batch == 1 else "batch"
    ragged = () if batch == 1 else ("key_lengths",)
    latents = Value("float32", (videos, dit.latent_channels, "latent_frames", "latent_height", "latent_width"))
    rope = Value("float32", ("image_tokens", dit.head_dim // 2))
    joint_rope = Value("float32", ("joint_tokens", dit.head_dim // 2))
    shared = ("joint_cos", "joint_sin", *ragged)
    key_lengths = Part("", KeyLengths, ("image", "text_lengths"), ("key_lengths",))
    return Stage(
        name="dit",
        component="transformer",
        parts=(
            Part(
                "",
                partial(PatchEmbedding, dit),
                ("latents", "text", "rope_cos", "rope_sin"),
                ("image", "text_stream", "joint_cos", "joint_sin"),
            ),
            *((key_lengths,) if ragged else ()),
            Part(
                "double.{i}",
                partial(DoubleBlock, dit),
                ("image", "text_stream", "double_modulation[i]", *shared),
                ("image", "text_stream"),
                dit.double_blocks,
            ),
            Part("", JoinStreams, ("image", "text_stream"), ("joint",)),
            Part(
                "single.{i}",
                partial(SingleBlock, dit),
                ("joint", "single_modulation[i]", *shared),
                ("joint",),
                dit.single_blocks,
            ),
            Part(
                "final",
                partial(FinalLayer, dit),
                ("joint", "final_modulation", "latents", "sigma_step"),
                ("velocity", "next_latents"),
            ),
        ),
        values={
            "latents": latents,
            "text": Value("float32", (videos, "text_tokens", dit.width)),
            "double_modulation": Value("float32", (videos, dit.double_blocks, 2, 6, dit.width)),
            "single_modulation": Value("float32", (videos, dit.single_blocks, 3, dit.width)),
            "final_modulation": Value("float32", (videos, 2, dit.width)),
            "rope_cos": rope,
            "rope_sin": rope,
            "sigma_step": Value("float32", ()),
            "text_lengths": Value("int64", (videos,)),
            "image": Value(COMPUTE, (videos, "image_tokens", dit.width)),
            "text_stream": Value(COMPUTE, (videos, "text_tokens", dit.width)),
            "joint_cos": joint_rope,
            "joint_sin": joint_rope,
            "key_lengths": Value("int64", (videos,)),
            "joint": Value(COMPUTE, (videos, "joint_tokens", dit.width)),
            "velocity": latents,
            "next_latents": latents,
        },
        inputs=(
            "latents",
            "text",
            "double_modulation",
            "single_modulation",
            "final_modulation",
            "rope_cos",
            "rope_sin",
            "sigma_step",
            *(("text_lengths",) if ragged else ()),
        ),
        outputs=("velocity", "next_latents"),
        tolerance=_TOLERANCE,
    )


def _sparse_dit(spec: ModelSpec, sparse: SparseAttention) -> Stage:
    """Return ``dit`` with tokens in the order that a request asks for, and an attention that leaves out keys."""
    dense, dit = _dit(spec, 1), spec.dit
    order = {"token_gather": Value("int64", ("image_slots",)), "token_scatter": Value("int64", ("image_tokens",))}
    choice = {
        SparseKind.LISTS: {
            "block_index": Value("int32", ("block_entries",)),
            "block_start": Value("int32", (dit.heads, "block_starts")),
        },
        SparseKind.TOP_K: {"token_gather": order["token_gather"], "kept_blocks": Value("int64", ())},
    }
    attention = {**choice[sparse.kind], "block_keys": Value("int32", (1, "key_blocks"))}
    rope = Value("float32", ("image_slots", dit.head_dim // 2))
    joint_rope = Value("float32", ("joint_slots", dit.head_dim // 2))
    changed = {
        **order,
        **attention,
        "rope_cos": rope,
        "rope_sin": rope,
        "joint_cos": joint_rope,
        "joint_sin": joint_rope,
        "image": Value(COMPUTE, (1, "image_slots", dit.width)),
        "joint": Value(COMPUTE, (1, "joint_slots", dit.width)),
    }
    changes: dict[str, tuple[partial[nn.Module], tuple[str, ...]]] = {
        "PatchEmbedding": (partial(PatchEmbedding, dit), ("token_gather",)),
        "DoubleBlock": (partial(SparseDoubleBlock, dit, sparse), tuple(attention)),
        "SingleBlock": (partial(SparseSingleBlock, dit, sparse), tuple(attention)),
        "FinalLayer": (partial(FinalLayer, dit), ("token_scatter",)),
    }
    parts = []
    for part in dense.parts:
        build, inputs = changes.get(part.label, (part.build, ()))
        parts.append(replace(part, build=build, inputs=(*part.inputs, *inputs)))
    return replace(
        dense,
        parts=tuple(parts),
        values={**dense.values, **changed},
        inputs=(*dense.inputs, *dict.fromkeys((*order, *attention))),
    )


def _vae_decoder(spec: ModelSpec) -> Stage:
    return Stage(
        name="vae_decoder",
        component="vae",
        parts=(Part("", partial(VaeDecoder, spec.vae), ("latent_tile",), ("frame_tile",)),),
        values={
            "latent_tile": Value("float32", (1, spec.vae.latent_channels, "tile_frames", "tile_height", "tile_width")),
            "frame_tile": Value("float32", (1, 3, "video_frames", "video_height", "video_width")),
        },
        inputs=("latent_tile",),
        outputs=("frame_tile",),
        tolerance=_VAE_TOLERANCE,
    )
