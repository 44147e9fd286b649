"""Builds: what a bundle holds, and what its content digest does and does not depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from reelforge.export.build_request import BuildEvents
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import Numerics
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.manifest import Manifest, StageEntry
from reelforge.runtime.recipe import Precision
from reelforge.runtime.spec import GuidanceRounding, VaeTiling
from tests.bundles import ALL_STAGES, build
from tests.checkpoints import TEMPLATE, make_diffusers_checkpoint

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def test_what_is_in_a_bundle(tiny_bundle: Path, manifest: Manifest, tiny_checkpoint: Path) -> None:
    files = sorted(path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file())
    shards = sorted(path.name for path in (tiny_checkpoint / "transformer").glob("*.safetensors"))
    weights = [
        "weights/dit.safetensors",
        "weights/modulation.safetensors",
        "weights/text_encoder.model.safetensors",
        "weights/text_encoder_2.model.safetensors",
        *(f"weights/transformer.{name}" for name in shards),
        "weights/vae.diffusion_pytorch_model.safetensors",
    ]
    graphs = [f"{stage}.onnx" for stage in ALL_STAGES]
    assert files == sorted([*graphs, "manifest.json", "tokenizers/clip.json", "tokenizers/llm.json", *weights])
    assert [entry.path for entry in manifest.files] == [name for name in files if name != "manifest.json"]
    for entry in manifest.files:
        data = (tiny_bundle / entry.path).read_bytes()
        assert entry.bytes == len(data)
        expected = None if entry.path.startswith("weights/") else hashlib.sha256(data).hexdigest()
        assert entry.sha256 == expected


def test_what_a_manifest_says(manifest: Manifest, tiny_checkpoint: Path) -> None:
    assert [stage.name for stage in manifest.stages] == list(ALL_STAGES)
    assert manifest.recipe.precision == dict.fromkeys(ALL_STAGES, Precision.FP32)
    assert (manifest.recipe.shapes, manifest.recipe.batch, str(manifest.target)) == ((), 1, "cpu")
    assert (manifest.prompt_template.text, manifest.prompt_template.source) == (TEMPLATE, "checkpoint")
    about = json.loads((tiny_checkpoint / "prompt_template.json").read_text())
    assert manifest.prompt_template.crop_start == about["crop_start"]
    assert {key: manifest.provenance[key] for key in ("checkpoint_layout", "numerics")} == {
        "checkpoint_layout": "diffusers",
        "numerics": "diffusers",
    }
    assert {"reelforge", "torch", "onnx", "onnx-ir", "onnxscript", "transformers", "python"} <= set(manifest.provenance)
    assert manifest.spec.guidance_rounding is GuidanceRounding.NONE
    assert manifest.spec.tiling == VaeTiling(tile=32, stride=24, frame_window=4, frame_stride=3)
    assert all(stage.parity is None for stage in manifest.stages)


def test_manifest_entries_are_what_the_graphs_refer_to(tiny_bundle: Path, manifest: Manifest) -> None:
    for stage in manifest.stages:
        proto = onnx.load(tiny_bundle / stage.graph, load_external_data=False)
        external = {}
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {item.key: item.value for item in tensor.external_data}
                external[tensor.name] = (place["location"], int(place["offset"]), int(place["length"]))
        assert external == {weight.name: (weight.file, weight.offset, weight.length) for weight in stage.weights}


def test_in_place_weights_take_no_room(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    sources = {
        "text_encoder.model.safetensors": tiny_checkpoint / "text_encoder" / "model.safetensors",
        "vae.diffusion_pytorch_model.safetensors": tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors",
    }
    for name, source in sources.items():
        assert (tiny_bundle / "weights" / name).stat().st_ino == source.stat().st_ino
        assert source.stat().st_nlink >= 2
    for name in ("dit", "modulation"):
        assert (tiny_bundle / "weights" / f"{name}.safetensors").stat().st_nlink == 1


def test_both_checkpoint_formats_give_one_digest(
    tiny_tencent_checkpoint: Path, tmp_path: Path, manifest: Manifest
) -> None:
    other = build(tiny_tencent_checkpoint, tmp_path / "b")
    assert other.content_digest == manifest.content_digest
    for ours, theirs in zip(manifest.stages, other.stages, strict=True):
        assert ours.graph_digest == theirs.graph_digest
    assert other.provenance["checkpoint_layout"] == "tencent"
    assert Bundle.open(tmp_path / "b").manifest == other
    names = [entry.path for entry in other.files if entry.path.startswith("weights/")]
    assert "weights/transformer.mp_rank_00_model_states.pt" in names  # referenced inside the pickle, never run
    assert "weights/modulation.safetensors" not in names  # Tencent's halves are in our order


def test_a_subset_of_stages(tiny_checkpoint: Path, tmp_path: Path, manifest: Manifest) -> None:
    done: list[StageEntry] = []
    part = build(tiny_checkpoint, tmp_path / "b", "refiner", "clip", events=BuildEvents(stage=done.append))
    assert [stage.name for stage in part.stages] == ["clip", "refiner"]  # in the pipeline's order
    assert list(part.stages) == done == [manifest.stage("clip"), manifest.stage("refiner")]
    assert part.recipe.precision == dict.fromkeys(("clip", "refiner"), Precision.FP32)
    assert not {"dit.onnx", "weights/dit.safetensors"} & {entry.path for entry in part.files}
    assert part.content_digest != manifest.content_digest


def test_progress_reaches_the_end_of_every_stage(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    events = BuildEvents(weights=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    built = build(tiny_checkpoint, tmp_path / "b", "clip", "modulation", events=events)
    for stage in built.stages:
        total = sum(weight.length for weight in stage.weights)
        assert seen[stage.name][-1] == (total, total)
        assert seen[stage.name] == sorted(seen[stage.name])


def test_precision_is_part_of_the_content(tiny_checkpoint: Path, tmp_path: Path) -> None:
    full = build(tiny_checkpoint, tmp_path / "a", "clip")
    half = build(tiny_checkpoint, tmp_path / "b", "clip", precision=Precision.FP16)
    assert full.content_digest != half.content_digest
    assert full.stages[0].graph_digest != half.stages[0].graph_digest
    assert full.stages[0].weights == half.stages[0].weights  # cast in the graph, not on the disk
    assert (full.stages[0].tolerance, half.stages[0].tolerance) == (2e-5, 2e-2)


def test_numerics_change_what_the_runtime_does_but_no_graph(
    tiny_checkpoint: Path, tmp_path: Path, manifest: Manifest
) -> None:
    other = build(tiny_checkpoint, tmp_path / "b", "clip", "vae_decoder", numerics=Numerics.TENCENT)
    assert other.spec.guidance_rounding is GuidanceRounding.BF16
    assert other.spec.tiling == VaeTiling(tile=32, stride=24, frame_window=16, frame_stride=12)
    assert replace(
        other.spec, guidance_rounding=manifest.spec.guidance_rounding, tiling=manifest.spec.tiling
    ) == manifest.spec  # fmt: skip
    assert list(other.stages) == [manifest.stage("clip"), manifest.stage("vae_decoder")]


def test_the_prompt_template_is_content_but_no_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    usual = build(tiny_checkpoint, tmp_path / "a", "clip")
    (tmp_path / "mine.txt").write_text("<|start_header_id|>user<|end_header_id|>{}<|eot_id|>\n", encoding="utf-8")
    other = build(tiny_checkpoint, tmp_path / "b", "clip", prompt_template=tmp_path / "mine.txt")
    assert other.prompt_template.text == "<|start_header_id|>user<|end_header_id|>{}<|eot_id|>"
    assert other.prompt_template.crop_start == 1 + 1 + len("user") + 1
    assert other.prompt_template.source == "--prompt-template"
    assert other.content_digest != usual.content_digest
    assert other.stages == usual.stages


def test_the_same_weights_elsewhere_are_the_same_content(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint in one file per component instead of seven, and in another folder: equal digest."""
    make_diffusers_checkpoint(tmp_path / "one", seed=1, max_shard_size="1GB")
    names = ("modulation", "refiner")
    assert (
        build(tmp_path / "one", tmp_path / "a", *names).content_digest
        == build(tiny_checkpoint, tmp_path / "b", *names).content_digest
    )


