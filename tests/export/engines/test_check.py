"""Receipts against what a recipe promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reelforge.export.engines.check import check_plan
from reelforge.export.engines.request import Expected
from reelforge.runtime.errors import BuildError
from reelforge.runtime.receipt import LayerRecord
from reelforge.runtime.recipe import Precision


def gemm(name: str, inputs: str = "FP8", constants: str = "FP8", kind: str = "gemm") -> LayerRecord:
    return LayerRecord(f"{name}_myl0_1", kind, "k", (inputs,), ("BFloat16",), (constants, "Float"), (name,))


def attention(name: str, kind: str = "FP8", third: str = "") -> LayerRecord:
    inputs = (kind, kind, third or kind, "Int32")
    return LayerRecord("_gemm_mha_v2_myl0_1", "attention", "k", inputs, ("BFloat16",), (), (name,))


EXPECTED = Expected(layers={"a": Precision.FP8, "b": Precision.INT8}, attentions={"c": Precision.FP8})
GOOD = (gemm("a"), gemm("b", "Int8", "Int8"), attention("c"))


def test_as_promised() -> None:
    check_plan("dit", [GOOD], EXPECTED)
    check_plan("dit", [GOOD, GOOD], EXPECTED)
    check_plan("dit", [()], Expected())
    check_plan("dit", [(gemm("a", kind="convolution"),)], Expected(layers={"a": Precision.FP8}))


def test_a_mask_comes_before_the_values() -> None:
    def masked(values: str) -> LayerRecord:
        return replace(attention("c"), inputs=("FP8", "FP8", "BFloat16", values))

    check_plan("dit", [(*GOOD[:2], masked("FP8"))], EXPECTED)
    with pytest.raises(BuildError, match="c: fused in FP8, FP8, Half, wanted fp8"):
        check_plan("dit", [(*GOOD[:2], masked("Half"))], EXPECTED)


def test_a_neighbour_that_names_a_layer_too() -> None:
    # The bias of "a" or the scale of "c", fused to a product in another format.
    check_plan("dit", [(*GOOD, gemm("a", "Half", "Half"), gemm("c", "Half", "Half"))], EXPECTED)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ((gemm("a", "BFloat16", "BFloat16"), *GOOD[1:]), "a: computed in BFloat16 x BFloat16, wanted fp8"),
        ((gemm("a", "FP8", "BFloat16"), *GOOD[1:]), "a: computed in FP8 x BFloat16, wanted fp8"),
        ((gemm("a", "Int8", "Int8"), *GOOD[1:]), "a: computed in Int8 x Int8, wanted fp8"),
        (GOOD[1:], "a: no product found, wanted fp8"),
        ((gemm("a", kind="other"), *GOOD[1:]), "a: no product found, wanted fp8"),
        (
            (gemm("a", "Half", "Half"), gemm("a", "FP8", "Half"), *GOOD[1:]),
            "a: computed in Half x Half and FP8 x Half, wanted fp8",
        ),
        ((*GOOD[:2], attention("c", "BFloat16")), "c: fused in BFloat16, BFloat16, BFloat16, wanted fp8"),
        ((*GOOD[:2], attention("c", "FP8", "Half")), "c: fused in FP8, FP8, Half, wanted fp8"),
        (GOOD[:2], "c: not fused: 0 attention kernels and 0 products"),
        ((*GOOD[:2], gemm("c"), gemm("c")), "c: not fused: 0 attention kernels and 2 products"),
        ((*GOOD, attention("c")), "c: not fused: 2 attention kernels and 0 products"),
    ],
)
def test_what_is_not_as_promised(layers: tuple[LayerRecord, ...], problem: str) -> None:
    for profiles in ([layers], [GOOD, layers]):
        with pytest.raises(BuildError, match="1 of 3 layers and attentions of stage 'dit'") as caught:
            check_plan("dit", profiles, EXPECTED)
        assert problem in str(caught.value)


def test_many_are_counted_and_the_first_are_named() -> None:
    wanted = Expected(layers={f"layer{index}": Precision.FP8 for index in range(40)})
    with pytest.raises(BuildError, match="33 of 40") as caught:
        check_plan("dit", [[gemm(f"layer{index}") for index in range(7)]], wanted)
    text = str(caught.value)
    assert "layer7: " in text
    assert "layer11: " in text
    assert "layer12" not in text
    assert "and 28 more" in text


def test_a_compiler_that_says_nothing() -> None:
    with pytest.raises(BuildError, match="said nothing about the layers of stage 'dit'"):
        check_plan("dit", [], EXPECTED)
    check_plan("dit", [], Expected())


def plugin(name: str, kind: str = "plugin") -> LayerRecord:
    return LayerRecord(f"{name}.int8_fp8_attention", kind, "PluginV3", ("Int8", "Float"), ("BFloat16",), (), (name,))


def test_an_attention_by_a_plugin_is_one_layer() -> None:
    expected = Expected(plugins={"c": "int8_fp8_attention", "d": "int8_fp8_attention"})
    good = (plugin("c"), plugin("d"))
    check_plan("dit", [good, good], expected)
    with pytest.raises(BuildError, match="1 of 2 layers and attentions of stage 'dit'") as caught:
        check_plan("dit", [good, good[:1]], expected)
    assert "d: not one layer of int8_fp8_attention: 0 plugins and 0 attention kernels" in str(caught.value)
    with pytest.raises(BuildError, match="c: not one layer of int8_fp8_attention: 2 plugins"):
        check_plan("dit", [(*good, plugin("c"))], expected)
    with pytest.raises(BuildError, match="c: not one layer of int8_fp8_attention: 0 plugins and 1 attention kernels"):
        check_plan("dit", [(attention("c"), plugin("d"))], expected)
    with pytest.raises(BuildError, match="said nothing about the layers"):
        check_plan("dit", [], expected)
