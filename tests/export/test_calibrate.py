"""A calibration against PyTorch's record of what the layers read, and what must not change its bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.errors import CalibrationError, NonFiniteError
from reelforge.calibration.fingerprint import bundle_fingerprint
from reelforge.calibration.number_formats import FP8_E4M3, INT8
from reelforge.calibration.prompts import prompts_sha256
from reelforge.calibration.scale_file import write_scale_file
from reelforge.calibration.scale_methods import ScaleMethod
from reelforge.export import lockstep as lockstep_module
from reelforge.export import reference
from reelforge.export.calibrate import CalibrationOptions, Observations, calibrate, observe
from reelforge.export.lockstep import Lockstep
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import BundleError, RequestError
from reelforge.runtime.pipeline import Pipeline
from tests.calibrations import (
    PROMPTS,
    STEPS,
    Formats,
    Recording,
    attention_of,
    damaged,
    formats_of,
    groups_of,
    options,
    record,
)

ALPHA = 0.5
NEAR = 2e-3  # fp32 sums in another order, relative to a tensor's largest magnitude


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, Check.SIZES)


@pytest.fixture(scope="module")
def recorded(bundle: Bundle) -> dict[str, Recording]:
    return record(bundle, Pipeline(bundle))


@pytest.fixture(scope="module")
def formats(bundle: Bundle) -> Formats:
    return formats_of(bundle, dit=INT8, llm=INT8, vae_decoder=INT8)


@pytest.fixture(scope="module")
def plain(bundle: Bundle, formats: Formats) -> Observations:
    return observe(bundle, formats, (), options(), attention=attention_of(bundle))


@pytest.fixture(scope="module")
def smoothed(bundle: Bundle, formats: Formats) -> Observations:
    groups = groups_of(bundle)
    return observe(bundle, formats, groups, options(smoothing=ALPHA), attention=attention_of(bundle))


def rows_of(recorded: dict[str, Recording], tensor: str, kind: str) -> np.ndarray:
    stage, _, layer = tensor.removesuffix(f".{kind}").partition(".")
    return np.concatenate(recorded[stage][layer if kind == "activation" else f"{layer}.{kind}"])


def oracle_factors(bundle: Bundle, recorded: dict[str, Recording], stage: str, layers: tuple[str, ...]) -> np.ndarray:
    """SmoothQuant's equation 4 over everything that the group's layers read."""
    stored = {weight.name: weight for weight in bundle.stage(stage).weights}
    weights = [np.abs(reference.read_weight(bundle.path, stored[f"{name}.weight"]).numpy()).max(0) for name in layers]
    x = np.max([np.abs(np.concatenate(recorded[stage][name])).max(axis=0) for name in layers], axis=0)
    return np.clip(x**ALPHA / np.max(weights, axis=0) ** (1 - ALPHA), 1 / 1024, 1024)


def test_every_step_and_prompt_is_observed_as_pytorch_computes_it(
    plain: Observations, recorded: dict[str, Recording]
) -> None:
    kinds = {value.tensor.name: value.tensor.kind.value for value in plain.plan.values()}
    assert {name.split(".")[0] for name in kinds} == {"dit", "llm", "vae_decoder"}
    for name, kind in kinds.items():
        rows, statistics = rows_of(recorded, name, kind), plain.statistics[name]
        assert statistics.count == rows.size, name  # all prompts and steps, nothing twice
        near = NEAR * np.abs(rows).max()
        np.testing.assert_allclose(statistics.channel_absolute_maximum, np.abs(rows).max(axis=0), atol=near)
        np.testing.assert_allclose([statistics.minimum, statistics.maximum], [rows.min(), rows.max()], atol=near)
        middle = np.median(np.abs(rows))
        below = statistics.histogram[: int(middle / statistics.bin_width)].sum()
        assert below == pytest.approx(rows.size / 2, rel=0.1)


def test_shared_inputs_are_observed_once(plain: Observations) -> None:
    readers = {value.tensor.layer: value.layers for value in plain.plan.values()}
    assert readers["double.0.image.q"] == tuple(f"double.0.image.{name}" for name in "qkv")
    assert readers["single.0.q"] == tuple(f"single.0.{name}" for name in ("q", "k", "v", "fc1"))


def test_what_one_convolution_makes_and_another_reads_is_observed_once(plain: Observations) -> None:
    """The shortcut of a level reads what the upsampling before it made."""
    both = [value for value in plain.plan.values() if value.outputs_of and value.layers]
    assert both
    for value in both:
        assert value.tensor.kind.value == "activation"
        assert value.layers[0].endswith("conv_shortcut.conv")
        assert value.outputs_of[0].endswith("upsamplers.0.conv.conv")
    names = [value.value.name for value in plain.plan.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("number_format", [INT8, FP8_E4M3])
def test_scales_are_those_of_the_recorded_tensors(
    plain: Observations, bundle: Bundle, recorded: dict[str, Recording], number_format: object
) -> None:
    number_format = INT8 if number_format is INT8 else FP8_E4M3
    formats = formats_of(bundle, dit=number_format, llm=number_format, vae_decoder=number_format)
    attention = attention_of(bundle)
    largest = plain.scales(formats, attention, ScaleMethod.MAX)
    most = plain.scales(formats, attention, ScaleMethod.PERCENTILE, 99.0)
    layers = [f"{stage}.{layer}.activation" for stage, names in formats.items() for layer in names]
    operands = [f"dit.{name}.{kind}" for name in attention["dit"] for kind in ("query", "key", "value")]
    ranges = [name.replace(".activation", ".range") for name in layers] if number_format is INT8 else []
    made = [name for name in recorded["vae_decoder"] if name.removesuffix(".output") in formats["vae_decoder"]]
    outputs = [f"vae_decoder.{name}" for name in made if name.endswith(".output")] if ranges else []
    assert bool(outputs) == bool(ranges)
    assert set(largest) == set(most) == {*layers, *operands, *ranges, *outputs}
    for name in (*ranges, *outputs):
        tensor = name.replace(".range", ".activation")
        rows = rows_of(recorded, tensor, tensor.rpartition(".")[2])
        near = NEAR * np.abs(rows).max()
        ends = np.array([min(rows.min(), 0), max(rows.max(), 0)])
        np.testing.assert_allclose(largest[name], ends, rtol=0, atol=near)
        clip = np.percentile(np.abs(rows), 99.0)
        np.testing.assert_allclose(most[name], np.clip(ends, -clip, clip), rtol=0, atol=near + 0.02 * clip)
    for name in (*layers, *operands):
        kind = name.rpartition(".")[2]
        values = np.abs(rows_of(recorded, name, kind))
        top = number_format.largest if kind == "activation" else FP8_E4M3.largest
        assert largest[name] == pytest.approx(values.max() / top, rel=NEAR)
        assert most[name] == pytest.approx(np.percentile(values, 99.0) / top, rel=0.02)


def test_smoothing_observes_the_tensors_divided_by_equation_4(
    smoothed: Observations, bundle: Bundle, recorded: dict[str, Recording]
) -> None:
    assert {planned.group.stage for planned in smoothed.plan.groups} == {"dit", "llm"}
    assert len(smoothed.plan.groups) == len(groups_of(bundle))
    divisors: dict[str, np.ndarray] = {}
    for planned, factors in zip(smoothed.plan.groups, smoothed.factors, strict=True):
        expected = oracle_factors(bundle, recorded, planned.group.stage, planned.group.layers)
        np.testing.assert_allclose(factors, expected, rtol=0.02)
        divisors.update(dict.fromkeys(planned.divided, factors))
    for value in smoothed.plan.values():
        name, kind = value.tensor.name, value.tensor.kind.value
        rows = rows_of(recorded, name, kind)
        if name in divisors:
            rows = rows / divisors[name]
        statistics = smoothed.statistics[name]
        assert statistics.count == rows.size
        assert statistics.absolute_maximum == pytest.approx(np.abs(rows).max(), rel=NEAR)
        near = NEAR * np.abs(rows).max()
        np.testing.assert_allclose([statistics.minimum, statistics.maximum], [rows.min(), rows.max()], atol=near)
        middle = np.median(np.abs(rows))
        below = statistics.histogram[: int(middle / statistics.bin_width)].sum()
        assert below == pytest.approx(rows.size / 2, rel=0.1)


def test_values_of_an_attention_are_smoothed_where_its_projection_is(smoothed: Observations) -> None:
    """The factors of the projection are folded into v, so that is what an 8-bit attention reads."""
    divided = smoothed.plan.divided()
    for block, layers in (
        ("double.0", ("double.0.image.proj", "double.0.text.proj")),
        ("single.0", ("single.0.proj_attention",)),
    ):
        assert divided[f"dit.{block}.attention.value"].group.layers == layers
        assert f"dit.{block}.attention.query" not in divided


def test_factors_are_stored_for_every_layer_of_a_group(
    smoothed: Observations, bundle: Bundle, formats: Formats
) -> None:
    tensors = smoothed.scales(formats, attention_of(bundle), ScaleMethod.MAX)
    for planned, factors in zip(smoothed.plan.groups, smoothed.factors, strict=True):
        for layer in planned.group.layers:
            np.testing.assert_array_equal(tensors[f"{planned.group.stage}.{layer}.smoothing"], factors)
    assert not [name for name in tensors if name.startswith("vae_decoder") and name.endswith("smoothing")]


def test_the_method_max_needs_one_pass_only(smoothed: Observations, bundle: Bundle, formats: Formats) -> None:
    stages: list[str] = []
    provenance, tensors = calibrate(
        bundle, formats, groups_of(bundle), options(smoothing=ALPHA), lambda stage, _d, _t: stages.append(stage),
        attention_of(bundle),
    )  # fmt: skip
    assert not [stage for stage in stages if "smoothed" in stage]
    expected = smoothed.scales(formats, attention_of(bundle), ScaleMethod.MAX)
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    assert provenance.method == "max + smoothing 0.5"


def test_a_group_with_a_layer_in_high_precision_is_left_alone(bundle: Bundle) -> None:
    formats = formats_of(bundle, dit=INT8)
    del formats["dit"]["double.0.image.k"]
    observed = observe(bundle, formats, groups_of(bundle), options(smoothing=ALPHA, steps=1), extremes_suffice=True)
    layers = [planned.group.layers for planned in observed.plan.groups]
    assert ("double.0.text.q", "double.0.text.k", "double.0.text.v") in layers
    assert not [group for group in layers if "double.0.image.q" in group]


def file_bytes(bundle: Bundle, path: Path, chosen: CalibrationOptions, formats: Formats) -> bytes:
    write_scale_file(path, *calibrate(bundle, formats, groups_of(bundle), chosen, attention=attention_of(bundle)))
    return path.read_bytes()


def test_memory_does_not_show_in_the_bytes_and_the_seed_does(bundle: Bundle, tmp_path: Path) -> None:
    formats = formats_of(bundle, dit=INT8, llm=FP8_E4M3)
    chosen = options(smoothing=ALPHA, method=ScaleMethod.MSE)
    expected = file_bytes(bundle, tmp_path / "a", chosen, formats)
    assert file_bytes(bundle, tmp_path / "b", replace(chosen, memory_bytes=1 << 14), formats) == expected
    assert file_bytes(bundle, tmp_path / "c", replace(chosen, seed=12), formats) != expected
    assert file_bytes(bundle, tmp_path / "d", replace(chosen, method=ScaleMethod.ENTROPY), formats) != expected


def test_provenance(bundle: Bundle) -> None:
    chosen = options(method=ScaleMethod.PERCENTILE, percentile=99.5, steps=1)
    formats = formats_of(bundle, llm=FP8_E4M3, dit=INT8)
    provenance, _ = calibrate(bundle, formats, (), chosen, attention=attention_of(bundle))
    assert provenance.checkpoint == bundle_fingerprint(bundle)
    assert provenance.prompts_sha256 == prompts_sha256(PROMPTS)
    assert provenance.seed == 11
    assert provenance.method == "percentile 99.5"
    assert provenance.format == "dit=int8,dit.attention=float8_e4m3fn,llm=float8_e4m3fn"
    assert provenance.sampling == "2 prompts, 1 steps of 32x48x5"
    assert set(provenance.versions) == {"reelforge", "numpy", "onnxruntime"}


def test_only_what_is_needed_is_run(bundle: Bundle) -> None:
    def stages(**chosen: object) -> list[str]:
        seen: dict[str, int] = {}
        observe(
            bundle, formats_of(bundle, **chosen), (), options(steps=2),  # type: ignore[arg-type]
            lambda stage, done, total: seen.update({stage: total}),
        )  # fmt: skip
        return [f"{stage} {total}" for stage, total in seen.items()]

    before = ["llm 2", "clip 2", "refiner 2", "modulation 2"]
    assert stages(llm=INT8) == ["llm 2"]
    assert stages(dit=INT8) == [*before, "dit 4"]
    assert stages(vae_decoder=INT8)[:5] == [*before, "dit 4"]


def test_a_weight_that_is_not_a_number_is_found_where_it_is_first_read(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "nan.bundle")
    damaged(copy, "double.1.image.fc1.weight", "dit", np.nan)
    formats = formats_of(bundle, dit=INT8)
    with pytest.raises(NonFiniteError) as caught:
        calibrate(Bundle.open(copy, Check.SIZES), formats, (), options())
    message = str(caught.value)
    assert (
        "the input of layer 'double.1.image.fc2' of stage 'dit' at step 0 holds values that are not finite" in message
    )
    assert "keep the layer before this one in high precision" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_step_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    step = Lockstep.step

    def broken(self: Lockstep, number: int, latents: list[np.ndarray]) -> list[np.ndarray]:
        if number == 2:
            latents[1][0, 0, 0, 0, 0] = value
        return step(self, number, latents)

    monkeypatch.setattr(Lockstep, "step", broken)
    with pytest.raises(NonFiniteError, match=r"layer 'double\.0\.image\.q' of stage 'dit' at step 2 holds"):
        calibrate(bundle, formats_of(bundle, dit=INT8), (), options())


def test_latents_that_are_not_finite_are_found_without_an_observed_layer(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Lockstep._run

    def broken(self: Lockstep, stage: str, *arguments: object, **more: object) -> object:
        for made in run(self, stage, *arguments, **more):  # type: ignore[arg-type]
            yield {"next_latents": made["next_latents"] * np.nan} if stage == "dit" else made

    monkeypatch.setattr(lockstep_module.Lockstep, "_run", broken)
    with pytest.raises(NonFiniteError, match="the output of stage 'dit' at step 0 holds values"):
        calibrate(bundle, formats_of(bundle, vae_decoder=INT8), (), options())


def test_a_layer_that_the_bundle_lacks(bundle: Bundle) -> None:
    with pytest.raises(CalibrationError, match="stage 'dit' has no layers that could be observed under 1") as caught:
        calibrate(bundle, {"dit": {"double.0.image.q": INT8, "double.9.image.q": INT8}}, (), options())
    assert "received: double.9.image.q" in str(caught.value)
    assert "calibrate a bundle that was built in fp32 or fp16" in str(caught.value)
    with pytest.raises(CalibrationError, match="has no attentions"):
        calibrate(bundle, {}, (), options(), attention={"dit": {"double.9.attention": FP8_E4M3}})


def test_nothing_to_do(bundle: Bundle) -> None:
    with pytest.raises(CalibrationError, match="there is nothing to calibrate"):
        calibrate(bundle, {"dit": {}}, (), options())
    with pytest.raises(CalibrationError, match="there are no prompts"):
        calibrate(bundle, formats_of(bundle, dit=INT8), (), options(prompts=()))


def test_what_the_bundle_does_not_serve(bundle: Bundle) -> None:
    formats = formats_of(bundle, dit=INT8)
    with pytest.raises(RequestError, match="steps=0"):
        calibrate(bundle, formats, (), options(steps=0))
    with pytest.raises(RequestError, match="seed"):
        calibrate(bundle, formats, (), options(seed=2**64 - 1))  # the second prompt's would be too large
    part = replace(bundle.manifest, stages=tuple(e for e in bundle.manifest.stages if e.name != "clip"))
    with pytest.raises(BundleError, match="has no stage 'clip'"):
        calibrate(Bundle(bundle.path, part), formats, (), options())


assert STEPS > 2  # the tests above name step 2
