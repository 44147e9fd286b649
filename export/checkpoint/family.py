"""Recognises what a checkpoint is from a class name or from its tensors' names, for the message that refuses it.

The module knows other model families by a telling key each and nothing more about them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SUPPORTED = "HunyuanVideo (text to video)"

_CLASSES = {
    r"HunyuanVideo(Pipeline|Transformer3DModel)": SUPPORTED,
    r"HunyuanVideoImageToVideo.*|HunyuanSkyreelsImageToVideo.*": "HunyuanVideo image to video",
    r"HunyuanVideoFramepack.*": "FramePack",
    r"HunyuanVideo15.*": "HunyuanVideo 1.5",
    r"HunyuanDiT.*|HunyuanImage.*": "Hunyuan image model",
    r"Wan.*": "Wan",
    r"Flux.*": "FLUX",
    r"CogVideoX.*": "CogVideoX",
    r"LTX.*": "LTX-Video",
    r"Mochi.*": "Mochi",
    r"StableDiffusion.*": "Stable Diffusion",
}
_KEYS = {
    SUPPORTED: (r"double_blocks\.0\.img_attn_qkv\.", r"context_embedder\.token_refiner\.refiner_blocks\.0\.norm_out\."),
    "FLUX": (r"double_blocks\.0\.img_attn\.qkv\.", r"single_transformer_blocks\.0\.proj_mlp\."),
    "Wan": (r"blocks\.0\.self_attn\.q\.", r"condition_embedder\.time_proj\."),
    "CogVideoX": (r"transformer_blocks\.0\.norm1\.norm\.",),
    "LTX-Video": (r"adaln_single\.", r"transformer_blocks\.0\.scale_shift_table"),
    "Mochi": (r"blocks\.0\.attn\.qkv_x\.", r"transformer_blocks\.0\.attn1\.add_q_proj\."),
    "Stable Diffusion 3": (r"joint_blocks\.0\.",),
    "Stable Diffusion": (r"input_blocks\.0\.", r"down_blocks\.0\."),
    "a language model": (r"(model\.)?layers\.0\.self_attn\.q_proj\.",),
}


def family_of_class(name: str) -> str:
    """Return the family that a diffusers class name belongs to, or the name itself."""
    return next((family for pattern, family in _CLASSES.items() if re.fullmatch(pattern, name)), name)


def family_of_keys(keys: Iterable[str]) -> str | None:
    """Return the family that tensors' names seem to belong to, or None if they tell nothing."""
    names = list(keys)
    for family, patterns in _KEYS.items():
        if any(re.search(rf"(^|\.){pattern}", name) for pattern in patterns for name in names):
            return family
    return None
