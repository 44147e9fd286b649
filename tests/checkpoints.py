"""Tiny HunyuanVideo checkpoints for tests, in both public formats, made with libraries other than reelforge's.

``make_diffusers_checkpoint`` lets diffusers and transformers save randomly initialised models of the full architecture;
``make_tencent_checkpoint`` rewrites such a folder as Tencent's files with ``torch.cat`` and ``torch.save``, following
the key map of the specification (section 7) literally, so that the tables have an independent counterpart.
Nothing here imports reelforge.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
LLM_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")  # the last id is the largest: legacy CLIP finds EOS by argmax


def llm_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer without merges, with Llama-3's special tokens and a leading BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(LLM_SPECIALS))
    begin = LLM_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    return tokenizer


def clip_tokenizer() -> Tokenizer:
    """Return a lower-casing byte-level tokenizer without merges that wraps a prompt in BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CLIP_SPECIALS))
    begin, end = CLIP_SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {begin} $B {end}",
        special_tokens=[(begin, tokenizer.token_to_id(begin)), (end, tokenizer.token_to_id(end))],
    )
    return tokenizer


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter its own values: norm weights around one, biases small and not zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                near_one = bool((parameter == 1).all())
                parameter.copy_(0.1 * noise + (1.0 if near_one else 0.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)


def make_diffusers_checkpoint(
    folder: Path,
    seed: int = 0,
    *,
    heads: int = 2,
    head_dim: int = 32,
    double_blocks: int = 2,
    single_blocks: int = 2,
    refiner_blocks: int = 2,
    latent_channels: int = 4,
    guidance_embedding: bool = True,
    rope_axes: tuple[int, int, int] | None = None,
    llm_width: int = 64,
    llm_layers: int = 4,
    llm_heads: int = 4,
    llm_kv_heads: int = 2,
    llm_mlp_width: int = 128,
    clip_width: int = 32,
    clip_layers: int = 2,
    clip_heads: int = 2,
    clip_eos: int | None = None,
    vae_widths: Sequence[int] = (16, 16, 32, 32),
    vae_layers: int = 1,
    vae_groups: int = 8,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "400KB",
) -> Path:
    """Write a tiny checkpoint in diffusers' layout and return ``folder``.

    The transformer is sharded with an index. ``HunyuanVideoPipeline.from_pretrained(folder)`` loads it; the prompt
    template (``TEMPLATE``) must be passed to the pipeline, and is in ``prompt_template.json``. ``clip_eos`` is the
    ``eos_token_id`` in CLIP's configuration (default: the tokenizer's; 2 is the legacy value of OpenAI's file).
    """
    generator = torch.Generator().manual_seed(seed)
    llm_words, clip_words = llm_tokenizer(), clip_tokenizer()
    axes = rope_axes or (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        num_refiner_layers=refiner_blocks,
        guidance_embeds=guidance_embedding,
        text_embed_dim=llm_width,
        pooled_projection_dim=clip_width,
        rope_axes_dim=axes,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        block_out_channels=tuple(vae_widths),
        layers_per_block=vae_layers,
        norm_num_groups=vae_groups,
    )
    llm = LlamaModel(
        LlamaConfig(
            vocab_size=llm_words.get_vocab_size(),
            hidden_size=llm_width,
            intermediate_size=llm_mlp_width,
            num_hidden_layers=llm_layers,
            num_attention_heads=llm_heads,
            num_key_value_heads=llm_kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            max_position_embeddings=8192,
            bos_token_id=llm_words.token_to_id("<|begin_of_text|>"),
            eos_token_id=llm_words.token_to_id("<|end_of_text|>"),
            pad_token_id=llm_words.token_to_id("<pad>"),
        )
    )
    clip_end = clip_words.token_to_id("<|endoftext|>")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words.get_vocab_size(),
            hidden_size=clip_width,
            intermediate_size=4 * clip_width,
            num_hidden_layers=clip_layers,
            num_attention_heads=clip_heads,
            max_position_embeddings=77,
            projection_dim=clip_width,
            bos_token_id=clip_words.token_to_id("<|startoftext|>"),
            eos_token_id=clip_end if clip_eos is None else clip_eos,
            pad_token_id=clip_end,
        )
    )
    for module in (transformer, vae, llm, clip):
        randomize(module, generator)
        module.eval()
        if dtype is not torch.float32:
            module.to(dtype=dtype)

    pipeline = HunyuanVideoPipeline(
        text_encoder=llm,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=llm_words,
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
            pad_token="<pad>",
            padding_side="right",
            model_max_length=8192,
        ),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=clip_words,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            padding_side="right",
            model_max_length=77,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)

    # crop_start counts BOS, as the pipeline's tokenizer call does.
    prefix_tokens = len(llm_words.encode(TEMPLATE.split("{}")[0]).ids)
    _write_json(folder / "prompt_template.json", {"template": TEMPLATE, "crop_start": prefix_tokens})
    return folder


