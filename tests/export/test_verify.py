"""Verification: right bundles pass, and what is wrong is named with exit code 6."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from reelforge.export.verify import (
    StageParity,
    bundle_stages,
    measure_parity,
    measure_stages,
    require_within,
)
from reelforge.export.verify_weights import compare_weights
from reelforge.runtime.bundle.digest import sha256_of_file
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.errors import BundleError, VerificationError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.recipe import Precision
from tests.bundles import ALL_STAGES, STAGES, TraceMemory, build


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def altered_graph(source: Path, target: Path, stage: str, alter: Callable[[onnx.GraphProto], None]) -> Bundle:
    """Copy a bundle with one graph altered and its manifest sealed anew, as whoever wants to deceive would."""
    shutil.copytree(source, target)
    graph = target / f"{stage}.onnx"
    proto = onnx.load(graph, load_external_data=False)
    alter(proto.graph)
    graph.write_bytes(proto.SerializeToString())
    manifest = from_json(Manifest, json.loads((target / "manifest.json").read_text()))
    files = tuple(
        replace(entry, bytes=graph.stat().st_size, sha256=sha256_of_file(graph)) if entry.path == graph.name else entry
        for entry in manifest.files
    )
    sealed = replace(manifest, files=files).with_content_digest()
    (target / "manifest.json").write_text(json.dumps(to_json(sealed)))
    return Bundle.open(target)


def swap(graph: onnx.GraphProto, one: str, other: str) -> None:
    """Let two weights of equal shape point at each other's bytes."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    first, second = list(tensors[one].external_data), list(tensors[other].external_data)
    assert tensors[one].dims == tensors[other].dims
    for tensor, places in ((tensors[one], second), (tensors[other], first)):
        copies = [(item.key, item.value) for item in places]
        del tensor.external_data[:]
        for key, value in copies:
            tensor.external_data.add(key=key, value=value)


def test_every_stage_is_within_its_tolerance(bundle: Bundle) -> None:
    parities = measure_stages(bundle.path, bundle.manifest, bundle_stages(bundle))
    assert [parity.stage for parity in parities] == list(ALL_STAGES)
    for parity in parities:
        assert parity.within
        assert 0 <= parity.difference <= parity.tolerance == 2e-5
        assert parity.difference > 0 or parity.stage not in STAGES
    require_within(parities)


def test_measuring_twice_gives_the_same(bundle: Bundle) -> None:
    stages = [stage for stage in bundle_stages(bundle) if stage.name in ("clip", "modulation")]
    assert measure_stages(bundle.path, bundle.manifest, stages) == measure_stages(bundle.path, bundle.manifest, stages)


def test_weights_are_the_checkpoint_s_in_either_layout(
    bundle: Bundle, tiny_checkpoint: Path, tiny_tencent_checkpoint: Path
) -> None:
    total = sum(len(stage.weights) for stage in bundle.manifest.stages)
    assert compare_weights(bundle, tiny_checkpoint) == total
    assert compare_weights(bundle, tiny_tencent_checkpoint) == total


