"""Plans of quantisation: which layers a recipe means, and smoothing that leaves what the model computes as it was.

The smoothing's tolerance is 1e-5 of the output's largest value: in exact arithmetic nothing changes, and one rounding
of each folded parameter to fp32 (6e-8) is amplified by a few blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.number_formats import FP8_E4M3, INT8, NumberFormat
from reelforge.calibration.rules import SmoothingGroup
from reelforge.calibration.scale_file import ScaleKind, tensor_name
from reelforge.export.passes.quantise_layers import ActivationScales
from reelforge.export.quantisation import (
    Formats,
    StagePlan,
    applicable_groups,
    attention_formats,
    plan_quantisation,
    quantised_formats,
    required_scales,
)
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, Recipe
from tests.export.tiny_stages import FAMILY, TinyStages, changed, random_factors, scale_file

TOLERANCE = 1e-5
STREAM_LAYERS = ("q", "k", "v", "proj", "fc1", "fc2")
SINGLE_LAYERS = ("q", "k", "v", "fc1", "proj_attention", "proj_mlp")
DIT_LAYERS = [
    *(f"double.{i}.{stream}.{name}" for i in range(2) for stream in ("image", "text") for name in STREAM_LAYERS),
    *(f"single.{i}.{name}" for i in range(2) for name in SINGLE_LAYERS),
]
LLM_LAYERS = [
    f"layers.{i}.{name}"
    for i in range(2)  # the tiny encoder has four, of which the last two are never computed
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> TinyStages:
    return TinyStages.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parameters")


@pytest.fixture(scope="module")
def before(tiny: TinyStages, folder: Path) -> Mapping[str, NDArray[np.float32]]:
    """What the stages give as the checkpoint has them."""
    parameters = {stage: tiny.parameters(stage) for stage in ("modulation", "dit", "llm")}
    return {"dit": tiny.velocity(parameters, folder), "llm": tiny.prompt_states(parameters, folder)}


def formats_of(tiny: TinyStages, kept: Mapping[str, tuple[str, ...]] | None = None, **precision: Precision) -> Formats:
    every = {stage: precision.get(stage, Precision.FP32) for stage in FAMILY.stage_names}
    return quantised_formats(Recipe(every, kept=dict(kept or {})), tiny.rules, tiny.stages)


def difference(
    tiny: TinyStages,
    before: Mapping[str, NDArray[np.float32]],
    plans: Mapping[str, StagePlan],
    stage: str,
    folder: Path,
) -> float:
    """Return how far the planned folds move the stage's output, relative to its largest value."""
    names = ("modulation", "dit") if stage == "dit" else ("llm",)
    parameters = {name: changed(tiny.parameters(name), plans.get(name)) for name in names}
    after = tiny.velocity(parameters, folder) if stage == "dit" else tiny.prompt_states(parameters, folder)
    assert before[stage].std() > 0.3
    return float(np.abs(after - before[stage]).max() / np.abs(before[stage]).max())


# Which layers


def test_layers_of_the_transformer(tiny: TinyStages) -> None:
    """Every projection inside the blocks; not the patch embedding, not the final projection, no norm."""
    formats = formats_of(tiny, dit=Precision.INT8)
    assert formats == {"dit": dict.fromkeys(DIT_LAYERS, INT8)}
    left = set(tiny.stages["dit"].parameter_shapes()) - {f"{layer}.weight" for layer in DIT_LAYERS}
    assert {name.split(".")[-2] for name in left if name.endswith(".weight")} == {
        "patch_embed",
        "q_norm",
        "k_norm",
        "proj",  # of `final`
    }
    assert "final.proj.weight" in left


def test_layers_of_the_text_encoder(tiny: TinyStages) -> None:
    formats = formats_of(tiny, llm=Precision.FP8)
    assert set(formats["llm"]) == set(LLM_LAYERS)
    assert set(formats["llm"].values()) == {FP8_E4M3}


