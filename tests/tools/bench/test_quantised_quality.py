"""Recordings repeat the sampling that they were made of; a replaced graph is measured and the bundle left alone."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.tools.bench import calibration_data as data
from reelforge.tools.bench import quantisation_peers as peers
from reelforge.tools.bench.quantised_quality import make_references, measure_quality

REQUEST = Request("a red circle", seed=5, height=32, width=48, frames=5, steps=4)
OTHER = replace(REQUEST, prompt="a blue square moving")


def digests(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("plain") / "graph"
    return folder, peers.write_plain_graph(tiny_bundle, folder)


@pytest.fixture(scope="module")
def recording(tiny_bundle: Path) -> data.Recording:
    return data.record(data.RecordingPipeline(Bundle.open(tiny_bundle, Check.SIZES)), REQUEST)


def test_requests_are_seeded_and_what_is_evaluated_was_never_calibrated() -> None:
    assert data.calibration_requests() == data.calibration_requests() != data.calibration_requests(seed=1)
    calibrated, evaluated = data.calibration_requests(288), data.evaluation_requests(72)
    for what in ("prompt", "seed"):
        values = [[getattr(request, what) for request in requests] for requests in (calibrated, evaluated)]
        assert len({*values[0], *values[1]}) == 288 + 72
    assert (len(data.calibration_requests()), len(data.evaluation_requests())) == (8, 16)
    with pytest.raises(ValueError, match="received: 73   expected: 1 to 72"):
        data.evaluation_requests(73)


def test_a_recording_holds_every_step_of_the_videos_own_sampling(tiny_bundle: Path, recording: data.Recording) -> None:
    pipeline = Pipeline.open(tiny_bundle, check=Check.SIZES)
    resolved = pipeline.resolve(REQUEST)
    unrecorded = pipeline.sample(resolved, pipeline.condition(resolved, pipeline.encode_text(REQUEST.prompt)))
    np.testing.assert_array_equal(recording.latents, unrecorded)

    inputs = recording.inputs
    assert set(inputs) == {info.name for info in pipeline.bundle.stage("dit").inputs}
    assert {len(rows) for rows in inputs.values()} == {resolved.steps} == {len(recording.velocities)}
    # Each step's latents are the Euler step from the one before.
    stepped = inputs["latents"] + recording.velocities * inputs["sigma_step"].reshape(-1, 1, 1, 1, 1, 1)
    np.testing.assert_allclose(stepped[:-1], inputs["latents"][1:], atol=1e-5)
    np.testing.assert_allclose(stepped[-1], recording.latents, atol=1e-5)


def test_files_hold_the_recordings(tiny_bundle: Path, tmp_path: Path, recording: data.Recording) -> None:
    pipeline = data.RecordingPipeline(Bundle.open(tiny_bundle, Check.SIZES))
    (path,) = data.write_recordings(pipeline, [REQUEST], tmp_path / "new" / "folder")
    with np.load(path) as file:
        assert set(file.files) == set(recording.inputs)
        for name, rows in recording.inputs.items():
            np.testing.assert_array_equal(file[name], rows)
    assert (path.parent / "prompts.txt").read_text() == "a red circle\n"


def test_the_plain_graph_computes_the_same(
    tiny_bundle: Path, plain: tuple[Path, list[str]], recording: data.Recording
) -> None:
    folder, layers = plain
    assert len(layers) == 2 * 12 + 2 * 6  # two blocks of each kind
    assert "single.1.proj_mlp" in layers
    assert not {"patch_embed", "final.proj"} & set(layers)
    assert [path.name for path in folder.iterdir()] == ["dit.onnx"]
    graph = onnx.load(folder / "dit.onnx").graph
    assert {tensor.data_location for tensor in graph.initializer} == {onnx.TensorProto.DEFAULT}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert all(node.input[1] in weights for node in graph.node if node.op_type == "Gemm")
    call = {name: rows[0, ...] for name, rows in recording.inputs.items()}
    (velocity,) = InferenceSession(folder / "dit.onnx").run(["velocity"], call)
    np.testing.assert_allclose(velocity, recording.velocities[0], atol=1e-5)


def test_quality_of_the_same_graph_and_of_a_worse_one(
    tiny_bundle: Path, plain: tuple[Path, list[str]], tmp_path: Path
) -> None:
    before = digests(tiny_bundle)
    references = make_references(tiny_bundle, [REQUEST])
    assert references[0].frames.shape == (5, 32, 48, 3)
    same = measure_quality(tiny_bundle, plain[0], references)
    assert same.psnr_db[0] > 80
    assert same.ssim[0] == pytest.approx(1.0)
    assert len(same.cosine) == REQUEST.steps
    assert min(same.cosine) == pytest.approx(1.0)

    worse = Path(shutil.copytree(plain[0], tmp_path / "worse"))
    model = onnx.load(worse / "dit.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("final.proj.weight"))
    values = onnx.numpy_helper.to_array(weight)
    values = values + np.random.default_rng(0).normal(0, 0.1 * values.std(), values.shape).astype(np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    # Data beside the graph comes along, and a file of the bundle's name is replaced and not written into.
    (worse / "weights").mkdir()
    taken = next(path for path in before if path.parent.name == "weights")
    onnx.save(model, worse / "dit.onnx", save_as_external_data=True, location="dit.data")
    shutil.copyfile(taken, worse / "weights" / taken.name)
    quality = measure_quality(tiny_bundle, worse, references)
    assert 10 < quality.psnr_db[0] < 60
    assert 0.9 < min(quality.cosine) < 0.9999
    assert digests(tiny_bundle) == before
    assert [len(cells) > 3 for cells in quality.cells()] == [True] * 5


def test_a_peer_runs_in_a_child_and_a_failure_is_reported(
    tiny_bundle: Path, plain: tuple[Path, list[str]], tmp_path: Path
) -> None:
    graph, layers = plain[0] / "dit.onnx", plain[1]
    pipeline = data.RecordingPipeline(Bundle.open(tiny_bundle, Check.SIZES))
    recordings = data.write_recordings(pipeline, [REQUEST, OTHER], tmp_path / "recordings")
    peer = "onnxruntime int8 Entropy, inputs only"
    run = peers.run_peer(peer, sys.executable, graph, layers, recordings, tmp_path / "one", repeats=1)
    assert run.failure == ""
    assert 0 < run.call_seconds[0] < run.seconds[0]
    assert run.peak_anonymous_bytes[0] > 10e6
    operators = [node.op_type for node in onnx.load(tmp_path / "one" / "dit.onnx").graph.node]
    assert operators.count("Gemm") == len(layers) + 2
    assert operators.count("QuantizeLinear") > 10
    failed = peers.run_peer(peer, sys.executable, tmp_path / "none.onnx", layers, recordings, tmp_path / "two", 1)
    assert "none.onnx" in failed.failure
    lines = peers.peer_lines([replace(run, quality=peers.Quality((math.inf,), (1.0,), (1.0,))), failed])
    assert lines[2].startswith(f"| {peer} | inf | inf | 1.0000 |")
    assert lines[-1] == f"- {peer} failed: `{failed.failure}`"
