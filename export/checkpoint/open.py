"""Opens a checkpoint folder, whichever of the known layouts it has. Reads headers only."""

from __future__ import annotations

from pathlib import Path

from reelforge.export.checkpoint.component import Checkpoint
from reelforge.export.checkpoint.diffusers_folder import is_diffusers_folder, open_diffusers_folder
from reelforge.export.checkpoint.tencent_folder import is_tencent_folder, open_tencent_folder
from reelforge.runtime.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder ``path``, its headers read and checked, its weights untouched.

    Raises:
        CheckpointError: If there is none, or it is of another family, incomplete, damaged or unsafe.
    """
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            f"{path} is not a checkpoint folder.",
            received=what,
            expected="the folder that holds the checkpoint's files",
            fix="give the folder, not a file in it" if path.exists() else "check the path",
        )
    if is_diffusers_folder(path):
        return open_diffusers_folder(path)
    if is_tencent_folder(path):
        return open_tencent_folder(path)
    raise CheckpointError(
        f"{path} holds no checkpoint that is known.",
        received=", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "an empty folder",
        expected="model_index.json and transformer/ (diffusers), or hunyuan-video-t2v-720p/transformers/ (Tencent)",
        fix="give the checkpoint's root folder",
    )