def test_layers_of_the_decoder(tiny: TinyStages) -> None:
    layers = set(formats_of(tiny, vae_decoder=Precision.INT8)["vae_decoder"])
    shapes = tiny.stages["vae_decoder"].parameter_shapes()
    inner = {name for name in shapes if name.startswith(("decoder.mid_block.", "decoder.up_blocks."))}
    assert layers == {name.removesuffix(".weight") for name in inner if len(shapes[name]) > 1}
    assert any(len(shapes[f"{layer}.weight"]) == 5 for layer in layers)
    assert any(len(shapes[f"{layer}.weight"]) == 2 for layer in layers)
    assert not [layer for layer in layers if "norm" in layer or "conv_in" in layer or "conv_out" in layer]


def test_each_stage_has_its_own_format(tiny: TinyStages) -> None:
    formats = formats_of(tiny, dit=Precision.FP8, llm=Precision.INT8, vae_decoder=Precision.FP16)
    assert {stage: set(layers.values()) for stage, layers in formats.items()} == {"llm": {INT8}, "dit": {FP8_E4M3}}
    assert formats_of(tiny) == {}


def test_kept_layers(tiny: TinyStages) -> None:
    kept = {"dit": ("single.1.*", "double.*.fc2", "double.0.text.q")}
    layers = formats_of(tiny, kept, dit=Precision.INT8)["dit"]
    left_out = {name for name in DIT_LAYERS if name.startswith("single.1.") or name.endswith(".fc2")}
    assert set(layers) == set(DIT_LAYERS) - left_out - {"double.0.text.q"}


