"""Opens a folder in Tencent's layout: the files that HunyuanVideo was published as (specification, section 7).

``hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt``, a VAE beside or inside that folder, and both text
encoders in transformers' layout with their tokenizers in the same folders. Safetensors files with the same names are
taken too. Headers and small JSON files only; the module knows where files lie, not what the tensors mean.
"""

from __future__ import annotations

from pathlib import Path

from reelforge.export.checkpoint.component import (
    Checkpoint,
    Component,
    Layout,
    component,
    first_file,
    read_json_if_there,
)
from reelforge.export.checkpoint.diffusers_folder import wrong_family
from reelforge.export.checkpoint.family import SUPPORTED, family_of_keys
from reelforge.export.checkpoint.weight_files import TRANSFORMERS_STEMS, read_weight_folder, read_weights
from reelforge.runtime.errors import CheckpointError

INNER_FOLDER = "hunyuan-video-t2v-720p"
TRANSFORMER_STEM = "mp_rank_00_model_states"
_SUFFIXES = (".safetensors", ".pt")


def is_tencent_folder(path: Path) -> bool:
    """Return whether ``path`` is the root or the inner folder of Tencent's layout."""
    return _inner(path) is not None


def open_tencent_folder(path: Path) -> Checkpoint:
    """Open a checkpoint in Tencent's layout, given its root or the folder ``hunyuan-video-t2v-720p``.

    Raises:
        CheckpointError: If it is of another family, incomplete or damaged.
    """
    inner = _inner(path)
    if inner is None:
        raise CheckpointError(
            f"{path} has no {INNER_FOLDER}/transformers.", expected=f"{TRANSFORMER_STEM}.pt in it", fix="give the root"
        )
    # The text encoders lie beside the inner folder; a user may have put them inside.
    roots = [path, inner] if inner != path else [path, path.parent]
    weights = _weight_file(inner / "transformers", TRANSFORMER_STEM)
    if weights is None:
        raise CheckpointError(
            f"{inner / 'transformers'} holds no transformer weights.",
            received=", ".join(sorted(entry.name for entry in (inner / "transformers").iterdir())[:10]) or "nothing",
            expected=f"{TRANSFORMER_STEM}.pt",
            fix="download it; the fp8 variant needs its scale map and is not read",
        )
    transformer = component("transformer", read_weights(weights), None, weights)
    family = family_of_keys(transformer.tensors)
    if family != SUPPORTED:
        raise wrong_family(path, f"{family or 'unknown'} by the names of its tensors")
    components = {"transformer": transformer}
    vae = next((found for root in roots if (found := _vae(root / "vae"))), None)
    if vae is not None:
        components["vae"] = vae
    tokenizers: dict[str, Path | None] = {}
    for name, tokenizer in (("text_encoder", "llm"), ("text_encoder_2", "clip")):
        folder = next((root / name for root in roots if (root / name).is_dir()), None)
        has_tokenizer = folder is not None and any(folder.glob("tokenizer*"))
        tokenizers[tokenizer] = folder if has_tokenizer else None
        if folder is not None:
            tensors = read_weight_folder(folder, TRANSFORMERS_STEMS)
            components[name] = component(name, tensors, read_json_if_there(folder / "config.json"), folder)
    return Checkpoint(
        path,
        Layout.TENCENT,
        components,
        tokenizers=tokenizers,
        prompt_template=first_file(roots, "prompt_template.json"),
        sampling_defaults=first_file(roots, "sampling_defaults.json"),
    )


def _inner(path: Path) -> Path | None:
    candidates = [path, path / INNER_FOLDER]
    return next((folder for folder in candidates if (folder / "transformers").is_dir()), None)


def _weight_file(folder: Path, stem: str) -> Path | None:
    candidates = [folder / f"{stem}{suffix}" for suffix in _SUFFIXES]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _vae(folder: Path) -> Component | None:
    weights = _weight_file(folder, "pytorch_model")
    if weights is None:
        return None
    return component("vae", read_weights(weights), read_json_if_there(folder / "config.json"), weights)
