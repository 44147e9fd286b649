"""Weights in a bundle: referenced where they lie, converted only where they must be, NaNs counted by name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Conversion, Resolved
from reelforge.export.checkpoint.tensor_ref import TensorRef
from reelforge.export.family import FAMILIES
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.export.reference import read_weight
from reelforge.export.stage import Stage
from reelforge.export.weights import WeightPlacer, resolve_stages
from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.errors import BuildError, CheckpointError
from reelforge.runtime.manifest import WeightEntry
from tests.bundles import STAGES
from tests.checkpoints import load_shards

FAMILY = FAMILIES["hunyuan_video"]


def resolve(path: Path) -> tuple[dict[str, Stage], dict[str, dict[str, Resolved]]]:
    checkpoint = open_checkpoint(path)
    spec = FAMILY.spec(checkpoint, Numerics.TENCENT)
    stages = FAMILY.stages(spec, 1)
    resolved = resolve_stages(checkpoint, FAMILY.key_maps[checkpoint.layout], spec, stages)
    return {stage.name: stage for stage in stages}, resolved


@contextmanager
def unsealed(output: Path) -> Iterator[BundleWriter]:
    """A writer whose bundle is thrown away at the end of the block."""
    stack = ExitStack()
    yield stack.enter_context(BundleWriter(output))
    with pytest.raises(RuntimeError, match="without seal"):
        stack.close()


def place(path: Path, output: Path, *names: str) -> tuple[Path, dict[str, dict[str, WeightEntry]], WeightPlacer]:
    """Place stages' weights; the unfinished folder is copied, since a writer that does not seal removes it."""
    stages, resolved = resolve(path)
    kept = output.with_name(f"{output.name}.kept")
    with unsealed(output) as writer:
        placer = WeightPlacer(writer)
        entries = {name: placer.place(stages[name], resolved[name]) for name in names}
        shutil.copytree(writer.folder, kept, copy_function=os.link)
    return kept, entries, placer


# What must be written anew: rows in half-split order, the two parts of a projection whose columns lie side by side, and
# diffusers' final modulation with its halves swapped. Row ranges of Tencent's fused tensors need no conversion.
DIFFUSERS_CONVERTED = {
    "dit": (
        ".q.weight",
        ".q.bias",
        ".k.weight",
        ".k.bias",
        "_norm.weight",
        ".proj_attention.weight",
        ".proj_mlp.weight",
    ),
    "modulation": ("final.linear.weight", "final.linear.bias"),
}
TENCENT_CONVERTED = {"dit": DIFFUSERS_CONVERTED["dit"]}


@pytest.mark.parametrize("layout", ["diffusers", "tencent"])
def test_only_what_needs_another_order_is_converted(
    layout: str, tiny_checkpoint: Path, tiny_tencent_checkpoint: Path
) -> None:
    path, expected = {
        "diffusers": (tiny_checkpoint, DIFFUSERS_CONVERTED),
        "tencent": (tiny_tencent_checkpoint, TENCENT_CONVERTED),
    }[layout]
    _, resolved = resolve(path)
    assert [name for name, weights in resolved.items() if weights] == [
        "refiner",
        "modulation",
        "dit",
        "vae_decoder",
        "llm",
        "clip",
        "input_change",
    ]
    assert resolved["input_change"].items() <= resolved["dit"].items()  # a view, of which nothing is stored twice
    for stage, weights in resolved.items():
        if stage == "input_change":
            continue
        for name, weight in weights.items():
            assert isinstance(weight, Conversion) == name.endswith(expected.get(stage, ("nothing",))), (stage, name)