def test_a_pattern_that_fits_no_layer(tiny: TinyStages) -> None:
    kept = {"dit": ("single.1.*", "final.proj", "single.9.*")}
    with pytest.raises(RequestError) as caught:
        formats_of(tiny, kept, dit=Precision.INT8)
    for part in (
        "no layer of stage 'dit' fits what the recipe keeps",
        "received: final.proj, single.9.*   expected: names such as double.0.image.q",
        "fix: list the layers with reelforge sensitivity",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("stage", ["clip", "refiner", "modulation"])
def test_stages_that_stay_in_high_precision(tiny: TinyStages, stage: str) -> None:
    with pytest.raises(RequestError) as caught:
        formats_of(tiny, dit=Precision.INT8, **{stage: Precision.INT8})
    for part in (
        f"the stage {stage!r} cannot be computed in 8 bits",
        f"received: {stage}=int8   expected: 8 bits for dit or llm or vae_decoder",
        f"fix: leave {stage} in fp32 or fp16",
    ):
        assert part in str(caught.value)


def test_required_scales(tiny: TinyStages) -> None:
    kept = {"llm": tuple(layer for layer in LLM_LAYERS if not layer.endswith("o_proj"))}
    assert required_scales(formats_of(tiny, kept, llm=Precision.INT8), {}, tiny.stages) == [
        "llm.layers.0.self_attn.o_proj.activation",
        "llm.layers.0.self_attn.o_proj.range",
        "llm.layers.1.self_attn.o_proj.activation",
        "llm.layers.1.self_attn.o_proj.range",
    ]


# Which groups


def group_names(groups: tuple[SmoothingGroup, ...]) -> set[str]:
    return {"+".join(group.layers) for group in groups}


def test_groups_of_quantised_layers(tiny: TinyStages) -> None:
    """Five for a double block, two for a single block, two for an encoder's layer, none for the decoder."""
    groups = applicable_groups(tiny.rules, formats_of(tiny, dit=Precision.INT8, llm=Precision.FP8))
    assert [group.stage for group in groups].count("dit") == 2 * 5 + 2 * 2
    assert [group.stage for group in groups].count("llm") == 2 * 2
    assert applicable_groups(tiny.rules, formats_of(tiny, vae_decoder=Precision.INT8)) == ()
    assert applicable_groups(tiny.rules, {}) == ()


def test_a_group_needs_all_its_layers(tiny: TinyStages) -> None:
    every = group_names(applicable_groups(tiny.rules, formats_of(tiny, dit=Precision.INT8)))
    kept = {"dit": ("double.1.text.k", "double.0.image.proj", "single.0.fc1", "single.1.v")}
    some = group_names(applicable_groups(tiny.rules, formats_of(tiny, kept, dit=Precision.INT8)))
    assert some < every
    assert every - some == {
        "double.1.text.q+double.1.text.k+double.1.text.v",
        "double.0.image.proj+double.0.text.proj",
        "single.0.q+single.0.k+single.0.v+single.0.fc1",
        "single.1.q+single.1.k+single.1.v+single.1.fc1",  # what single.1.v feeds is still a group
    }


# Plans


def test_a_plan_without_smoothing(tiny: TinyStages) -> None:
    formats = formats_of(tiny, dit=Precision.FP8)
    scales = scale_file(formats)
    groups = applicable_groups(tiny.rules, formats)
    plans = tiny.plans(formats, groups, scales)
    assert set(plans) == {"dit"}
    assert plans["dit"].folded == {}
    assert set(plans["dit"].layers) == set(DIT_LAYERS)
    for name, layer in plans["dit"].layers.items():
        assert layer.weight.number_format is FP8_E4M3
        assert layer.weight.column_factors is None
        assert layer.weight.row_divisors is None
        assert layer.activation == ActivationScales(float(scales.tensors[f"dit.{name}.activation"]))
    assert len({layer.activation.scale for layer in plans["dit"].layers.values()}) == len(DIT_LAYERS)
    assert required_scales(formats, {}, tiny.stages) == [f"dit.{name}.activation" for name in formats["dit"]]


def test_inputs_of_int8_layers_have_a_range(tiny: TinyStages) -> None:
    formats = formats_of(tiny, dit=Precision.INT8)
    scales = scale_file(formats)
    layers = tiny.plans(formats, (), scales)["dit"].layers
    for index, name in enumerate(formats["dit"]):
        assert layers[name].activation == ActivationScales(0.5 + index, (-float(index), 50.0 + index))
    wanted = [f"dit.{name}.{kind}" for name in formats["dit"] for kind in ("activation", "range")]
    assert required_scales(formats, {}, tiny.stages) == wanted


def test_outputs_of_int8_convolutions_have_a_range(tiny: TinyStages) -> None:
    """And those of linear layers have none, nor those in FP8."""
    formats = formats_of(tiny, vae_decoder=Precision.INT8)
    scales = scale_file(formats)
    layers = tiny.plans(formats, (), scales)["vae_decoder"].layers
    convolutions = [name for name in formats["vae_decoder"] if name.endswith("conv")]
    assert 0 < len(convolutions) < len(layers)
    for index, name in enumerate(formats["vae_decoder"]):
        assert layers[name].output_range == ((-1.0 - index, 60.0 + index) if name in convolutions else None)
    required = required_scales(formats, {}, tiny.stages)
    assert [name for name in required if name.endswith(".output")] == [
        f"vae_decoder.{name}.output" for name in convolutions
    ]
    other = formats_of(tiny, vae_decoder=Precision.FP8)
    assert not any(name.endswith(".output") for name in required_scales(other, {}, tiny.stages))


def test_a_scale_file_that_lacks_a_layer(tiny: TinyStages) -> None:
    formats = formats_of(tiny, dit=Precision.INT8)
    scales = scale_file(formats)
    groups = applicable_groups(tiny.rules, formats)
    smoothing = random_factors(tiny, groups, np.random.default_rng(0))
    for removed, tensors in (
        ("dit.single.1.proj_mlp.activation", dict(scales.tensors)),
        ("dit.single.1.proj_mlp.range", dict(scales.tensors)),
        ("dit.double.0.image.k.smoothing", {**scales.tensors, **smoothing}),  # of a group that has another's
    ):
        tensors.pop(removed)
        with pytest.raises(CalibrationError, match=removed):
            tiny.plans(formats, groups, replace(scales, tensors=tensors))


def test_what_smoothing_changes(tiny: TinyStages) -> None:
    """Rows of shift and scale, with one added to the scale's bias before it is divided; gates stay."""
    formats = formats_of(tiny, dit=Precision.INT8)
    groups = applicable_groups(tiny.rules, formats)
    smoothing = random_factors(tiny, groups, np.random.default_rng(1))
    plans = tiny.plans(formats, groups, scale_file(formats, smoothing))
    assert set(plans) == {"dit", "modulation"}
    assert plans["modulation"].layers == {}

    def factors(layer: str) -> NDArray[np.float64]:
        return smoothing[tensor_name("dit", layer, ScaleKind.SMOOTHING)].astype(np.float64)

    first, second = factors("double.1.text.k"), factors("double.1.text.fc1")
    ones = np.ones_like(first)
    expected = np.concatenate([1 / first, 1 / first, ones, 1 / second, 1 / second, ones])
    zeros = np.zeros_like(first)
    offset = np.concatenate([zeros, 1 / first - 1, zeros, zeros, 1 / second - 1, zeros])
    weight, bias = (plans["modulation"].folded[f"double.1.text.linear.{name}"] for name in ("weight", "bias"))
    np.testing.assert_allclose(weight.multiplier, expected, rtol=1e-15)
    np.testing.assert_array_equal(weight.offset, 0)
    np.testing.assert_allclose(bias.multiplier, expected, rtol=1e-15)
    np.testing.assert_allclose(bias.offset, offset, rtol=0, atol=1e-15)

    value = plans["dit"].layers["double.1.text.v"].weight
    assert value.column_factors is not None
    assert value.row_divisors is not None
    np.testing.assert_array_equal(value.column_factors, first.astype(np.float32))
    np.testing.assert_array_equal(value.row_divisors, factors("double.1.image.proj").astype(np.float32))
    np.testing.assert_allclose(
        plans["dit"].folded["double.1.text.v.bias"].multiplier, 1 / factors("double.1.image.proj"), rtol=1e-15
    )
    in_dit = {f"double.{i}.{stream}.v.bias" for i in range(2) for stream in ("image", "text")}
    assert set(plans["dit"].folded) == in_dit | {f"single.{i}.v.bias" for i in range(2)}
    untouched = {name.removesuffix(".weight") for name in plans["modulation"].folded}
    assert not {"final.linear", "time_in.fc1"} & untouched


# Attention

ATTENTIONS = ["double.0.attention", "double.1.attention", "single.0.attention", "single.1.attention"]


@pytest.mark.parametrize(("precision", "number_format"), [(Precision.FP8, FP8_E4M3), (Precision.INT8, INT8)])
def test_attention_in_8_bits(tiny: TinyStages, precision: Precision, number_format: NumberFormat) -> None:
    """Whatever the layers' precision: here none of them is in 8 bits."""
    recipe = Recipe(dict.fromkeys(FAMILY.stage_names, Precision.FP32), attention=precision)
    attentions = attention_formats(recipe, tiny.rules)
    assert attentions == {"dit": dict.fromkeys(ATTENTIONS, number_format)}
    names = [f"dit.{name}.{kind}" for name in ATTENTIONS for kind in ("query", "key", "value")]
    assert required_scales({}, attentions, tiny.stages) == names
    tensors = {name: np.float32(1 + index) for index, name in enumerate(names)}
    scales = replace(scale_file({}), tensors=tensors)
    plans = plan_quantisation(formats={}, attentions=attentions, groups=(), scales=scales, stages=tiny.stages)
    assert set(plans) == {"dit"}
    assert plans["dit"].layers == plans["dit"].folded == {}
    received = [(each.query, each.key, each.value) for each in map(plans["dit"].attentions.__getitem__, ATTENTIONS)]
    assert received == [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    assert {each.precision for each in plans["dit"].attentions.values()} == {precision}

    tensors.pop("dit.single.1.attention.key")
    with pytest.raises(CalibrationError, match=r"single\.1\.attention"):
        plan_quantisation(formats={}, attentions=attentions, groups=(), scales=scales, stages=tiny.stages)


def test_attention_of_stages_that_are_not_built(tiny: TinyStages) -> None:
    assert attention_formats(Recipe({"llm": Precision.INT8}, attention=Precision.FP8), tiny.rules) == {}
    assert attention_formats(Recipe({"dit": Precision.INT8}), tiny.rules) == {}


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.FP32])
def test_attention_in_another_precision(tiny: TinyStages, precision: Precision) -> None:
    with pytest.raises(RequestError) as caught:
        attention_formats(Recipe({"dit": Precision.FP32}, attention=precision), tiny.rules)
    for part in (
        f"attention cannot be computed in {precision.value}",
        f"received: {precision.value}   expected: fp8, int8 (for --target cpu), or nothing for high precision",
        "fix: use --attention fp8 or --attention int8",
    ):
        assert part in str(caught.value)


