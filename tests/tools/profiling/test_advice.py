"""Advice: which rules fit which layers, and that what is promised follows from a number."""

from __future__ import annotations

import re
from dataclasses import replace

import click
import pytest

from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.build_engine import build_engine
from reelforge.tools.generate import generate
from reelforge.tools.profile import profile as profile_command
from reelforge.tools.profiling.advice import RULES, Facts, advise
from reelforge.tools.profiling.layers import TOP, layer_profile
from reelforge.tools.profiling.roofline import point, share_of_roof
from reelforge.tools.profiling.schema import Advice, LayerProfile, Peak
from tests.tools.profiling.profiles import LAYERS, PEAK, WORK, layer, profile


def facts(**changes: object) -> Facts:
    made = profile()
    assert made.warm is not None
    return replace(Facts(WORK, PEAK, made.warm, made.cold), **changes)  # type: ignore[arg-type]


def about(found: tuple[Advice, ...], name: str) -> str:
    return " | ".join(f"{one.action}: {one.reason}" for one in found if one.about == f"dit: {name}")


def one(*layers: object) -> LayerProfile:
    return replace(LAYERS, layers=layers)  # type: ignore[arg-type]


def test_products_in_fp32_gain_what_the_processor_gains() -> None:
    found = advise(LAYERS, facts())
    eight = next(item for item in found if "--precision dit=int8" in item.action)
    assert "3.0 times of fp32's rate" in eight.reason or "3.0 times" in eight.reason
    assert eight.saves_ms == pytest.approx(15 * (1 - 1 / 3))


def test_no_promise_without_a_measurement() -> None:
    found = advise(LAYERS, facts(peak=None))
    eight = next(item for item in found if "--precision dit=int8" in item.action)
    assert eight.saves_ms is None


def test_eight_bits_are_no_advice_where_they_are_not_faster() -> None:
    slow = replace(PEAK, flops={"fp32": 100e9, "int8": 90e9})
    assert "int8" not in about(advise(LAYERS, facts(peak=slow)), "double.0.image.fc1")
    quantised = one(layer("double.0.image.fc1", "", "gemm", 5.0, 100, precision="int8"))
    assert "--precision" not in about(advise(quantised, facts()), "double.0.image.fc1")


def run_advice(about: str, **changes: object) -> Advice | None:
    return next((item for item in advise(None, facts(**changes)) if item.about == about), None)


def test_the_loop_is_told_of_step_caching() -> None:
    without = run_advice("step cache")
    assert without is not None
    assert "--step-cache" not in without.action  # this bundle has no stages for it
    assert "fewer --steps" in without.action
    stages = dict.fromkeys(("dit", "step_change"), "fp32")
    found = run_advice("step cache", work=replace(WORK, precision=stages))
    assert found is not None
    assert "--step-cache easycache:0.025" in found.action
    assert "after build-engine --partition head,body,tail" in found.action
    assert "all 3 steps are computed; each further step that is skipped saves up to 11.5 ms of 63.5" in found.reason
    parted = run_advice("step cache", work=replace(WORK, precision={**stages, "dit_head": "fp32"}))
    assert parted is not None
    assert "fbcache:0.08, or" in parted.action


def test_idle_cores_are_pointed_out() -> None:
    found = run_advice("threads", work=replace(WORK, threads=1), cores=4)
    assert found is not None
    assert "--threads 4" in found.action
    assert "1 of 4 cores" in found.reason
    assert run_advice("threads", work=replace(WORK, threads=4), cores=4) is None
    assert run_advice("threads", cores=4) is None


def test_fp32_on_a_gpu_is_told_of_fp16() -> None:
    work = replace(WORK, target="cuda")
    peak = Peak("a GPU", {"fp32": 50e12, "fp16": 200e12}, 1e12, measured=True, source="a measurement")
    found = run_advice("precision", work=work, peak=peak)
    assert found is not None
    assert "--precision fp16" in found.action
    assert "4.0 times" in found.reason
    assert found.saves_ms == pytest.approx(31.5 * 0.75)
    unknown = run_advice("precision", work=work, peak=None)
    assert unknown is not None
    assert unknown.saves_ms is None
    assert run_advice("precision") is None
    assert run_advice("precision", work=replace(work, precision={"dit": "fp16"}), peak=peak) is None


def test_attention_in_integers_is_for_many_tokens() -> None:
    assert "--attention" not in about(advise(LAYERS, facts()), "double.0.attention")
    long = replace(WORK, image_tokens=2060)
    text = about(advise(LAYERS, facts(work=long)), "double.0.attention")
    assert "--precision dit=int8 --attention int8" in text
    assert "2,060 image tokens" in text
    found = [item for item in advise(LAYERS, facts(work=long)) if "--attention int8" in item.action]
    assert [item.saves_ms for item in found] == [None]  # the softmax between the products stays
    assert "--attention" not in about(
        advise(LAYERS, facts(work=replace(long, attention="radial"))), "double.0.attention"
    )


