"""Advice: which rules fit which layers, and that what is promised follows from a number."""

from __future__ import annotations

from dataclasses import replace

import pytest

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


def test_the_loop_is_told_of_step_caching() -> None:
    text = about(advise(LAYERS, facts()), "double.0.image.fc1")
    assert "--step-cache" in text
    assert "it runs 3 times per video" in text


def test_sparse_attention_is_for_many_tokens() -> None:
    assert "leave out keys" not in about(advise(LAYERS, facts()), "double.0.attention")
    long = facts(work=replace(WORK, image_tokens=118_800))
    assert "118,800 image tokens" in about(advise(LAYERS, long), "double.0.attention")


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
    assert len({item.about for item in advise(many, facts())}) <= TOP + 2
    assert all(item.about in ("loading", "opening") for item in advise(None, facts()))


def test_every_text_can_be_filled_in() -> None:
    every = [
        layer("double.0.x", "", kind, 1.0, 10**6, 10**9, stage=stage, precision=precision)
        for kind in ("gemm", "attention", "convolution", "norm", "elementwise", "quantise", "layout", "other")
        for stage in ("dit", "llm", "vae_decoder")
        for precision in ("", "fp32", "bf16")
    ]
    said = set()
    for target in ("cpu", "cuda", "rtx:sm89", "trt:sm90"):
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
