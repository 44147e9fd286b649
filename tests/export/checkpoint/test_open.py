"""Folders of both layouts, and folders that are incomplete, inconsistent or of another family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelforge.export.checkpoint.component import COMPONENTS, Layout, component
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.runtime.errors import CheckpointError
from tests.checkpoints import load_shards, make_diffusers_checkpoint
from tests.export.checkpoint.test_safetensors_file import bytes_read

INNER = "hunyuan-video-t2v-720p"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_diffusers_layout(diffusers_folder: Path) -> None:
    checkpoint = open_checkpoint(diffusers_folder)
    assert checkpoint.layout is Layout.DIFFUSERS
    assert set(checkpoint.components) == set(COMPONENTS)
    assert checkpoint.tokenizers == {"llm": diffusers_folder / "tokenizer", "clip": diffusers_folder / "tokenizer_2"}
    assert checkpoint.prompt_template == diffusers_folder / "prompt_template.json"
    assert checkpoint.scheduler is not None
    assert checkpoint.scheduler["shift"] == 7.0
    for name in COMPONENTS:
        stored = load_shards(diffusers_folder / name)
        opened = checkpoint.component(name)
        assert len(opened.tensors) == len(stored)
        assert opened.where == str(diffusers_folder / name)
        assert opened.config == json.loads((diffusers_folder / name / "config.json").read_text())


@pytest.mark.parametrize("inner", [False, True])
def test_tencent_layout(tencent_folder: Path, diffusers_folder: Path, inner: bool) -> None:
    checkpoint = open_checkpoint(tencent_folder / INNER if inner else tencent_folder)
    assert checkpoint.layout is Layout.TENCENT
    assert set(checkpoint.components) == set(COMPONENTS)
    assert checkpoint.tokenizers == {"llm": tencent_folder / "text_encoder", "clip": tencent_folder / "text_encoder_2"}
    assert checkpoint.prompt_template == tencent_folder / "prompt_template.json"
    other = open_checkpoint(diffusers_folder)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert set(checkpoint.component(name).tensors) == set(other.component(name).tensors)
    assert checkpoint.component("transformer").config is None


def test_tencent_names_as_safetensors_and_vae_at_the_root(tencent_copy: Path) -> None:
    for path in (
        tencent_copy / INNER / "transformers" / "mp_rank_00_model_states.pt",
        tencent_copy / INNER / "vae" / "pytorch_model.pt",
    ):
        content = torch.load(path, weights_only=True)
        save_file(content.get("module", content.get("state_dict")), path.with_suffix(".safetensors"))
        path.unlink()
    (tencent_copy / INNER / "vae").rename(tencent_copy / "vae")
    checkpoint = open_checkpoint(tencent_copy)
    assert set(checkpoint.components) == set(COMPONENTS)
    assert "decoder.conv_in.conv.weight" in checkpoint.component("vae").tensors


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A checkpoint of 16 sparse gigabytes opens by a few hundred kilobytes."""
    make_diffusers_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / "text_encoder" / "model.safetensors"
    header = {"embed_tokens.weight": {"dtype": "BF16", "shape": [1 << 20, 8192], "data_offsets": [0, 1 << 34]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + (1 << 34))
    before = bytes_read()
    open_checkpoint(tmp_path / "c")
    assert bytes_read() - before < 500_000


def test_a_missing_shard_is_named_with_its_tensors(diffusers_copy: Path) -> None:
    shard = diffusers_copy / "transformer" / "diffusion_pytorch_model-00003-of-00007.safetensors"
    held = sorted(load_file(shard))
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"-00003-of-00007\.safetensors is missing") as caught:
        open_checkpoint(diffusers_copy)
    assert f"it should hold {len(held)} tensors" in str(caught.value)
    assert any(name in str(caught.value) for name in held)


def test_shards_and_index_must_agree(diffusers_copy: Path) -> None:
    index = diffusers_copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = weight_map.pop("proj_out.bias")
    edit(index, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"1 stored but not listed: proj_out\.bias"):
        open_checkpoint(diffusers_copy)
    edit(index, weight_map={**weight_map, "proj_out.bias": shard, "ghost": shard})
    with pytest.raises(CheckpointError, match="1 listed but not stored: ghost"):
        open_checkpoint(diffusers_copy)
    edit(index, weight_map={"a": "../../secret.safetensors"})
    with pytest.raises(CheckpointError, match="a shard outside its folder"):
        open_checkpoint(diffusers_copy)
    edit(index, weight_map=3)
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(diffusers_copy)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_checkpoint(diffusers_copy)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        open_checkpoint(diffusers_copy)


