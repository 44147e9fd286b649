"""Synthetic checkpoints: their tables against diffusers' and transformers' own modules, their files against readers."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import model_spec
from reelforge.export.prompt_template import find_prompt_template
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.tools import synthesize as synthesize_module
from reelforge.tools import synthesize_configs as configs
from reelforge.tools import synthesize_layout as layout
from reelforge.tools import synthesize_text as text
from reelforge.tools.synthesize import Layout, command, synthesize
from reelforge.tools.synthesize_files import Content, Dtype, Values, encode, piece_values
from reelforge.tools.synthesize_layout import SIZES, TensorLayout
from tests.checkpoints import load_shards, tencent_transformer

TENCENT_TRANSFORMER = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.safetensors"


def shapes(tensors: Iterable[TensorLayout]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def module_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def total(tensors: Iterable[TensorLayout]) -> int:
    return sum(tensor.elements for tensor in tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("tiny") / "diffusers", "tiny", seed=3)


@pytest.fixture(scope="module")
def tiny_tencent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("tiny") / "tencent", "tiny", format=Layout.TENCENT, seed=3)


@pytest.mark.parametrize("size", SIZES)
def test_tables_equal_the_libraries_own_modules(size: str) -> None:
    spec = SIZES[size]
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel.from_config(configs.transformer_config(spec))
        vae = AutoencoderKLHunyuanVideo.from_config(configs.vae_config(spec, tencent=False))
        llm = LlamaModel(LlamaConfig.from_dict(configs.llm_config(spec, "float32", "LlamaModel")))
        clip = CLIPTextModel(CLIPTextConfig.from_dict(configs.clip_config(spec, "float32", legacy=False)))
    assert shapes(layout.diffusers_transformer(spec.dit)) == module_shapes(transformer)
    assert shapes(layout.vae(spec.vae)) == module_shapes(vae)
    assert shapes(layout.llm(spec.llm)) == module_shapes(llm)
    clip_shapes = {name.removeprefix("text_model."): shape for name, shape in module_shapes(clip).items()}
    clip_shapes.pop("embeddings.position_ids", None)
    assert shapes(layout.clip(spec.clip)) == clip_shapes


def test_full_size_counts_are_the_specifications() -> None:
    spec = SIZES["full"]
    theirs, ours = layout.tencent_transformer(spec.dit), layout.diffusers_transformer(spec.dit)
    assert (len(ours), len(theirs), len(layout.vae(spec.vae))) == (1264, 856, 248)
    assert total(ours) == total(theirs) == 12_821_012_544
    for prefix, count in {"double_blocks.": 6_796_625_920, "single_blocks.": 5_663_672_320}.items():
        assert total(tensor for tensor in theirs if tensor.name.startswith(prefix)) == count
    assert round(total(layout.vae(spec.vae)) / 1e6, 1) == 246.5
    assert round(total(layout.llm(spec.llm)) / 1e9, 3) == 7.505
    assert round(total(layout.clip(spec.clip)) / 1e6, 1) == 123.1


def test_full_size_is_laid_out_in_seconds_and_takes_little_disk(tmp_path: Path) -> None:
    started = time.monotonic()
    folder = synthesize(tmp_path / "full", "full", seed=1)
    assert time.monotonic() - started < 20
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 41e9
    assert sum(path.stat().st_blocks * 512 for path in files) < 40e6
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 1264
    assert index["metadata"]["total_size"] == 2 * 12_821_012_544
    assert all(path.stat().st_size <= 10e9 for path in files)
    assert not (folder / "prompt_template.json").exists()

    seen: set[bytes] = set()
    names = 0
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                row = file.get_slice(name)
                sample = row[:1] if len(row.get_shape()) > 1 else row[:]
                assert sample.dtype == torch.bfloat16
                assert bool(torch.isfinite(sample).all())
                seen.add(sample.view(torch.int16).numpy().tobytes())
                names += 1
    assert names == len(seen) == 1264


def test_full_size_tokenizers_have_the_published_ids_and_fit_the_published_template(tmp_path: Path) -> None:
    spec = SIZES["full"]
    tokenizer = Tokenizer.from_str(text.llm_tokenizer(spec.llm).decode())
    assert tokenizer.get_vocab_size() <= spec.llm.vocabulary
    assert max(tokenizer.get_vocab().values()) < spec.llm.vocabulary
    expected = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009, "<pad>": 128258}
    assert {token: tokenizer.token_to_id(token) for token in expected} == expected

    template = find_prompt_template(None, None, tokenizer)
    ids = tokenizer.encode(template.text.replace("{}", "x")).ids
    assert template.crop_start == 95
    assert ids[:5] == [128000, 128006, 9125, 128007, 271]
    assert ids[93:95] == [128007, 271]

    vocabulary = json.loads(text.clip_files(spec.clip)["vocab.json"])
    assert len(vocabulary) == 49408
    assert vocabulary["<|startoftext|>"] == 49406
    assert vocabulary["<|endoftext|>"] == 49407


def test_both_formats_hold_the_same_model(tiny: Path, tiny_tencent: Path) -> None:
    # The reference map is the one in tests/checkpoints.py, written with torch and independent of the tables.
    expected = tencent_transformer(load_shards(tiny / "transformer"))
    received = load_file(tiny_tencent / TENCENT_TRANSFORMER)
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    vae = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    their_vae = load_file(tiny_tencent / "hunyuan-video-t2v-720p" / "vae" / "pytorch_model.safetensors")
    assert vae.keys() == their_vae.keys()
    assert all(torch.equal(vae[name], their_vae[name]) for name in vae)
    llm, their_llm = load_shards(tiny / "text_encoder"), load_shards(tiny_tencent / "text_encoder")
    assert their_llm.pop("lm_head.weight").shape == llm["embed_tokens.weight"].shape
    assert {f"model.{name}" for name in llm} == their_llm.keys()
    assert all(torch.equal(llm[name], their_llm[f"model.{name}"]) for name in llm)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        ours = next(path for path in (tiny / "tokenizer" / name, tiny / "tokenizer_2" / name) if path.exists())
        theirs = next((tiny_tencent).glob(f"text_encoder*/{name}"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_diffusers_loads_and_runs_a_tiny_checkpoint(tiny: Path) -> None:
    pipeline = HunyuanVideoPipeline.from_pretrained(tiny, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    template = json.loads((tiny / "prompt_template.json").read_text())
    assert pipeline.tokenizer.vocab_size <= SIZES["tiny"].llm.vocabulary
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt("a red circle", prompt_template=template)
    assert states.shape == (1, 256, 64)
    assert int(mask.sum()) == 4  # three words and the end of the turn
    assert 0.2 < float(states[:, :4].std()) < 5.0
    assert 0.2 < float(pooled.std()) < 5.0
    video = pipeline(
        "a red circle",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=1,
        prompt_template=template,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert video.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", Layout)
def test_the_compiler_reads_the_numbers_that_were_written(size: str, format: Layout, tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "checkpoint", size, format=format, content=Content.SPARSE)
    assert model_spec(open_checkpoint(folder)) == SIZES[size]


def test_both_ends_of_sparse_tensors_are_distinct(tmp_path: Path) -> None:
    """A compiler that finds two equal constants keeps one, and its plan would be too small."""
    folder = synthesize(tmp_path / "checkpoint", "block", content=Content.SPARSE)
    seen: set[bytes] = set()
    for path in (folder / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - this is no dictionary
                shape = tensors.get_slice(name).get_shape()
                if len(shape) != 2 or math.prod(shape) < 1 << 20:
                    continue
                rows = tensors.get_slice(name)
                for row in (rows[:1], rows[-1:]):
                    content = row.float().numpy().tobytes()
                    assert any(content), name
                    assert content not in seen, name
                    seen.add(content)
    assert len(seen) > 20


def digest(folder: Path) -> str:
    total_digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total_digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total_digest.hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny: Path, tmp_path: Path) -> None:
    assert digest(synthesize(tmp_path / "again", "tiny", seed=3)) == digest(tiny)
    assert digest(synthesize(tmp_path / "other", "tiny", seed=4)) != digest(tiny)


def test_bytes_are_the_same_on_every_machine() -> None:
    piece = layout.piece("transformer/proj_out.weight", (3, 4))
    received = np.frombuffer(b"".join(piece_values(piece, Values(Content.RANDOM, Dtype.FP32, 0))), "<f4")
    assert received.shape == (12,)
    assert abs(received).max() < math.sqrt(3 / 4)
    assert hashlib.sha256(received.tobytes()).hexdigest()[:16] == "89cff209b4976b99"


def test_sharding_is_by_bytes_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "shards", "tiny", shard_bytes=300_000) / "transformer"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    for name in files:
        with safe_open(folder / name, "pt") as file:
            assert set(file.keys()) == {key for key, shard in index.items() if shard == name}
    one = synthesize(tmp_path / "one", "tiny", shard_bytes=10**9) / "transformer"
    assert [path.name for path in one.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("dtype", Dtype)
def test_rounding_equals_torch(dtype: Dtype) -> None:
    numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    torch_dtype = getattr(torch, dtype.torch_name)
    expected = torch.from_numpy(numbers).to(torch_dtype).view(torch.uint8).numpy().tobytes()
    assert encode(numbers, dtype) == expected


def test_demo_size_fits_twelve_megabytes(tmp_path: Path) -> None:
    folder = synthesize(tmp_path / "demo", "demo")
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert weights <= 12_000_000
    spec = SIZES["demo"]
    assert all(width % 16 == 0 for width in (spec.dit.width, spec.llm.width, spec.clip.width, *spec.vae.block_widths))


def test_mid_size_is_a_third_of_a_billion_parameters_and_two_thousand_tokens() -> None:
    spec = SIZES["mid"]
    assert 0.25e9 < total(layout.diffusers_transformer(spec.dit)) < 0.35e9
    assert total(layout.vae(spec.vae)) + total(layout.llm(spec.llm)) + total(layout.clip(spec.clip)) < 5e6
    shape = spec.latent_shape(spec.defaults.height, spec.defaults.width, spec.defaults.frames)
    assert math.prod(shape[1:]) // math.prod(spec.dit.patch) == 2048


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    with pytest.raises(OutputError, match="exists already") as caught:
        synthesize(folder, "tiny")
    assert "remove it" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthesize_module, "_write_tokenizers", full_disk)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        synthesize(tmp_path / "out", "tiny")
    assert "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesize_module, "_write_tokenizers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no size 'huge'"):
        synthesize(tmp_path / "out", "huge")
    with pytest.raises(RequestError, match="negative"):
        synthesize(tmp_path / "out", "tiny", seed=-1)
    with pytest.raises(RequestError, match="negative"):
        synthesize(tmp_path / "out", "tiny", shard_bytes=0)


def test_the_command_writes_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    options = ["--size", "tiny", "--format", "tencent", "--content", "sparse", "--dtype", "fp16", "--seed", "9"]
    result = CliRunner().invoke(command, [str(out), *options])
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    assert load_file(out / TENCENT_TRANSFORMER)["img_in.proj.weight"].dtype == torch.float16
    assert CliRunner().invoke(command, [str(out), "--size", "huge"]).exit_code == 2
