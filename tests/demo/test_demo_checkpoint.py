"""The shipped checkpoint: its size, its files, and that diffusers loads and runs it unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from demo.train import checker, data

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"
MAX_BYTES = 12_000_000
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

pytestmark = pytest.mark.skipif(not (CHECKPOINT / "model_index.json").exists(), reason="no demo checkpoint here")


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    return json.loads((CHECKPOINT / "prompt_template.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers")
    loaded = diffusers.HunyuanVideoPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_size() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_half_precision_and_finite(part: str) -> None:
    (file,) = (CHECKPOINT / part).glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float16, name
            assert tensor.isfinite().all(), name


def test_widths_suit_the_compilers() -> None:
    transformer = json.loads((CHECKPOINT / "transformer" / "config.json").read_text())
    llm = json.loads((CHECKPOINT / "text_encoder" / "config.json").read_text())
    vae = json.loads((CHECKPOINT / "vae" / "config.json").read_text())
    assert transformer["attention_head_dim"] == 64
    assert llm["head_dim"] == 64
    assert vae["block_out_channels"][-1] in (64, 128)
    widths = [*vae["block_out_channels"], llm["hidden_size"], llm["intermediate_size"]]
    assert all(width % 16 == 0 for width in (*widths, transformer["pooled_projection_dim"]))


@pytest.mark.parametrize("prompt", ["", "A RED circle", "naïve 日本語 🎈", "\n\n  a red circle", "x" * 300, "\x00\x7f"])
def test_any_text_encodes_with_tokenizers_alone(prompt: str, template: dict[str, Any]) -> None:
    llm = Tokenizer.from_file(str(CHECKPOINT / "tokenizer" / "tokenizer.json"))
    clip = Tokenizer.from_file(str(CHECKPOINT / "tokenizer_2" / "tokenizer.json"))
    prefix, suffix = template["template"].split("{}")
    ids = llm.encode(prefix + prompt + suffix).ids
    start = template["crop_start"]
    assert ids[:start] == llm.encode(prefix).ids
    assert ids[start:] == llm.encode(prompt + suffix, add_special_tokens=False).ids
    assert ids[0] == llm.token_to_id("<|begin_of_text|>")
    ends = clip.encode(prompt).ids
    assert ends[0] == clip.token_to_id("<|startoftext|>")
    assert ends[-1] == clip.token_to_id("<|endoftext|>") == clip.get_vocab_size() - 1


def test_every_word_of_the_world_is_one_token() -> None:
    llm = Tokenizer.from_file(str(CHECKPOINT / "tokenizer" / "tokenizer.json"))
    for scene in data.scenes()[::5]:
        for caption in (*scene.captions(), scene.image_caption()):
            words = caption.replace(",", " ,").split()
            assert len(llm.encode(caption, add_special_tokens=False).ids) == len(words)


def test_vae_round_trip(pipeline: Any) -> None:
    placement = data.placements("triangle", "right")[1]
    clip = data.colourise(data.render_mask(placement), "red", "gray")
    pixels = torch.from_numpy(clip).transpose(0, 1)[None] * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        output = pipeline.vae.decode(latents).sample
    assert latents.shape == (1, 16, 3, 8, 8)
    error = float(((output - pixels) / 2).square().mean())
    assert -10 * np.log10(error) > 34.0


def generate(pipeline: Any, template: dict[str, Any], prompts: list[str], frames: int, steps: int) -> list[data.Array]:
    output = pipeline(
        prompts,
        prompt_template=template,
        height=data.SIZE,
        width=data.SIZE,
        num_frames=frames,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="np",
    )
    return [np.asarray(clip, np.float32).transpose(0, 3, 1, 2) for clip in output.frames]


@pytest.mark.parametrize("frames", [1, 9])
def test_diffusers_generates(pipeline: Any, template: dict[str, Any], frames: int) -> None:
    (clip,) = generate(pipeline, template, ["a red circle moving right on a black background"], frames, steps=2)
    assert clip.shape == (frames, 3, data.SIZE, data.SIZE)
    assert np.isfinite(clip).all()


@pytest.mark.slow
def test_background_and_colour_follow_the_prompt(pipeline: Any, template: dict[str, Any]) -> None:
    scenes = [scene for scene in data.scenes() if scene.held_out][::9]
    clips = generate(pipeline, template, [scene.captions()[0] for scene in scenes], data.FRAMES, steps=20)
    scores = [checker.compare(checker.inspect(c), s) for c, s in zip(clips, scenes, strict=True)]
    assert sum(score.background and score.colour for score in scores) >= len(scores) - 1