def test_transformers_shards_and_bin_files(diffusers_copy: Path) -> None:
    folder = diffusers_copy / "text_encoder"
    tensors = load_shards(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, held in halves.items():
        torch.save({f"language_model.model.{name}": tensors[name] for name in held}, folder / shard)
    weight_map = {f"language_model.model.{name}": shard for shard, held in halves.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(diffusers_copy).component("text_encoder").tensors) == set(names)


@pytest.mark.parametrize(
    ("kind", "key", "stripped"),
    [
        ("text_encoder", "language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("text_encoder", "model.language_model.embed_tokens.weight", "embed_tokens.weight"),
        ("text_encoder", "language_model.lm_head.weight", "lm_head.weight"),
        ("text_encoder_2", "text_model.final_layer_norm.bias", "final_layer_norm.bias"),
        ("vae", "vae.post_quant_conv.bias", "post_quant_conv.bias"),
        ("transformer", "model.x", "model.x"),
    ],
)
def test_prefixes(diffusers_folder: Path, kind: str, key: str, stripped: str) -> None:
    ref = next(iter(open_checkpoint(diffusers_folder).component("vae").tensors.values()))
    assert list(component(kind, {key: ref}, None, "here").tensors) == [stripped]


def test_names_that_differ_by_a_prefix_only(diffusers_folder: Path) -> None:
    ref = next(iter(open_checkpoint(diffusers_folder).component("vae").tensors.values()))
    with pytest.raises(CheckpointError, match="differ by a prefix only"):
        component("text_encoder", {"norm.weight": ref, "model.norm.weight": ref}, None, "here")


@pytest.mark.parametrize(
    ("class_name", "family"),
    [
        ("FluxPipeline", "FLUX"),
        ("WanPipeline", "Wan"),
        ("HunyuanVideoImageToVideoPipeline", "image to video"),
        ("HunyuanVideo15Pipeline", "HunyuanVideo 1.5"),
        ("SomethingPipeline", "SomethingPipeline"),
    ],
)
def test_another_family_by_its_index(diffusers_copy: Path, class_name: str, family: str) -> None:
    edit(diffusers_copy / "model_index.json", _class_name=class_name)
    with pytest.raises(CheckpointError, match="another family") as caught:
        open_checkpoint(diffusers_copy)
    assert f"it seems to be {family}" in str(caught.value).replace("HunyuanVideo image", "image")


def test_another_family_by_its_transformer(diffusers_copy: Path) -> None:
    (diffusers_copy / "model_index.json").unlink()
    open_checkpoint(diffusers_copy)
    edit(diffusers_copy / "transformer" / "config.json", _class_name="WanTransformer3DModel")
    with pytest.raises(CheckpointError, match="it seems to be Wan"):
        open_checkpoint(diffusers_copy)


KEYS = {
    "FLUX": "double_blocks.0.img_attn.qkv.weight",
    "Wan": "blocks.0.self_attn.q.weight",
    "Mochi": "blocks.0.attn.qkv_x.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "a language model": "model.layers.0.self_attn.q_proj.weight",
    "unknown": "weight",
}


@pytest.mark.parametrize("family", KEYS)
def test_another_family_by_its_keys(tencent_copy: Path, family: str) -> None:
    path = tencent_copy / INNER / "transformers" / "mp_rank_00_model_states.pt"
    torch.save({"module": {KEYS[family]: torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=f"it seems to be {family}"):
        open_checkpoint(tencent_copy)


def test_another_family_in_diffusers_clothes(diffusers_copy: Path) -> None:
    for path in (diffusers_copy / "transformer").glob("*.safetensors*"):
        path.unlink()
    save_file(
        {"condition_embedder.time_proj.weight": torch.zeros(1)},
        diffusers_copy / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="it seems to be Wan by the names"):
        open_checkpoint(diffusers_copy)


def test_folders_that_hold_no_checkpoint(tmp_path: Path, diffusers_copy: Path, tencent_copy: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint that is known") as caught:
        open_checkpoint(tmp_path / "empty")
    assert "an empty folder" in str(caught.value)
    with pytest.raises(CheckpointError, match="give the folder, not a file"):
        open_checkpoint(diffusers_copy / "model_index.json")
    shutil.rmtree(diffusers_copy / "transformer")
    with pytest.raises(CheckpointError, match="has no folder transformer/"):
        open_checkpoint(diffusers_copy)
    (tencent_copy / INNER / "transformers" / "mp_rank_00_model_states.pt").rename(
        tencent_copy / INNER / "transformers" / "mp_rank_00_model_states_fp8.pt"
    )
    with pytest.raises(CheckpointError, match="holds no transformer weights") as caught:
        open_checkpoint(tencent_copy)
    assert "fp8" in str(caught.value)


def test_components_that_are_not_there(diffusers_copy: Path) -> None:
    shutil.rmtree(diffusers_copy / "text_encoder_2")
    shutil.rmtree(diffusers_copy / "tokenizer_2")
    checkpoint = open_checkpoint(diffusers_copy)
    assert checkpoint.tokenizers["clip"] is None
    with pytest.raises(CheckpointError, match="has no text_encoder_2"):
        checkpoint.component("text_encoder_2")
    (diffusers_copy / "vae" / "diffusion_pytorch_model.safetensors").rename(
        diffusers_copy / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        open_checkpoint(diffusers_copy)
    assert "diffusion_pytorch_model.fp16.safetensors" in str(caught.value)