def make_tencent_checkpoint(folder: Path, diffusers_folder: Path) -> Path:
    """Rewrite a diffusers checkpoint as Tencent's files and return ``folder``.

    Fused qkv, final modulation as (shift, scale), weights under ``module``, the VAE under ``state_dict`` with the
    ``vae.`` prefix, and the LLM with the ``model.`` prefix that some library versions write.
    """
    inner = folder / "hunyuan-video-t2v-720p"
    (inner / "transformers").mkdir(parents=True)
    (inner / "vae").mkdir()
    module = tencent_transformer(load_shards(diffusers_folder / "transformer"))
    torch.save({"module": module}, inner / "transformers" / "mp_rank_00_model_states.pt")

    vae = load_shards(diffusers_folder / "vae")
    torch.save({"state_dict": {f"vae.{key}": value for key, value in vae.items()}}, inner / "vae" / "pytorch_model.pt")
    shutil.copy(diffusers_folder / "vae" / "config.json", inner / "vae" / "config.json")

    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        shutil.copytree(diffusers_folder / name, folder / name)
        shutil.copytree(diffusers_folder / tokenizer, folder / name, dirs_exist_ok=True)
    llm = {f"model.{key}": value for key, value in load_shards(diffusers_folder / "text_encoder").items()}
    for stale in (folder / "text_encoder").glob("model*.safetensors*"):
        stale.unlink()
    torch.save(llm, folder / "text_encoder" / "pytorch_model.bin")
    shutil.copy(diffusers_folder / "prompt_template.json", folder / "prompt_template.json")
    return folder


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the safetensors files in ``folder``, in the order of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return dict(sorted(tensors.items()))


def tencent_transformer(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the transformer's tensors under Tencent's names (specification, section 7)."""
    left = dict(source)
    result: dict[str, torch.Tensor] = {}

    def rename(theirs: str, ours: str, parameters: Sequence[str] = ("weight", "bias")) -> None:
        for parameter in parameters:
            result[f"{theirs}.{parameter}"] = left.pop(f"{ours}.{parameter}")

    def fuse(theirs: str, prefix: str, parts: Sequence[str]) -> None:
        for parameter in ("weight", "bias"):
            result[f"{theirs}.{parameter}"] = torch.cat([left.pop(f"{prefix}{part}.{parameter}") for part in parts])

    def count(prefix: str) -> int:
        return 1 + max(int(key[len(prefix) + 1 :].split(".")[0]) for key in source if key.startswith(f"{prefix}."))

    rename("img_in.proj", "x_embedder.proj")
    pairs = [("time_in", "timestep_embedder")]
    if "time_text_embed.guidance_embedder.linear_1.weight" in source:
        pairs.append(("guidance_in", "guidance_embedder"))
    for theirs, ours in pairs:
        rename(f"{theirs}.mlp.0", f"time_text_embed.{ours}.linear_1")
        rename(f"{theirs}.mlp.2", f"time_text_embed.{ours}.linear_2")
    rename("vector_in.in_layer", "time_text_embed.text_embedder.linear_1")
    rename("vector_in.out_layer", "time_text_embed.text_embedder.linear_2")

    rename("txt_in.input_embedder", "context_embedder.proj_in")
    rename("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1")
    rename("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2")
    rename("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1")
    rename("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2")
    blocks = "context_embedder.token_refiner.refiner_blocks"
    for i in range(count(blocks)):
        theirs, ours = f"txt_in.individual_token_refiner.blocks.{i}", f"{blocks}.{i}"
        rename(f"{theirs}.norm1", f"{ours}.norm1")
        rename(f"{theirs}.norm2", f"{ours}.norm2")
        fuse(f"{theirs}.self_attn_qkv", f"{ours}.attn.", ("to_q", "to_k", "to_v"))
        rename(f"{theirs}.self_attn_proj", f"{ours}.attn.to_out.0")
        rename(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
        rename(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
        rename(f"{theirs}.adaLN_modulation.1", f"{ours}.norm_out.linear")

    for i in range(count("transformer_blocks")):
        theirs, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        rename(f"{theirs}.img_mod.linear", f"{ours}.norm1.linear")
        rename(f"{theirs}.txt_mod.linear", f"{ours}.norm1_context.linear")
        fuse(f"{theirs}.img_attn_qkv", f"{ours}.attn.", ("to_q", "to_k", "to_v"))
        fuse(f"{theirs}.txt_attn_qkv", f"{ours}.attn.", ("add_q_proj", "add_k_proj", "add_v_proj"))
        rename(f"{theirs}.img_attn_q_norm", f"{ours}.attn.norm_q", ["weight"])
        rename(f"{theirs}.img_attn_k_norm", f"{ours}.attn.norm_k", ["weight"])
        rename(f"{theirs}.txt_attn_q_norm", f"{ours}.attn.norm_added_q", ["weight"])
        rename(f"{theirs}.txt_attn_k_norm", f"{ours}.attn.norm_added_k", ["weight"])
        rename(f"{theirs}.img_attn_proj", f"{ours}.attn.to_out.0")
        rename(f"{theirs}.txt_attn_proj", f"{ours}.attn.to_add_out")
        for stream, feed_forward in (("img", "ff"), ("txt", "ff_context")):
            rename(f"{theirs}.{stream}_mlp.fc1", f"{ours}.{feed_forward}.net.0.proj")
            rename(f"{theirs}.{stream}_mlp.fc2", f"{ours}.{feed_forward}.net.2")

    for i in range(count("single_transformer_blocks")):
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        fuse(f"{theirs}.linear1", f"{ours}.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        rename(f"{theirs}.linear2", f"{ours}.proj_out")
        rename(f"{theirs}.q_norm", f"{ours}.attn.norm_q", ["weight"])
        rename(f"{theirs}.k_norm", f"{ours}.attn.norm_k", ["weight"])
        rename(f"{theirs}.modulation.linear", f"{ours}.norm.linear")

    for parameter in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{parameter}").chunk(2)
        result[f"final_layer.adaLN_modulation.1.{parameter}"] = torch.cat([shift, scale])
    rename("final_layer.linear", "proj_out")
    if left:
        raise AssertionError(f"the map forgets {sorted(left)}")
    return result


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