def options_of(*commands: click.Command) -> set[str]:
    return {name for command in commands for option in command.params for name in option.opts}


def test_every_option_that_is_named_exists() -> None:
    known = options_of(build_engine, generate, profile_command)
    stages = dict.fromkeys(("dit", "step_change"), "fp32")
    texts = [rule.action for rule in RULES]
    for work in (WORK, replace(WORK, target="cuda"), replace(WORK, precision=stages, threads=1, cfg_scale=6.0),
                 replace(WORK, step_cache="easycache:0.1")):  # fmt: skip
        texts += [item.action for item in advise(None, facts(work=work, cores=2))]
    named = {option for text in texts for option in re.findall(r"--[a-z][a-z-]*", text)}
    assert {"--precision", "--attention", "--partition", "--step-cache", "--threads", "--target"} <= named
    assert named <= known
    assert StepCache.parse("easycache:0.025").threshold == 0.025
    assert StepCache.parse("fbcache:0.08").threshold == 0.08


@pytest.mark.parametrize(
    ("target", "precision"),
    [("rtx:sm80+sm89", "int8"), ("rtx:sm89+sm120", "fp8"), ("trt:sm90", "fp8"), ("rtx:sm75", "")],
)
def test_8_bits_are_those_that_every_architecture_has(target: str, precision: str) -> None:
    layers = one(layer("double.0.image.fc1", "", "gemm", 5.0, 10**12, precision="bf16"))
    text = about(advise(layers, facts(work=replace(WORK, target=target), peak=None)), "double.0.image.fc1")
    assert re.findall(r"--precision dit=(\w+)", text) == ([precision] if precision else [])


def test_a_gpu_is_told_of_fp8() -> None:
    peak = Peak("H200", {"bf16": 989.4e12, "fp8": 1978.9e12}, 4.8e12, measured=False, source="a datasheet")
    layers = one(
        layer("double.0.image.fc1", "", "gemm", 5.0, 10**12, precision="bf16"),
        layer("double.0.attention", "", "attention", 2.0, 10**12, precision="bf16"),
    )
    found = advise(layers, facts(work=replace(WORK, target="trt:sm90"), peak=peak))
    assert "--precision dit=fp8" in about(found, "double.0.image.fc1")
    assert "--attention fp8" in about(found, "double.0.attention")
    assert "2.0 times" in about(found, "double.0.attention")
    assert "int8" not in about(found, "double.0.image.fc1")


def test_overlapping_tiles() -> None:
    layers = one(layer("decoder.conv_in.conv", "", "convolution", 5.0, 10**9, stage="vae_decoder"))
    found = advise(layers, facts())
    overlap = next(item for item in found if "overlap" in item.action)
    assert "25%" in overlap.reason
    assert overlap.saves_ms == pytest.approx(15 * 0.25)
    assert "overlap" not in str(advise(layers, facts(work=replace(WORK, overlap=0.0))))


def test_only_the_largest_are_advised() -> None:
    many = one(*(layer(f"double.{index}.image.q", "", "gemm", 1.0) for index in range(30)))
    assert len([item for item in advise(many, facts()) if item.about.startswith("dit: ")]) <= TOP
    assert {item.about for item in advise(None, facts())} <= {"loading", "opening", "step cache"}


def test_every_text_can_be_filled_in() -> None:
    every = [
        layer("double.0.x", "", kind, 1.0, 10**6, 10**9, stage=stage, precision=precision)
        for kind in ("gemm", "attention", "convolution", "norm", "elementwise", "quantise", "layout", "other")
        for stage in ("dit", "llm", "vae_decoder")
        for precision in ("", "fp32", "bf16")
    ]
    said = set()
    for target in ("cpu", "cuda", "rtx:sm80", "rtx:sm89", "trt:sm90"):
        for item in every:
            found = advise(one(item), facts(work=replace(WORK, target=target, image_tokens=10**5)))
            said |= {advice.action for advice in found}
            assert not [advice for advice in found if "{" in advice.action + advice.reason]
    assert len(said) >= len(RULES)


def test_the_roof() -> None:
    fast = point(layer("a", "", "gemm", 10.0, 10**9, 10**6), PEAK)
    assert fast is not None
    assert (fast.intensity, fast.rate, fast.roof, fast.bound) == (1000, 1e11, 100e9, "arithmetic")
    assert share_of_roof(fast) == "100%"
    slow = point(layer("a", "", "gemm", 10.0, 10**6, 10**6), PEAK)
    assert slow is not None
    assert (slow.roof, slow.bound) == (10e9, "memory")
    assert slow.efficiency == pytest.approx(0.01)
    assert share_of_roof(replace(fast, rate=2e11)) == "all and more"
    assert point(layer("a", "", "layout", 10.0), PEAK) is None
    assert point(layer("a", "", "gemm", 10.0, 1, 1), None) is None
    assert layer_profile("", [], {}, {}).layers == ()
