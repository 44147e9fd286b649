"""Recipes as they are written on a command line and into a manifest, and what is wrong with the others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.codec import CodecError, from_json, to_json
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import (
    EVERY_STAGE,
    Backend,
    Precision,
    QuantisationRecipe,
    Recipe,
    Target,
    VideoShape,
    parse_precisions,
    resolve_precisions,
)

STAGES = ("llm", "clip", "modulation", "dit", "vae_decoder")
FP32, FP16, INT8, FP8 = Precision.FP32, Precision.FP16, Precision.INT8, Precision.FP8

precisions = st.sampled_from(Precision)
names = st.sampled_from(STAGES)
shapes = st.builds(VideoShape, *[st.integers(1, 10_000)] * 3)
patterns = st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple)
recipes = st.builds(
    Recipe,
    precision=st.dictionaries(names, precisions),
    shapes=st.lists(shapes, max_size=3).map(tuple),
    batch=st.integers(1, 9),
    high_precision=precisions,
    kept=st.dictionaries(names, patterns),
    attention=st.none() | precisions,
)


def require_message(error: RequestError, *parts: str) -> None:
    for part in parts:
        assert part in str(error)


# Precisions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp16", {EVERY_STAGE: FP16}),
        ("dit=fp8", {"dit": FP8}),
        ("dit=fp8,llm=int8,vae_decoder=fp16", {"dit": FP8, "llm": INT8, "vae_decoder": FP16}),
        ("fp16,dit=fp8", {EVERY_STAGE: FP16, "dit": FP8}),
        ("dit=fp8,fp16", {EVERY_STAGE: FP16, "dit": FP8}),
        (" dit = fp8 , int8 ", {EVERY_STAGE: INT8, "dit": FP8}),
        ("*=int8", {EVERY_STAGE: INT8}),
    ],
)
def test_precisions_are_read(text: str, expected: dict[str, Precision]) -> None:
    assert parse_precisions(text) == expected


@given(st.dictionaries(names | st.just(EVERY_STAGE), precisions, min_size=1), st.randoms(use_true_random=False))
def test_precisions_in_any_order(chosen: dict[str, Precision], random: object) -> None:
    items = [value.value if name == EVERY_STAGE else f"{name}={value.value}" for name, value in chosen.items()]
    random.shuffle(items)  # type: ignore[attr-defined]
    assert parse_precisions(",".join(items)) == chosen


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("", ""),
        ("int4", "int4"),
        ("INT8", "INT8"),
        ("dit=bf8", "dit=bf8"),
        ("dit", "dit"),
        ("dit=", "dit="),
        ("=int8", "=int8"),
        ("fp16,", ""),
        ("dit=fp8,dit=int8", "dit=int8"),
        ("fp16,fp32", "fp32"),
        ("*=fp16,fp32", "fp32"),
    ],
)
def test_precisions_that_cannot_be_read(text: str, item: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_precisions(text)
    require_message(
        caught.value,
        f"the precision {item!r} cannot be read",
        f"received: {text}   expected: fp32, bf16, fp16, int8, fp8; or stage=precision, each stage once",
        "fix: write for example int8, or dit=fp8,llm=int8",
    )


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {}),
        ({EVERY_STAGE: FP16}, dict.fromkeys(STAGES, FP16)),
        ({EVERY_STAGE: INT8}, {"dit": INT8}),  # the family's choice: the other stages are small or sensitive
        ({EVERY_STAGE: INT8, "llm": FP8, "clip": FP16}, {"dit": INT8, "llm": FP8, "clip": FP16}),
        ({EVERY_STAGE: FP16, "dit": FP8}, {**dict.fromkeys(STAGES, FP16), "dit": FP8}),
        ({EVERY_STAGE: FP8, "dit": FP32}, {}),
        ({"llm": INT8}, {"llm": INT8}),
    ],
)
def test_precisions_are_resolved(chosen: dict[str, Precision], expected: dict[str, Precision]) -> None:
    resolved = resolve_precisions(chosen, STAGES, ("dit",))
    assert list(resolved.items()) == [(stage, expected.get(stage, FP32)) for stage in STAGES]


def test_stages_that_the_model_does_not_have() -> None:
    with pytest.raises(RequestError) as caught:
        resolve_precisions({EVERY_STAGE: FP16, "vae": FP16, "dit": INT8, "unet": FP8}, STAGES, ("dit",))
    require_message(
        caught.value,
        "the precision names stages that the model does not have",
        "received: vae, unet   expected: llm, clip, modulation, dit, vae_decoder",
        "fix: write for example dit=int8,llm=fp16",
    )


@pytest.mark.parametrize(("precision", "quantised"), [(FP32, False), (FP16, False), (INT8, True), (FP8, True)])
def test_which_precisions_are_quantised(precision: Precision, quantised: bool) -> None:
    assert precision.quantised is quantised


# Recipes


def test_a_uniform_recipe() -> None:
    recipe = Recipe.uniform(FP16, ["llm", "dit"], [VideoShape(16, 32, 5)], batch=2)
    assert (recipe.precision, recipe.shapes, recipe.batch) == ({"llm": FP16, "dit": FP16}, (VideoShape(16, 32, 5),), 2)
    assert recipe.quantised_stages() == ()
    assert recipe.base("dit") is FP16
    assert not recipe.calibrated


def test_what_a_quantised_stage_computes_in_elsewhere() -> None:
    recipe = Recipe({"llm": FP16, "clip": FP32, "dit": INT8, "vae_decoder": FP8})
    assert recipe.quantised_stages() == ("dit", "vae_decoder")
    assert [recipe.base(stage) for stage in recipe.precision] == [FP16, FP32, FP32, FP32]
    other = Recipe(recipe.precision, high_precision=FP16)
    assert [other.base(stage) for stage in other.precision] == [FP16, FP32, FP16, FP16]


def test_what_needs_scales() -> None:
    assert Recipe({"llm": FP16, "dit": FP8}).calibrated
    assert Recipe({"dit": FP16}, attention=FP8).calibrated
    assert not Recipe({"dit": FP16}, high_precision=FP16).calibrated


@settings(max_examples=40)
@given(recipes)
def test_recipes_survive_a_manifest(recipe: Recipe) -> None:
    text = json.dumps(to_json(recipe))
    again = from_json(Recipe, json.loads(text))
    assert again == recipe
    assert list(again.precision) == list(recipe.precision)
    assert json.dumps(to_json(again)) == text


@settings(max_examples=40)
@given(st.builds(QuantisationRecipe, st.dictionaries(names, precisions), st.dictionaries(names, patterns)))
def test_recipe_files_survive(recipe: QuantisationRecipe) -> None:
    assert from_json(QuantisationRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("precision", {"dit": "int4"}, r"\$\.precision\.dit: expected one of 'fp32', 'bf16', 'fp16', 'int8', 'fp8'"),
        ("precision", ["int8"], r"\$\.precision: expected an object"),
        ("batch", "2", r"\$\.batch: expected int, received '2'"),
        ("shapes", [{"height": 16, "width": 16}], r"\$\.shapes\[0\]: .*missing fields \['frames'\]"),
        ("kept", {"dit": "single.*"}, r"\$\.kept\.dit: expected a list"),
        ("attention", "int4", r"\$\.attention: expected"),
        ("colour", 1, r"unknown fields \['colour'\]"),
    ],
)
def test_recipes_that_are_none(field: str, value: object, message: str) -> None:
    content = {**to_json(Recipe({"dit": INT8})), field: value}
    with pytest.raises(CodecError, match=message):
        from_json(Recipe, content)


# Shapes and targets


@given(shapes)
def test_shapes_are_read_as_they_are_written(shape: VideoShape) -> None:
    assert VideoShape.parse(f" {shape} ") == shape
    assert from_json(VideoShape, to_json(shape)) == shape


@pytest.mark.parametrize("text", ["", "720x1280", "720x1280x129x1", "720x0x5", "axbxc", "-1x2x3", "1.5x2x3", "7 x2x3"])
def test_shapes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        VideoShape.parse(text)
    require_message(
        caught.value,
        f"the shape {text!r} cannot be read",
        f"received: {text}   expected: HEIGHTxWIDTHxFRAMES in pixels and frames",
        "fix: write for example 720x1280x129",
    )


def test_targets() -> None:
    assert Target.parse("cpu") == Target(Backend.CPU)
    assert str(Target.parse("cpu")) == "cpu"
    assert Target.parse("cuda") == Target(Backend.CUDA)
    assert Target.parse("rtx:sm120+sm89") == Target(Backend.RTX, ("sm89", "sm120"))
    assert str(Target.parse("rtx:sm120+ sm89")) == "rtx:sm89+sm120"
    assert Target.parse("trt:sm90") == Target(Backend.TRT, ("sm90",))


@pytest.mark.parametrize(
    ("text", "expected", "fix"),
    [
        ("", "cpu or cuda or rtx or trt", "cpu"),
        ("tpu", "cpu or cuda or rtx or trt", "cpu"),
        ("CPU", "cpu or cuda or rtx or trt", "cpu"),
        ("cpu:avx2", "cpu, without architectures", "cpu"),
        ("rtx", "rtx: and some of sm75, sm80, sm86, sm89, sm120, sm121", "rtx:sm121"),
        ("rtx:sm90", "rtx: and some of sm75, sm80, sm86, sm89, sm120, sm121", "rtx:sm121"),
        ("rtx:sm89+sm89", "rtx: and some of sm75, sm80, sm86, sm89, sm120, sm121, joined by +, each once", "rtx:sm121"),
        ("trt:sm89+", "trt: and some of sm75", "trt:sm121"),
    ],
)
def test_targets_that_are_not_known(text: str, expected: str, fix: str) -> None:
    with pytest.raises(RequestError) as caught:
        Target.parse(text)
    require_message(caught.value, f"the target {text!r} is not known", f"expected: {expected}", f"--target {fix}")