# Smoothing changes no output

KEPT: list[dict[str, tuple[str, ...]]] = [
    {},
    {"dit": ("*.v",)},  # values in high precision: their rows are folded there
    {"dit": ("double.1.*", "single.0.fc1")},
    {"llm": ("layers.0.self_attn.q_proj", "layers.1.mlp.*")},
]


# Not shrunk when it fails: a smaller seed says no more, and each example runs three stages.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(seed=st.integers(0, 2**32 - 1), kept=st.sampled_from(KEPT), some=st.booleans())
def test_smoothing_leaves_the_outputs(
    tiny: TinyStages,
    before: Mapping[str, NDArray[np.float32]],
    folder: Path,
    seed: int,
    kept: dict[str, tuple[str, ...]],
    some: bool,
) -> None:
    """With random factors from 1/8 to 8, for all groups or some, in the transformer and the text encoder."""
    random = np.random.default_rng(seed)
    formats = formats_of(tiny, kept, dit=Precision.INT8, llm=Precision.FP8)
    groups = applicable_groups(tiny.rules, formats)
    smoothed = tuple(group for group in groups if not some or random.random() < 0.5)
    scales = scale_file(formats, random_factors(tiny, smoothed, random))
    plans = tiny.plans(formats, groups, scales)
    for stage in ("dit", "llm"):
        assert difference(tiny, before, plans, stage, folder) <= TOLERANCE