def test_weights_on_another_file_system_are_copied_with_a_notice(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = build(tiny_checkpoint, tmp_path / "a", "clip")

    def no_link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    notices: list[str] = []
    copied = build(tiny_checkpoint, tmp_path / "b", "clip", events=BuildEvents(notice=notices.append))
    assert notices == [
        "weights/text_encoder_2.model.safetensors was copied: the checkpoint lies on another file system, which hard "
        "links cannot cross."
    ]
    assert copied == linked
    assert (tmp_path / "b" / "weights" / "text_encoder_2.model.safetensors").stat().st_nlink == 1
    Bundle.open(tmp_path / "b")


def test_weights_that_are_not_finite_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    file = path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[name][2:5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    notices: list[str] = []
    build(path, tmp_path / "b", "clip", events=BuildEvents(notice=notices.append))
    assert notices == ["warning: the weight clip.final_layer_norm.bias holds 3 NaN or infinite elements."]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_checkpoint_is_referenced_as_it_is(tmp_path: Path, dtype: str) -> None:
    """Stored in two bytes, computed in fp32: cast in the graph. Verified against PyTorch while it is built."""
    import torch

    path = make_diffusers_checkpoint(tmp_path / "c", seed=1, dtype=getattr(torch, dtype))
    built = build(path, tmp_path / "b", "clip", "modulation", "dit", verify=True)
    for stage in built.stages:
        assert {weight.dtype for weight in stage.weights} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
        assert all(weight.length == 2 * int(np.prod(weight.shape)) for weight in stage.weights)
        assert stage.nodes["Cast"] == len(stage.weights)
        assert stage.parity is not None
        assert 0 < stage.parity <= stage.tolerance
    converted = (tmp_path / "b" / "weights" / "dit.safetensors").stat().st_size
    assert converted < 0.6 * sum(weight.length for weight in built.stages[-1].weights)
