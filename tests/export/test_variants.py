"""Layers in 8 bits, tried in memory: against NumPy, against folded smoothing, and what cannot be tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat, dequantise, quantise
from reelforge.calibration.quality import relative_error
from reelforge.calibration.reference_run import ReferenceRun, run_reference, run_step
from reelforge.calibration.scale_file import ScaleKind, read_scale_file, tensor_name, write_scale_file
from reelforge.export import variants as module
from reelforge.export.graph_file import check_graph
from reelforge.export.passes.quantise_layers import ActivationScales
from reelforge.export.variants import LayerScales, Variants, formats_of, scales_of
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError, RequestError
from reelforge.runtime.pipeline import Pipeline
from tests.export.passes.layer_model import around_zero
from tests.variants import PROMPTS, PROVENANCE, SHAPE, input_maxima, layer_scales

LAYERS = ("double.0.image.q", "double.0.text.fc2", "single.1.proj_mlp", "single.0.proj_attention")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.open(tiny_bundle)


@pytest.fixture(scope="module")
def maxima(pipeline: Pipeline) -> dict[str, float]:
    return input_maxima(pipeline, INT8)


def stored_weight(pipeline: Pipeline, name: str) -> np.ndarray:
    entry = next(weight for weight in pipeline.bundle.stage("dit").weights if weight.name == f"{name}.weight")
    with (pipeline.bundle.path / entry.file).open("rb") as file:
        file.seek(entry.offset)
        return np.frombuffer(file.read(entry.length), "<f4").reshape(entry.shape)


@pytest.mark.parametrize("number_format", [INT8, FP8_E4M3])
def test_the_graph_holds_the_layers_codes_and_nothing_else_in_8_bits(
    pipeline: Pipeline, maxima: dict[str, float], number_format: NumberFormat
) -> None:
    variants = Variants(pipeline, "dit", layer_scales(maxima, number_format))
    data = variants.graph_of(LAYERS)
    check_graph(data, "dit")
    proto = onnx.ModelProto.FromString(data)
    kind = onnx.TensorProto.INT8 if number_format is INT8 else onnx.TensorProto.FLOAT8E4M3FN
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    eight_bits = {name for name, tensor in stored.items() if tensor.data_type == kind and len(tensor.dims) == 2}
    assert eight_bits == {f"{name}.weight" for name in LAYERS}
    for name in LAYERS:
        weight = stored_weight(pipeline, name)
        scale = np.abs(weight).max(axis=1) / np.float32(number_format.largest)
        codes = onnx.numpy_helper.to_array(stored[f"{name}.weight"]).view(number_format.dtype)
        assert np.array_equal(codes.view(np.uint8), quantise(weight, scale, number_format, axis=0).view(np.uint8))
        assert np.abs(dequantise(codes, scale, 0) - weight).max() <= scale.max() * 32


def test_everything_is_a_layer_that_the_family_lets_go(pipeline: Pipeline, maxima: dict[str, float]) -> None:
    names = set(formats_of(pipeline, "dit", INT8))
    assert names == set(maxima)
    assert len(names) == 2 * 12 + 2 * 6
    assert all(name.startswith(("double.", "single.")) for name in names)
    variants = Variants(pipeline, "dit", layer_scales(maxima, INT8))
    assert set(variants.layers) == names
    assert variants.weight_bytes("double.0.image.fc1") == 256 * 64 * 4


def test_no_layers_are_the_bundle_s_own_pipeline(pipeline: Pipeline, maxima: dict[str, float]) -> None:
    assert Variants(pipeline, "dit", layer_scales(maxima, INT8)).pipeline_of(()) is pipeline


def test_a_variant_says_that_it_is_another_stage(pipeline: Pipeline, maxima: dict[str, float]) -> None:
    variants = Variants(pipeline, "dit", layer_scales(maxima, INT8))
    one, other = (variants.pipeline_of((name,)).bundle for name in LAYERS[:2])
    digests = {bundle.stage("dit").graph_digest for bundle in (one, other, pipeline.bundle)}
    assert len(digests) == 3
    assert one.stage("llm") == pipeline.bundle.stage("llm")
    assert variants.graph_of(LAYERS) == variants.graph_of(set(LAYERS)) == variants.graph_of(LAYERS[::-1])


def velocity_of(pipeline: Pipeline, run: ReferenceRun, layer: str, scales: LayerScales) -> np.ndarray:
    candidate = Variants(pipeline, "dit", {layer: scales}).pipeline_of((layer,))
    video = run.videos[0]
    with candidate.engine("dit") as dit:
        return run_step(dit, video.latents[0], video.conditions, 0, ("velocity",))[0]


def test_smoothing_by_one_factor_changes_no_bit(pipeline: Pipeline, maxima: dict[str, float]) -> None:
    """A power of two for all channels moves through scales and codes exactly, and only if both operands take it."""
    name = "single.1.proj_mlp"
    run = run_reference(pipeline, PROMPTS[:1], 0, 1, SHAPE)
    scale = maxima[name] / 127
    plain = velocity_of(pipeline, run, name, LayerScales(INT8, around_zero(scale)))
    smoothed = velocity_of(pipeline, run, name, LayerScales(INT8, around_zero(scale / 4), np.full(256, 4, np.float32)))
    assert not np.array_equal(plain, run.videos[0].velocities[0])
    assert np.array_equal(smoothed, plain)


def test_smoothing_by_channel(pipeline: Pipeline, maxima: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs divided and columns multiplied channel by channel cancel out up to rounding; either alone does not."""
    name = "single.1.proj_mlp"
    run = run_reference(pipeline, PROMPTS[:1], 0, 1, SHAPE)
    expected = run.videos[0].velocities[0]
    factors = np.exp2(np.random.default_rng(1).uniform(-1, 1, 256)).astype(np.float32)
    scales = LayerScales(INT8, around_zero(2 * maxima[name] / 127), factors)
    assert relative_error(velocity_of(pipeline, run, name, scales), expected) < 0.03
    monkeypatch.setattr(module, "fold_into_weight", lambda weight, factors: weight)
    assert relative_error(velocity_of(pipeline, run, name, scales), expected) > 0.06


