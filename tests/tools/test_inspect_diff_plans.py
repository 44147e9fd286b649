"""``reelforge inspect --diff`` on plans: layers that changed precision, parts, groups of architectures, no plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reelforge.tools.inspect_diff import Change
from tests.tools.compared_bundles import (
    BF16,
    FP8,
    NAMES,
    PROFILE,
    compare,
    plan,
    shown,
    squeezed,
    stage,
    weights_as,
)
from tests.tools.plan_bundles import Part, dit_layers, gemm


def test_one_layer_that_stayed_in_high_precision(tmp_path: Path) -> None:
    [part] = FP8.plans["dit"]["sm89+sm120"]
    layers = tuple(gemm("double.0.image.k", "BF16") if "image.k" in each.name else each for each in part.layers[:3])
    other = replace(part, layers=(*layers, *part.layers[3:]), data=b"other")
    found = compare(tmp_path, FP8, replace(FP8, plans={"dit": {"sm89+sm120": [other]}}))
    assert plan(found, "dit").precisions == (Change("double.0.image.k", "FP8", "BF16"),)
    assert "dit FP8 BF16 1 double.0.image.k" in squeezed(shown(tmp_path / "first", tmp_path / "second"))


def test_layers_in_one_of_the_two_only(tmp_path: Path) -> None:
    """Also one that the compiler computes in two pieces of different precision."""
    first = replace(BF16, plans={"dit": {"sm89+sm120": [Part((gemm("a", "FP8"), gemm("b", "FP8")))]}})
    second = replace(
        BF16, plans={"dit": {"sm89+sm120": [Part((gemm("b", "FP8"), gemm("b", "BF16"), gemm("c")), b"2")]}}
    )
    assert plan(compare(tmp_path, first, second), "dit").precisions == (
        Change("a", "FP8", None),
        Change("b", "FP8", "BF16+FP8"),
        Change("c", None, "FP8"),
    )
    assert "dit - FP8 1 c" in squeezed(shown(tmp_path / "first", tmp_path / "second"))


def test_parts_are_compared_as_one(tmp_path: Path) -> None:
    parts = [
        Part(dit_layers("BF16", "BF16", [0]), b"0", 12 * 10**9, (PROFILE,), 200.0),
        Part(dit_layers("BF16", "BF16", [1]), b"1", 13 * 10**9, (replace(PROFILE, activation_bytes=3 * 10**9),), 270.0),
    ]
    found = compare(tmp_path, BF16, replace(BF16, plans={**BF16.plans, "dit": {"sm89+sm120": parts}}))
    plans = plan(found, "dit")
    assert plans.precisions == ()
    assert plans.first.layer_counts == plans.second.layer_counts
    assert (plans.first.parts, plans.second.parts) == (1, 2)
    assert plans.second.weight_bytes == plans.first.weight_bytes
    assert plans.second.activation_bytes == {"480x832x81": 3 * 10**9}  # the larger: they run one after the other
    assert found.same_content
    assert not found.equal
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    assert "the content is equal; what differs is below." in lines
    assert "parts 1 2" in lines


def test_groups_of_architectures(tmp_path: Path) -> None:
    """Equal groups are compared with each other whatever their order; what is left, with what is left."""
    part = [Part((gemm("a"),))]
    first = replace(BF16, plans={"dit": {"sm80+sm86": part, "sm89+sm120": part, "sm75": part}})
    second = replace(BF16, plans={"dit": {"sm89+sm120": part, "sm89": part}})
    found = compare(tmp_path, first, second)
    pairs = [
        (each.first and each.first.architectures, each.second and each.second.architectures) for each in found.plans
    ]
    assert pairs == [(("sm89", "sm120"), ("sm89", "sm120")), (("sm80", "sm86"), ("sm89",)), (("sm75",), None)]
    assert "dit plans for sm75 -" in squeezed(shown(tmp_path / "first", tmp_path / "second"))


# Bundles without plans.


def test_without_plans(tmp_path: Path) -> None:
    first = replace(BF16, target="cpu", plans={}, weights={"dit": weights_as("F32")})
    second = replace(FP8, target="cpu", plans={}, weights={"dit": weights_as("I8")}, quality=None)
    found = compare(tmp_path, first, second)
    assert found.plans == ()
    assert found.quality == ()
    assert [change.name for change in stage(found, "dit").weights_retyped] == NAMES
    output = shown(tmp_path / "first", tmp_path / "second")
    assert "\nplans" not in output
    assert "F32" in output


def test_with_plans_and_without(tmp_path: Path) -> None:
    found = compare(tmp_path, replace(BF16, target="cpu", plans={}), BF16)
    plans = plan(found, "dit")
    assert plans.first is None
    assert plans.second.layer_counts["gemm"] == {"BF16": 7}
    assert plans.precisions == ()
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    assert "dit plans for - sm89+sm120" in lines
    assert not [line for line in lines if line.startswith("GEMMs")]