@pytest.mark.parametrize(
    ("component", "key", "weight"),
    [
        ("text_encoder_2", "final_layer_norm.bias", "clip.final_layer_norm.bias"),
        ("transformer", "transformer_blocks.0.attn.norm_k.weight", "dit.double.0.image.k_norm.weight"),
        ("vae", "decoder.conv_in.conv.bias", "vae_decoder.decoder.conv_in.conv.bias"),
    ],
)
def test_one_changed_weight_is_named(
    bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path, component: str, key: str, weight: str
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    for file in (path / component).glob("*.safetensors"):
        tensors = load_file(file)
        name = next((name for name in tensors if name in (key, f"text_model.{key}")), None)
        if name is not None:
            tensors[name][1] += 1e-6  # the last bit of a number near one, more or less
            save_file(tensors, file, {"format": "pt"})
    total = sum(len(stage.weights) for stage in bundle.manifest.stages)
    with pytest.raises(VerificationError) as caught:
        compare_weights(bundle, path)
    assert caught.value.exit_code == 6
    for part in (f"1 of {total} weights are not those of {path}", f"received: {weight}", "fix: verify against"):
        assert part in str(caught.value)


def test_many_changed_weights_are_counted(bundle: Bundle, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    file = path / "text_encoder_2" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    clip = bundle.stage("clip")
    with pytest.raises(VerificationError, match=rf"^VerificationError: {len(clip.weights)} of ") as caught:
        compare_weights(bundle, path)
    assert f" and {len(clip.weights) - 5} more" in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "one", "other"),
    [
        ("dit", "double.0.image.q.weight", "double.0.image.k.weight"),
        ("modulation", "time_in.fc2.weight", "pooled_in.fc2.weight"),
        ("clip", "encoder.layers.0.layer_norm1.bias", "encoder.layers.1.layer_norm1.bias"),
    ],
)
def test_a_graph_that_computes_something_else(
    tiny_bundle: Path, tmp_path: Path, stage: str, one: str, other: str
) -> None:
    """Digests are right, weights are right, results are not."""
    altered = altered_graph(tiny_bundle, tmp_path / "b", stage, lambda graph: swap(graph, one, other))
    stages = tuple(item for item in bundle_stages(altered) if item.name == stage)
    (parity,) = parities = measure_stages(altered.path, altered.manifest, stages)
    assert parity.difference > 1e-3
    with pytest.raises(VerificationError) as caught:
        require_within(parities)
    assert caught.value.exit_code == 6
    for part in (f"received: {stage} ", f"expected: {stage} at most 2e-05", "fix: rebuild with --precision fp32"):
        assert part in str(caught.value)
    with pytest.raises(VerificationError, match="differ from their reference"):
        measure_parity(altered.path, altered.manifest, stages)


@pytest.mark.parametrize("output", ["double_modulation", "single_modulation", "final_modulation"])
def test_an_output_that_is_not_a_number(tiny_bundle: Path, tmp_path: Path, output: str) -> None:
    """Whichever of the outputs it is."""

    def alter(graph: onnx.GraphProto) -> None:
        producer = next(node for node in graph.node if output in node.output)
        producer.output[0] = "before"
        for kind, source, target in (("Abs", "before", "a"), ("Neg", "a", "n"), ("Sqrt", "n", output)):
            graph.node.append(onnx.helper.make_node(kind, [source], [target]))

    altered = altered_graph(tiny_bundle, tmp_path / "b", "modulation", alter)
    stages = tuple(item for item in bundle_stages(altered) if item.name == "modulation")
    with pytest.raises(VerificationError, match="received: modulation nan"):
        measure_parity(altered.path, altered.manifest, stages)


def test_a_weight_that_was_altered_is_found_when_the_bundle_is_opened(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    with (copy / "weights" / "dit.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x00\x41")
    with pytest.raises(BundleError, match=r"tensor '.*' of stage 'dit' in file 'weights/dit.safetensors'.* altered"):
        Bundle.open(copy)


def test_the_build_stores_what_it_measured(tiny_checkpoint: Path, tmp_path: Path, trace_memory: TraceMemory) -> None:
    with trace_memory.used():
        built = build(tiny_checkpoint, tmp_path / "b", "clip", "modulation", verify=True)
        plain = build(tiny_checkpoint, tmp_path / "a", "clip", "modulation")
    for stage in built.stages:
        assert stage.parity is not None
        assert 0 < stage.parity <= stage.tolerance
    assert built.content_digest == plain.content_digest
    assert Bundle.open(tmp_path / "b").manifest == built


@pytest.mark.slow
def test_half_precision_and_several_videos(tiny_checkpoint: Path, tmp_path: Path, trace_memory: TraceMemory) -> None:
    with trace_memory.used():
        half = build(tiny_checkpoint, tmp_path / "a", "clip", "dit", precision=Precision.FP16, verify=True)
        several = build(tiny_checkpoint, tmp_path / "b", "dit", batch=3, verify=True)
    for stage in half.stages:
        assert stage.parity is not None
        assert 2e-5 < stage.parity <= 2e-2
    assert several.stages[0].parity is not None
    assert several.stages[0].parity <= 2e-5


def test_nan_is_never_within() -> None:
    assert not StageParity("dit", float("nan"), 1.0).within
    with pytest.raises(VerificationError, match="received: dit nan"):
        require_within([StageParity("dit", float("nan"), 1.0), StageParity("clip", 0.5, 1.0)])
