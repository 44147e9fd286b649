"""Builds with 8-bit stages: what is in the bundle, where its scales come from, the gate, and what can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from reelforge.calibration.scale_file import read_scale_file
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export.build_request import CalibrationRequest
from reelforge.export.verify_weights import compare_weights
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import ReelforgeError, VerificationError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.recipe import Precision
from reelforge.runtime.request import Request
from tests.bundles import build
from tests.export.quantised_builds import STEPS, altered

pytestmark = pytest.mark.usefixtures("remembered_traces")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b"


def weight_types(manifest: Manifest, stage: str) -> dict[str, str]:
    entry = manifest.stage(stage)
    assert entry is not None
    return {weight.name: weight.dtype for weight in entry.weights}


# What is built.


@pytest.mark.parametrize(("precision", "code"), [(Precision.INT8, "I8"), (Precision.FP8, "F8_E4M3")])
def test_a_quantised_bundle(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest, precision: Precision, code: str
) -> None:
    manifest = build(tiny_checkpoint, output, precision=precision, calibration=request_)
    types = weight_types(manifest, "dit")
    layers = {name.removesuffix(".weight") for name, kind in types.items() if kind == code}
    assert {layer.split(".")[0] for layer in layers} == {"double", "single"}
    assert all(types[f"{layer}.weight.scale"] == "F32" for layer in layers)
    # In high precision by default, and every other stage whole.
    assert code not in (types["patch_embed.weight"], types["final.proj.weight"], types["single.0.q_norm.weight"])
    for stage in ("llm", "clip", "refiner", "modulation", "vae_decoder"):
        assert code not in weight_types(manifest, stage).values()
    graph = onnx.load(output / "dit.onnx", load_external_data=False).graph
    reads_codes = {"int8": "Transpose", "fp8": "DequantizeLinear"}[precision.value]
    assert sum(node.op_type == reads_codes and node.input[0].endswith(".weight") for node in graph.node) == len(layers)
    # Nothing of the checkpoint is left in a stage whose weights are rewritten.
    entry = manifest.stage("dit")
    assert entry is not None
    assert {Path(weight.file).name.split(".")[0] for weight in entry.weights} == {"dit"}
    assert entry.tolerance is None
    assert manifest.quality is not None
    assert manifest.quality.steps == STEPS
    assert set(manifest.quality.stages) == {"dit"}
    assert manifest.quality.velocity_cosine_worst > 0.98
    # It opens with every digest checked, and generates.
    frames = Pipeline.open(output).generate(Request("a red ball", 32, 48, 5, STEPS, 3))
    assert frames.shape == (5, 32, 48, 3)


def test_attention_in_int8(tiny_checkpoint: Path, output: Path, request_: CalibrationRequest) -> None:
    """Beside layers in fp32: every attention of the transformer in integers, calibrated and gated; it generates.

    Stages in high precision are verified against PyTorch; what is in 8 bits, and views of it, the gate measures.
    """
    manifest = build(tiny_checkpoint, output, calibration=request_, attention=Precision.INT8, verify=True)
    graph = onnx.load(output / "dit.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    dit = manifest.spec.dit
    blocks = {*(f"double.{i}" for i in range(dit.double_blocks)), *(f"single.{i}" for i in range(dit.single_blocks))}
    assert {node.name.rpartition(".Attention")[0] for node in graph.node if node.op_type == "Scan"} == blocks
    assert not {"Attention", "DequantizeLinear"} & set(operators)
    assert operators.count("QuantizeLinear") == 3 * len(blocks)
    scales = read_scale_file(output / "scales.safetensors").tensors
    kinds = ("query", "key", "value")
    assert set(scales) == {f"dit.{block}.attention.{kind}" for block in blocks for kind in kinds}
    assert set(weight_types(manifest, "dit").values()) == {"F32"}
    assert {stage.name for stage in manifest.stages if stage.parity is None} == {"dit", "input_change"}
    assert manifest.stage("dit").nodes["MatMulIntegerToFloat"] == 2 * len(blocks)  # type: ignore[union-attr]
    assert manifest.quality is not None
    assert set(manifest.quality.stages) == {"dit"}
    assert 0.99 < manifest.quality.velocity_cosine_worst < 1 - 1e-9
    frames = Pipeline.open(output).generate(Request("a red ball", 32, 48, 5, STEPS, 3))
    assert frames.shape == (5, 32, 48, 3)


def test_int8_inputs_are_shared_and_spent_on_what_was_seen(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    """What ONNX Runtime's fast products need: uint8, one QuantizeLinear for q, k and v, and products of codes."""
    manifest = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    graph = onnx.load(output / "dit.onnx", load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if not item.external_data}
    quantised = {}
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            assert f"{node.name}.weight.scale" in weight_types(manifest, "dit")
            quantised[node.name] = made_by[node.input[0]]
            assert quantised[node.name].op_type == "QuantizeLinear"
    for block, names in (("double.0.image", "qkv"), ("double.1.text", "qkv"), ("single.1", ["q", "k", "v", "fc1"])):
        assert len({quantised[f"{block}.{name}"].name for name in names}) == 1
    ranges = read_scale_file(output / "scales.safetensors").tensors
    for name, node in quantised.items():
        scale, zero_point = (constants[operand] for operand in node.input[1:])
        lowest, highest = ranges[f"dit.{name}.range"].astype(np.float64)
        assert zero_point.dtype == np.uint8
        assert scale == np.float32((highest - lowest) / 255)
        assert abs(zero_point * scale + lowest) <= scale * 0.501
    assert constants[quantised["double.0.image.fc2"].input[2]] < 60  # behind a GELU few codes are below zero
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(output / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(output / "dit.onnx", options, providers=["CPUExecutionProvider"])
    optimised = [node.op_type for node in onnx.load(output / "optimised.onnx", load_external_data=False).graph.node]
    codes = [name for name in weight_types(manifest, "dit") if name.endswith(".weight.scale")]
    assert optimised.count("MatMulIntegerToFloat") == len(quantised) == len(codes)
    assert not {"DequantizeLinear", "QGemm"} & set(optimised)


def test_two_builds_and_a_build_from_scales_are_equal(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    first = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    second = build(tiny_checkpoint, output.with_name("c"), precision=Precision.INT8, calibration=request_)
    assert first.content_digest == second.content_digest
    for name in ("dit.onnx", "scales.safetensors", "weights/dit.int8.safetensors", "weights/dit.scales.safetensors"):
        assert (output / name).read_bytes() == (output.with_name("c") / name).read_bytes(), name
    given = CalibrationRequest(scales=output / "scales.safetensors", gated=False)
    third = build(tiny_checkpoint, output.with_name("d"), precision=Precision.INT8, calibration=given)
    assert third.content_digest == first.content_digest
    assert third.quality is None
    only_dit = build(tiny_checkpoint, output.with_name("e"), "dit", precision=Precision.INT8, calibration=given)
    assert only_dit.stage("dit") == first.stage("dit")
    assert not list(output.parent.glob("*.calibration"))


def test_scales_serve_both_layouts(
    tiny_checkpoint: Path, tiny_tencent_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    first = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    given = CalibrationRequest(scales=output / "scales.safetensors", gated=False)
    other = build(tiny_tencent_checkpoint, output.with_name("t"), precision=Precision.INT8, calibration=given)
    assert other.content_digest == first.content_digest


def test_smoothing_moves_factors_into_the_modulation(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    smoothed = replace(request_, smoothing=0.5, method=ScaleMethod.MSE)
    plain = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    manifest = build(tiny_checkpoint, output.with_name("s"), precision=Precision.INT8, calibration=smoothed)
    files = {weight.name: weight.file for weight in manifest.stage("modulation").weights}  # type: ignore[union-attr]
    assert files["double.0.image.linear.weight"] == "weights/modulation.safetensors"
    assert manifest.stage("modulation") != plain.stage("modulation")
    assert manifest.stage("clip") == plain.stage("clip")
    assert manifest.quality is not None
    assert manifest.quality.velocity_cosine_worst > 0.98  # a fold that is forgotten or doubled gives about 0.5


def test_every_stage_has_its_precision(tiny_checkpoint: Path, output: Path, request_: CalibrationRequest) -> None:
    precision = {"dit": Precision.FP8, "llm": Precision.INT8, "vae_decoder": Precision.INT8, "clip": Precision.FP16}
    manifest = build(
        tiny_checkpoint,
        output,
        precision=precision,
        kept={"dit": ("single.*.proj_mlp", "double.0.*")},
        attention=Precision.FP8,
        calibration=request_,
    )
    types = weight_types(manifest, "dit")
    assert types["single.0.proj_mlp.weight"] not in ("F8_E4M3", "I8")
    assert types["double.0.image.q.weight"] not in ("F8_E4M3", "I8")
    assert types["single.0.fc1.weight"] == "F8_E4M3"
    assert "I8" in weight_types(manifest, "llm").values()
    assert "I8" in weight_types(manifest, "vae_decoder").values()
    assert manifest.recipe.precision["clip"] is Precision.FP16
    graph = onnx.load(output / "dit.onnx", load_external_data=False).graph
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    casts = {node.output[0] for node in graph.node if node.op_type == "Mul" and ".attention." in node.name}
    assert attentions
    assert all(operand in casts for node in attentions for operand in node.input[:3])
    assert manifest.quality is not None
    assert set(manifest.quality.stages) == {"llm", "clip", "dit", "vae_decoder"}


def test_a_channel_of_zeros(tiny_checkpoint: Path, output: Path, tmp_path: Path, request_: CalibrationRequest) -> None:
    checkpoint = altered(tiny_checkpoint, tmp_path / "zeros", lambda weight: weight.__setitem__(2, 0))
    manifest = build(checkpoint, output, precision=Precision.INT8, calibration=request_)
    entry = next(w for w in manifest.stage("dit").weights if w.name == "single.0.proj_mlp.weight")  # type: ignore[union-attr]
    codes = np.fromfile(output / entry.file, np.int8, entry.length, offset=entry.offset).reshape(entry.shape)
    assert (codes[2] == 0).all()
    assert np.abs(codes[3]).max() == 127


def test_the_bundle_is_opened_with_every_digest(
    tiny_checkpoint: Path, output: Path, request_: CalibrationRequest
) -> None:
    build(tiny_checkpoint, output, precision=Precision.INT8, calibration=request_)
    path = output / "weights/dit.int8.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReelforgeError, match=r"dit\.int8\.safetensors"):
        Bundle.open(output)


def test_its_weights_are_those_of_the_checkpoint(
    tiny_checkpoint: Path, tiny_tencent_checkpoint: Path, output: Path, tmp_path: Path, request_: CalibrationRequest
) -> None:
    smoothed = replace(request_, smoothing=0.5)
    manifest = build(tiny_checkpoint, output, precision=Precision.INT8, calibration=smoothed)
    bundle = Bundle.open(output)
    total = sum(len(stage.weights) for stage in manifest.stages)
    assert compare_weights(bundle, tiny_checkpoint) == total
    assert compare_weights(bundle, tiny_tencent_checkpoint) == total
    other = altered(tiny_checkpoint, tmp_path / "other", lambda weight: weight.__setitem__((1, 1), 9.0))
    with pytest.raises(VerificationError, match=r"received: dit\.single\.0\.proj_") as caught:
        compare_weights(bundle, other)
    assert "weight.scale" in str(caught.value)  # the row's largest magnitude is another
