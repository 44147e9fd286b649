"""Assembly of the checkpoint folder: fp16 weights in the diffusers layout, tokenizers, scheduler and template.

Standardisation of the latents is folded into the VAE's ``quant_conv`` and ``post_quant_conv``, so that
``latents / scaling_factor`` is what ``vae.decode`` takes, as for the released model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo.train import dit, latents, state, text, vae

SHIFT = 5.0
# What a request of reelforge gets when it does not say otherwise; the published checkpoints have no such file.
SAMPLING_DEFAULTS = {
    "steps": 20,
    "shift": SHIFT,
    "guidance": 6.0,
    "height": 64,
    "width": 64,
    "frames": 9,
    "frames_per_second": 8,
}
INDEX = {
    "_class_name": "HunyuanVideoPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold_standardisation(model: AutoencoderKLHunyuanVideo, mean: Tensor, deviation: Tensor) -> None:
    """Make ``model`` speak standardised latents times its scaling factor's inverse; mean and deviation are [16]."""
    scale = float(model.config.scaling_factor)
    channels = latents.LATENT_CHANNELS
    model.post_quant_conv.weight[:] = torch.diag(deviation * scale)[:, :, None, None, None]
    model.post_quant_conv.bias[:] = mean
    model.quant_conv.weight[:channels, :channels] = torch.diag(1 / (deviation * scale))[:, :, None, None, None]
    model.quant_conv.bias[:channels] = -mean / (deviation * scale)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, tokens: dict[str, str], length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(folder / "special_tokens_map.json", dict(tokens))


def _save_half(module: nn.Module, folder: Path) -> None:
    module.half().save_pretrained(folder, safe_serialization=True)


def transformer() -> tuple[HunyuanVideoTransformer3DModel, str]:
    """Return the best trained transformer there is, and the state it came from.

    Raises:
        FileNotFoundError: before any training.
    """
    for name in ("distilled", "dit"):
        stored = state.load(name)
        if stored is not None:
            model = dit.build(0)
            model.load_state_dict(stored["average"])
            return model, name
    raise FileNotFoundError("no trained transformer in the state folder\n  fix: run `python -m demo.train dit` first")


def write(target: Path) -> None:
    """Write the whole checkpoint from the state folder to ``target``, except the model card."""
    target.mkdir(parents=True, exist_ok=True)
    statistics = state.load("statistics")
    assert statistics is not None
    autoencoder = vae.trained()
    fold_standardisation(autoencoder, statistics["mean"], statistics["deviation"])
    model, source = transformer()
    print("transformer from state", source)
    _save_half(autoencoder, target / "vae")
    _save_half(model, target / "transformer")
    _save_half(text.llm(), target / "text_encoder")
    _save_half(text.clip(), target / "text_encoder_2")
    specials = text.LLM_SPECIALS
    _write_tokenizer(
        text.llm_tokenizer(),
        target / "tokenizer",
        {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[5]},
        512,
    )
    start, end = text.CLIP_SPECIALS
    _write_tokenizer(
        text.clip_tokenizer(),
        target / "tokenizer_2",
        {"bos_token": start, "eos_token": end, "pad_token": end},
        77,
    )
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(target / "scheduler")
    _write_json(target / "model_index.json", INDEX)
    _write_json(target / "prompt_template.json", {"template": text.TEMPLATE, "crop_start": text.crop_start()})
    _write_json(target / "sampling_defaults.json", SAMPLING_DEFAULTS)
