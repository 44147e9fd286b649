"""Finds the weight files of one folder: one file, or shards with an index; safetensors first, PyTorch's as a fallback.

The index (``weight_map``) is held against the shards both ways, so that a stray or stale shard is noticed here. The
module knows the naming conventions of diffusers and transformers, and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reelforge.export.checkpoint.component import read_json
from reelforge.export.checkpoint.safetensors_file import read_safetensors
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.checkpoint.torch_file import read_torch_file
from reelforge.runtime.errors import CheckpointError

DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS = ("model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin", ".pt")


def read_weights(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of one weight file, by its suffix (safetensors, or PyTorch's zip file)."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)


def read_weight_folder(folder: Path, stems: Sequence[str]) -> dict[str, TensorRef]:
    """Return every tensor of the model whose files in ``folder`` begin with one of ``stems``.

    Raises:
        CheckpointError: If there are none, a shard is missing, or index and shards disagree.
    """
    candidates = [f"{stem}{suffix}" for suffix in _SUFFIXES for stem in stems]
    for name in candidates:
        if (folder / f"{name}.index.json").is_file():
            return _read_sharded(folder, folder / f"{name}.index.json")
        if (folder / name).is_file():
            return read_weights(folder / name)
    found = sorted(entry.name for entry in folder.iterdir())
    raise CheckpointError(
        f"{folder} holds no weights.",
        received=", ".join(found[:10]) or "an empty folder",
        expected=" or ".join([f"{candidates[0]}.index.json", *candidates]),
        fix="download the missing files, or rename variants such as '.fp16.safetensors' to the plain name",
    )


def _read_sharded(folder: Path, index_path: Path) -> dict[str, TensorRef]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{index_path} has no weight_map of names to shards.",
            expected='{"weight_map": {"tensor": "file"}}',
            fix="download the index again",
        )
    tensors: dict[str, TensorRef] = {}
    for shard in sorted(set(weight_map.values())):
        listed = [name for name, holder in weight_map.items() if holder == shard]
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index_path} names a shard outside its folder.",
                received=shard,
                expected="a file name",
                fix="download the index again",
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"the shard {folder / shard} is missing.",
                received=f"no file; it should hold {len(listed)} tensors: {shortened(listed)}",
                expected=f"every shard that {index_path.name} lists",
                fix="download the missing shard",
            )
        stored = read_weights(folder / shard)
        _compare(index_path, folder / shard, listed, stored)
        tensors.update(stored)
    return tensors


def _compare(index_path: Path, shard: Path, listed: Sequence[str], stored: dict[str, TensorRef]) -> None:
    absent = sorted(set(listed) - set(stored))
    extra = sorted(set(stored) - set(listed))
    if absent or extra:
        parts = [
            f"{len(names)} {what}: {shortened(names)}"
            for names, what in ((absent, "listed but not stored"), (extra, "stored but not listed"))
            if names
        ]
        raise CheckpointError(
            f"the shard {shard} and {index_path.name} disagree.",
            received="; ".join(parts),
            expected="the shard to hold exactly what the index lists",
            fix="download the shard and the index again, both from one revision",
        )


def shortened(names: Sequence[str], limit: int = 10) -> str:
    """Return the first ``limit`` names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
