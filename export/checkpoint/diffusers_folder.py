"""Opens a folder in diffusers' layout: one folder per component, ``model_index.json`` and a scheduler at the root.

Headers and small JSON files only. The module knows where files lie, not what the tensors mean.
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
from reelforge.export.checkpoint.family import SUPPORTED, family_of_class, family_of_keys
from reelforge.export.checkpoint.weight_files import DIFFUSERS_STEMS, TRANSFORMERS_STEMS, read_weight_folder
from reelforge.runtime.errors import CheckpointError

_STEMS = {
    "transformer": DIFFUSERS_STEMS,
    "vae": DIFFUSERS_STEMS,
    "text_encoder": TRANSFORMERS_STEMS,
    "text_encoder_2": TRANSFORMERS_STEMS,
}


def is_diffusers_folder(path: Path) -> bool:
    """Return whether ``path`` looks like diffusers' layout, of whatever model."""
    return (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file()


def open_diffusers_folder(path: Path) -> Checkpoint:
    """Open a checkpoint in diffusers' layout.

    Raises:
        CheckpointError: If it is of another family, incomplete or damaged.
    """
    index = read_json_if_there(path / "model_index.json") or {}
    config = read_json_if_there(path / "transformer" / "config.json") or {}
    for source, class_name in (
        ("model_index.json", index.get("_class_name")),
        ("transformer/config.json", config.get("_class_name")),
    ):
        if class_name is not None and family_of_class(str(class_name)) != SUPPORTED:
            raise wrong_family(path, f"{family_of_class(str(class_name))} ({source} says {class_name})")
    components = {name: _component(path / name, name) for name in _STEMS if (path / name).is_dir()}
    if "transformer" not in components:
        raise CheckpointError(
            f"{path} has no folder transformer/.",
            received=", ".join(sorted(entry.name for entry in path.iterdir())[:10]),
            expected="transformer/ with config.json and weights",
            fix="download the missing folder",
        )
    family = family_of_keys(components["transformer"].tensors)
    if family not in (SUPPORTED, None):
        raise wrong_family(path, f"{family} by the names of its tensors")
    folders = {"llm": path / "tokenizer", "clip": path / "tokenizer_2"}
    return Checkpoint(
        path,
        Layout.DIFFUSERS,
        components,
        scheduler=read_json_if_there(path / "scheduler" / "scheduler_config.json"),
        tokenizers={name: folder if folder.is_dir() else None for name, folder in folders.items()},
        prompt_template=first_file([path], "prompt_template.json"),
        sampling_defaults=first_file([path], "sampling_defaults.json"),
    )


def _component(folder: Path, name: str) -> Component:
    tensors = read_weight_folder(folder, _STEMS[name])
    return component(name, tensors, read_json_if_there(folder / "config.json"), folder)


def wrong_family(path: Path, what: str) -> CheckpointError:
    """Return the error for a checkpoint that seems to be ``what``."""
    return CheckpointError(
        f"{path} is a checkpoint of another family.",
        received=f"it seems to be {what}",
        expected=SUPPORTED,
        fix="give a HunyuanVideo text-to-video checkpoint, in diffusers' or Tencent's layout",
    )
