"""ModelSpec from configurations and from shapes, and the settings that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, LlamaConfig

from reelforge.export.checkpoint.component import Checkpoint, Component, Layout
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics, model_spec
from reelforge.runtime.errors import CheckpointError
from reelforge.runtime.spec import ClipSpec, DitSpec, GuidanceRounding, LlmSpec, SamplerDefaults, VaeSpec, VaeTiling
from tests.export.checkpoint.test_open import INNER, edit

# Specification, sections 2, 3.1 and 5.1.
REAL_DIT = DitSpec(
    width=3072,
    heads=24,
    head_dim=128,
    double_blocks=20,
    single_blocks=40,
    refiner_blocks=2,
    mlp_width=12288,
    latent_channels=16,
    patch=(1, 2, 2),
    text_width=4096,
    pooled_width=768,
    rope_axes=(16, 56, 56),
    rope_theta=256.0,
    sinusoid_width=256,
    norm_eps=1e-6,
    guidance_embedding=True,
)
REAL_LLM = LlmSpec(4096, 32, 30, 32, 8, 128, 14336, 128320, 500000.0, 1e-5, 256)
REAL_CLIP = ClipSpec(768, 12, 12, 3072, 49408, 77, 1e-5, "quick_gelu", 49407)
REAL_VAE = VaeSpec(16, (128, 256, 512, 512), 2, 32, 1e-6, 0.476986, 8, 4)

LLAMA_CONFIG = {
    **{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128320, "rms_norm_eps": 1e-5},
    **{"rope_theta": 500000.0, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False},
}
# As LLaVA nests it: LLaMA's defaults are left out.
LLAVA_CONFIG = {
    "model_type": "llava",
    "text_config": {
        key: LLAMA_CONFIG[key]
        for key in (
            "model_type",
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
            "rms_norm_eps",
            "rope_theta",
        )
    },
}
CLIP_CONFIG = {
    **{"model_type": "clip_text_model", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"intermediate_size": 3072, "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5},
    **{"hidden_act": "quick_gelu", "eos_token_id": 2},
}
VAE_CONFIG = {
    **{"_class_name": "AutoencoderKLCausal3D", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512]},
    **{"latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256},
    **{"sample_tsize": 64, "scaling_factor": 0.476986, "time_compression_ratio": 4, "mid_block_add_attention": True},
}
TENCENT_SHAPES = {
    "img_in.proj.weight": (3072, 16, 1, 2, 2),
    "double_blocks.0.img_attn_q_norm.weight": (128,),
    "double_blocks.0.img_mlp.fc1.weight": (12288, 3072),
    "final_layer.linear.weight": (64, 3072),
    "txt_in.input_embedder.weight": (3072, 4096),
    "vector_in.in_layer.weight": (3072, 768),
    "time_in.mlp.0.weight": (3072, 256),
    "guidance_in.mlp.0.weight": (3072, 256),
    **{f"double_blocks.{i}.x": (1,) for i in range(20)},
    **{f"single_blocks.{i}.x": (1,) for i in range(40)},
    **{f"txt_in.individual_token_refiner.blocks.{i}.x": (1,) for i in range(2)},
}
TRANSFORMER_CONFIG = {"_class_name": "HunyuanVideoTransformer3DModel"}  # everything else is the class's default


def checkpoint(layout: Layout, llm: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: TensorRef(name, Path("x"), 0, "BF16", shape)
        for name, shape in {**TENCENT_SHAPES, **(shapes or {})}.items()
    }
    configs: dict[str, dict[str, Any] | None] = {
        "transformer": TRANSFORMER_CONFIG if layout is Layout.DIFFUSERS else None,
        "vae": VAE_CONFIG,
        "text_encoder": llm or LLAMA_CONFIG,
        "text_encoder_2": CLIP_CONFIG,
    }
    return Checkpoint(Path("x"), layout, {name: Component(name, tensors, item, name) for name, item in configs.items()})


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("llm", [LLAMA_CONFIG, LLAVA_CONFIG])
def test_the_published_model(layout: Layout, llm: dict[str, Any]) -> None:
    spec = model_spec(checkpoint(layout, llm))
    assert spec.family == "hunyuan_video"
    assert spec.dit == REAL_DIT
    assert spec.llm == REAL_LLM
    assert spec.clip == REAL_CLIP
    assert spec.vae == REAL_VAE
    assert spec.tiling == VaeTiling(32, 24, 16, 12)
    assert spec.guidance_rounding is GuidanceRounding.BF16
    assert spec.defaults == SamplerDefaults(50, 7.0, 6.0, 720, 1280, 129, 24)
    other = model_spec(checkpoint(layout, llm), Numerics.DIFFUSERS)
    assert other == replace(spec, tiling=VaeTiling(32, 24, 4, 3), guidance_rounding=GuidanceRounding.NONE)


def test_absent_settings_mean_the_libraries_defaults() -> None:
    opened = checkpoint(Layout.DIFFUSERS, {"model_type": "llama", "vocab_size": 5})
    llm = model_spec(opened).llm
    default = LlamaConfig()
    assert (llm.width, llm.layers, llm.heads, llm.kv_heads, llm.mlp_width, llm.norm_eps) == (
        *(default.hidden_size, default.num_hidden_layers, default.num_attention_heads),
        *(default.num_key_value_heads, default.intermediate_size, default.rms_norm_eps),
    )
    bare = replace(opened.component("text_encoder_2"), config={"hidden_size": 768})
    clip = model_spec(replace(opened, components={**opened.components, "text_encoder_2": bare})).clip
    standard = CLIPTextConfig()
    assert (
        clip.layers,
        clip.heads,
        clip.mlp_width,
        clip.vocabulary,
        clip.max_tokens,
        clip.norm_eps,
        clip.activation,
    ) == (
        *(standard.num_hidden_layers, standard.num_attention_heads, standard.intermediate_size, standard.vocab_size),
        *(standard.max_position_embeddings, standard.layer_norm_eps, standard.hidden_act),
    )


def test_rope_parameters_of_either_library_version(diffusers_copy: Path) -> None:
    path = diffusers_copy / "text_encoder" / "config.json"
    assert "rope_parameters" in json.loads(path.read_text())
    assert model_spec(open_checkpoint(diffusers_copy)).llm.rope_theta == 500000.0
    edit(path, rope_parameters=None, rope_theta=12345.0)
    assert model_spec(open_checkpoint(diffusers_copy)).llm.rope_theta == 12345.0


@pytest.mark.parametrize(("stored", "meant"), [(2, 257), (257, 257), (9, 9)])
def test_the_legacy_end_of_text_is_the_largest_id(diffusers_copy: Path, stored: int, meant: int) -> None:
    edit(diffusers_copy / "text_encoder_2" / "config.json", eos_token_id=stored)
    assert model_spec(open_checkpoint(diffusers_copy)).clip.eos_token == meant


def test_sampling_defaults(diffusers_copy: Path) -> None:
    edit(diffusers_copy / "scheduler" / "scheduler_config.json", shift=3.0)
    assert model_spec(open_checkpoint(diffusers_copy)).defaults.shift == 3.0
    own = SamplerDefaults(8, 5.0, 4.0, 64, 96, 17, 12)
    path = diffusers_copy / "sampling_defaults.json"
    path.write_text(json.dumps(vars(own)))
    assert model_spec(open_checkpoint(diffusers_copy)).defaults == own
    path.write_text(json.dumps({**vars(own), "steps": "eight"}))
    with pytest.raises(CheckpointError, match=r"sampling_defaults\.json cannot be used") as caught:
        model_spec(open_checkpoint(diffusers_copy))
    assert "$.steps" in str(caught.value)
    path.unlink()
    edit(diffusers_copy / "scheduler" / "scheduler_config.json", shift=None)
    with pytest.raises(CheckpointError, match="no usable shift"):
        model_spec(open_checkpoint(diffusers_copy))


@pytest.mark.parametrize("inner", [False, True])
def test_sampling_defaults_of_either_tencent_folder(tencent_copy: Path, inner: bool) -> None:
    own = SamplerDefaults(8, 5.0, 4.0, 64, 96, 17, 12)
    (tencent_copy / "sampling_defaults.json").write_text(json.dumps(vars(own)))
    assert model_spec(open_checkpoint(tencent_copy / INNER if inner else tencent_copy)).defaults == own


@pytest.mark.parametrize(
    ("component", "setting", "value"),
    [
        ("transformer", "image_condition_type", "latent_concat"),
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "out_channels", 8),
        ("transformer", "rope_axes_dim", [4, 14, 16]),
        ("transformer", "rope_axes_dim", [5, 13, 14]),
        ("transformer", "guidance_embeds", 1),
        ("transformer", "num_layers", 0),
        ("transformer", "mlp_ratio", 2.0),
        ("transformer", "rope_theta", "far"),
        ("vae", "_class_name", "AutoencoderKLWan"),
        ("vae", "act_fn", "gelu"),
        ("vae", "mid_block_add_attention", False),
        ("vae", "block_out_channels", [16, 32]),
        ("vae", "block_out_channels", "16"),
        ("vae", "scaling_factor", -1),
        ("text_encoder", "model_type", "mistral"),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "attention_bias", True),
        ("text_encoder", "num_hidden_layers", 2),
        ("text_encoder", "rope_scaling", {"type": "linear"}),
        ("text_encoder", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1.0}),
        ("text_encoder", "rope_parameters", {"rope_theta": "x"}),
        ("text_encoder_2", "hidden_act", "relu"),
        ("text_encoder_2", "vocab_size", 2.5),
    ],
)
def test_settings_that_the_stages_do_not_compute(
    diffusers_copy: Path, component: str, setting: str, value: object
) -> None:
    edit(diffusers_copy / component / "config.json", **{setting: value})
    with pytest.raises(CheckpointError, match=f"configuration of {component} .*does not compute") as caught:
        model_spec(open_checkpoint(diffusers_copy))
    assert setting.split("_")[0] in str(caught.value)


def test_components_must_fit_together(diffusers_copy: Path) -> None:
    edit(diffusers_copy / "transformer" / "config.json", text_embed_dim=128)
    with pytest.raises(CheckpointError, match="text widths of transformer and text_encoder differ"):
        model_spec(open_checkpoint(diffusers_copy))
    (diffusers_copy / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        model_spec(open_checkpoint(diffusers_copy))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"img_in.proj.weight": (3072, 33, 1, 2, 2)}, "different numbers of channels"),
        ({"img_in.proj.weight": (3072, 64)}, r"no usable tensor 'img_in\.proj\.weight'"),
        ({"double_blocks.0.img_attn_q_norm.weight": (100,)}, "heads of an unexpected size"),
    ],
)
def test_tencent_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_spec(checkpoint(Layout.TENCENT, shapes=shapes))


def test_a_tencent_transformer_without_its_parts(tencent_copy: Path) -> None:
    path = tencent_copy / INNER / "transformers" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"double_blocks.0.img_attn_qkv.weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="no usable tensor"):
        model_spec(open_checkpoint(tencent_copy))