def test_scales_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    factors = np.array([1, 2], np.float32)
    tensors = {
        tensor_name("dit", "a", ScaleKind.ACTIVATION): np.array(0.5, np.float32),
        tensor_name("dit", "b", ScaleKind.ACTIVATION): np.array(0.25, np.float32),
        tensor_name("dit", "a", ScaleKind.RANGE): np.array([-0.25, 60], np.float32),
        tensor_name("dit", "b", ScaleKind.RANGE): np.array([-30, 0], np.float32),
        tensor_name("dit", "b", ScaleKind.SMOOTHING): factors,
    }
    write_scale_file(path, replace(PROVENANCE, format="dit=int8,llm=float8_e4m3fn"), tensors)
    scale_file = read_scale_file(path)
    scales = scales_of(scale_file, "dit", {"a": INT8, "b": INT8})
    assert (scales["a"].activation, scales["a"].smoothing) == (ActivationScales(0.5, (-0.25, 60)), None)
    assert scales["b"].activation == ActivationScales(0.25, (-30, 0))
    assert np.array_equal(np.asarray(scales["b"].smoothing), factors)
    with pytest.raises(CalibrationError, match="has no activation scale for layer 'c' of stage 'dit'"):
        scales_of(scale_file, "dit", {"c": INT8})
    with pytest.raises(CalibrationError) as caught:
        scales_of(scale_file, "dit", {"a": FP8_E4M3})
    for part in ("made for another number format", "received: dit=int8", "expected: dit=float8_e4m3fn", "fix:"):
        assert part in str(caught.value)


def test_a_stage_that_stays_in_high_precision(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError) as caught:
        formats_of(pipeline, "clip", INT8)
    for part in ("the stage 'clip' cannot be computed in 8 bits", "dit or llm or vae_decoder", "--stage"):
        assert part in str(caught.value)
    with pytest.raises(BundleError, match="no stage 'unet'"):
        formats_of(pipeline, "unet", INT8)


def test_layers_that_cannot_be_tried(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError) as caught:
        Variants(pipeline, "dit", {"single.9.q": LayerScales(INT8, around_zero(1.0))})
    for part in ("cannot be quantised layer by layer", "'single.9.q' is not in the graph", "--precision fp32"):
        assert part in str(caught.value)
    manifest = pipeline.bundle.manifest
    entry = pipeline.bundle.stage("dit")
    codes = replace(entry, weights=tuple(replace(weight, dtype="I8") for weight in entry.weights))
    stages = tuple(codes if stage.name == "dit" else stage for stage in manifest.stages)
    quantised = Pipeline(Bundle(pipeline.bundle.path, replace(manifest, stages=stages)))
    with pytest.raises(RequestError, match=r"'single\.1\.q' is not stored in floating point"):
        Variants(quantised, "dit", {"single.1.q": LayerScales(INT8, around_zero(1.0))})


def test_more_codes_than_a_graph_can_hold(
    pipeline: Pipeline, maxima: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = Variants(pipeline, "dit", layer_scales(maxima, INT8))
    monkeypatch.setattr(module, "MAX_GRAPH_BYTES", 20_000)
    variants.graph_of(("double.0.image.q", "double.0.image.k"))
    with pytest.raises(RequestError) as caught:
        variants.graph_of(("double.0.image.fc1", "double.0.image.k"))
    for part in ("2 layers of stage 'dit' are too many", "received: 20480 bytes of codes", "expected: at most 19000"):
        assert part in str(caught.value)