def test_every_fold_is_needed(tiny: TinyStages, before: Mapping[str, NDArray[np.float32]], folder: Path) -> None:
    """The test above would notice: without any one fold of any one group, the output is another."""
    formats = formats_of(tiny, dit=Precision.INT8, llm=Precision.INT8)
    groups = applicable_groups(tiny.rules, formats)
    scales = scale_file(formats, random_factors(tiny, groups, np.random.default_rng(2)))
    for index, group in enumerate(groups):
        for fold in group.folds:
            fewer = replace(group, folds=tuple(other for other in group.folds if other is not fold))
            wrong = (*groups[:index], fewer, *groups[index + 1 :])
            plans = tiny.plans(formats, wrong, scales)
            assert difference(tiny, before, plans, group.stage, folder) > 1e-2, (group.layers, fold)


def test_rows_that_are_mixed_up_are_noticed(
    tiny: TinyStages, before: Mapping[str, NDArray[np.float32]], folder: Path
) -> None:
    """Shift and scale exchanged, as in diffusers' final layer."""
    formats = formats_of(tiny, dit=Precision.INT8)
    groups = applicable_groups(tiny.rules, formats)
    scales = scale_file(formats, random_factors(tiny, groups, np.random.default_rng(3)))
    fold = groups[0].folds[0]
    swapped = replace(fold, shift_rows=fold.scale_rows, scale_rows=fold.shift_rows)
    wrong = (replace(groups[0], folds=(swapped,)), *groups[1:])
    plans = tiny.plans(formats, wrong, scales)
    assert difference(tiny, before, plans, "dit", folder) > 1e-2