def test_in_place_weights_are_hard_links(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder, entries, placer = place(tiny_checkpoint, tmp_path / "b", "clip", "dit")
    assert placer.copied == []
    source = tiny_checkpoint / "text_encoder_2" / "model.safetensors"
    files = {entry.file for entry in entries["clip"].values()}
    assert files == {"weights/text_encoder_2.model.safetensors"}
    assert os.path.samefile(folder / files.pop(), source)  # noqa: PTH121
    assert source.stat().st_nlink >= 2
    converted = {name for name, entry in entries["dit"].items() if entry.file == "weights/dit.safetensors"}
    assert converted == {name for name in entries["dit"] if name.endswith(DIFFUSERS_CONVERTED["dit"])}
    with safe_open(folder / "weights/dit.safetensors", "np") as file:  # nothing else is in the file
        assert set(file.keys()) == converted
    assert not (folder / "weights/clip.safetensors").exists()
    shards = {path.name for path in (folder / "weights").glob("transformer.*")}
    assert shards == {Path(entry.file).name for entry in entries["dit"].values()} - {"dit.safetensors"}


def test_entries_say_where_the_values_are(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Read back with another library, and permuted with its own arithmetic."""
    folder, entries, _ = place(tiny_checkpoint, tmp_path / "b", "dit", "modulation")
    stored = load_shards(tiny_checkpoint / "transformer")
    width, head = 64, 32
    for stage in entries.values():
        for entry in stage.values():
            data = (folder / entry.file).read_bytes()[entry.offset : entry.offset + entry.length]
            assert hashlib.sha256(data).hexdigest() == entry.sha256

    def weight(stage: str, name: str) -> torch.Tensor:
        return read_weight(folder, entries[stage][name])

    fused = stored["single_transformer_blocks.1.proj_out.weight"]
    assert torch.equal(weight("dit", "single.1.proj_attention.weight"), fused[:, :width])
    assert torch.equal(weight("dit", "single.1.proj_mlp.weight"), fused[:, width:])
    key = stored["transformer_blocks.0.attn.to_k.weight"].reshape(width // head, head // 2, 2, width)
    halves = torch.cat((key[:, :, 0], key[:, :, 1]), dim=1).reshape(width, width)
    assert torch.equal(weight("dit", "double.0.image.k.weight"), halves)
    scale, shift = stored["norm_out.linear.bias"].chunk(2)
    assert torch.equal(weight("modulation", "final.linear.bias"), torch.cat((shift, scale)))
    patch = stored["x_embedder.proj.weight"]
    assert torch.equal(weight("dit", "patch_embed.weight"), patch.reshape(width, -1))


def test_entries_come_in_the_stage_s_order_and_aligned(tmp_path: Path, tiny_checkpoint: Path) -> None:
    stages, _ = resolve(tiny_checkpoint)
    _, entries, _ = place(tiny_checkpoint, tmp_path / "b", *STAGES)
    for name, stage in ((name, stages[name]) for name in STAGES):
        assert {weight: entry.shape for weight, entry in entries[name].items()} == stage.parameter_shapes()
        assert list(entries[name]) == list(stage.parameter_shapes())
        for entry in entries[name].values():
            assert entry.length == 4 * int(np.prod(entry.shape))
            assert entry.offset % 4 == 0


def test_both_formats_give_equal_digests(tmp_path: Path, tiny_checkpoint: Path, tiny_tencent_checkpoint: Path) -> None:
    _, ours, _ = place(tiny_checkpoint, tmp_path / "a", *STAGES)
    _, theirs, _ = place(tiny_tencent_checkpoint, tmp_path / "b", *STAGES)
    for stage in STAGES:
        assert {name: entry.sha256 for name, entry in ours[stage].items()} == {
            name: entry.sha256 for name, entry in theirs[stage].items()
        }


def test_another_file_system_costs_a_copy(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, resolved = resolve(tiny_checkpoint)

    def no_link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    with unsealed(tmp_path / "b") as writer:
        placer = WeightPlacer(writer)
        entries = placer.place(stages["clip"], resolved["clip"])
        assert placer.copied == ["weights/text_encoder_2.model.safetensors"]
        copy = writer.folder / placer.copied[0]
        source = tiny_checkpoint / "text_encoder_2" / "model.safetensors"
        assert copy.read_bytes() == source.read_bytes()
        assert not copy.samefile(source)
        assert {entry.file for entry in entries.values()} == {placer.copied[0]}


def test_elements_that_are_not_finite_are_counted_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    for shard in sorted((path / "transformer").glob("*.safetensors")):
        tensors = load_file(shard)
        if (converted := tensors.get("transformer_blocks.0.attn.to_q.weight")) is not None:
            converted[3, 4:6] = float("nan")
        if (in_place := tensors.get("proj_out.bias")) is not None:
            in_place[0] = float("-inf")
        save_file(tensors, shard, {"format": "pt"})
    _, _, placer = place(path, tmp_path / "b", "refiner", "dit")
    assert placer.non_finite == {"dit.double.0.image.q.weight": 2, "dit.final.proj.bias": 1}


def test_progress_counts_every_byte_and_can_stop(tmp_path: Path, tiny_checkpoint: Path) -> None:
    stages, resolved = resolve(tiny_checkpoint)
    seen: list[int] = []
    with unsealed(tmp_path / "b") as writer:
        WeightPlacer(writer).place(stages["dit"], resolved["dit"], progress=seen.append)
    assert sum(seen) == sum(weight.nbytes for weight in resolved["dit"].values())

    class Enough(BaseException): ...

    def stop(_: int) -> None:
        raise Enough

    with pytest.raises(Enough), BundleWriter(tmp_path / "b") as writer:
        WeightPlacer(writer).place(stages["dit"], resolved["dit"], progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_what_must_be_converted(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, resolved = resolve(tiny_checkpoint)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BuildError) as caught, BundleWriter(tmp_path / "b") as writer:
        WeightPlacer(writer).place(stages["dit"], resolved["dit"])
    needed = sum(weight.nbytes for weight in resolved["dit"].values() if isinstance(weight, Conversion))
    for part in ("the disk is full", "1,000 bytes free", f"{needed:,} bytes", "fix: free space"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_types_that_are_no_weights(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    file = path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[name] = tensors[name].double()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        resolve(path)
    assert name in str(caught.value)
    assert "F64" in str(caught.value)


def test_references_stay_in_the_checkpoint(tiny_checkpoint: Path) -> None:
    """Resolving reads headers and makes nothing."""
    _, resolved = resolve(tiny_checkpoint)
    for weights in resolved.values():
        for weight in weights.values():
            ref = weight if isinstance(weight, TensorRef) else weight.ref
            assert tiny_checkpoint in ref.path.parents
