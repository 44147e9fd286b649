"""``reelforge inspect --diff``: every kind of difference is found, named and counted, and nothing else is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.errors import BundleError
from reelforge.runtime.recipe import Precision
from reelforge.tools.inspect_diff import Change
from reelforge.tools.inspect_diff_tables import fold_names
from reelforge.tools.main import cli
from tests.runtime.fake_bundle import write_fake_bundle
from tests.tools.compared_bundles import (
    BF16,
    FP8,
    NAMES,
    QUALITY,
    compare,
    plan,
    shown,
    squeezed,
    stage,
    write,
)
from tests.tools.plan_bundles import Written

# Nothing differs.


def test_equal_bundles(tmp_path: Path) -> None:
    found = compare(tmp_path, FP8, FP8)
    assert found.equal
    assert found.same_content
    assert found.manifest == found.provenance == ()
    assert all(each.equal for each in (*found.stages, *found.plans))
    output = shown(tmp_path / "first", tmp_path / "second")
    assert "the bundles are equal." in output
    for line in (
        "dit equal equal equal",
        "vae_decoder plans for sm89+sm120 sm89+sm120",
        "everything equal equal",
    ):
        assert line in squeezed(output)
    for absent in ("manifest", "provenance", "another precision", "another type", "GEMMs"):
        assert absent not in output


def test_a_bundle_and_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "b", FP8)
    assert "stage first second" in squeezed(shown(path, path))


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """And so are long names, which would take the numbers' room."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first, second = write(tmp_path, "1/b", Written()), write(tmp_path, "2/b", Written(target="cpu"))
    assert "field first second" in squeezed(shown(first, second))
    assert "field first second" in squeezed(shown(first, second.rename(tmp_path / ("c" * 40))))
    assert "field b d" in squeezed(shown(first, (tmp_path / ("c" * 40)).rename(tmp_path / "d")))


# What was built.


def test_a_change_of_precision(tmp_path: Path) -> None:
    found = compare(tmp_path, BF16, FP8)
    assert not found.equal
    assert not found.same_content
    assert found.manifest == (Change("recipe.precision.dit", "bf16", "fp8"),)
    assert stage(found, "modulation").equal
    dit = stage(found, "dit")
    assert not dit.equal
    assert dit.weights_retyped == tuple(Change(name, "BF16", "F8_E4M3") for name in NAMES)
    assert (dit.weights_equal, dit.weights_changed, dit.weights_only_first) == (0, (), ())
    plans = plan(found, "dit")
    names = [name.removesuffix(".weight") for name in NAMES]
    names[3:3] = ["double.0.attention"]
    assert plans.precisions == tuple(Change(name, "BF16", "FP8") for name in [*names, "double.1.attention"])
    assert plans.first.layer_counts["gemm"] == {"BF16": 7}
    assert plans.second.layer_counts["gemm"] == {"BF16": 1, "FP8": 6}
    assert plan(found, "vae_decoder").equal
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    for line in (
        "the bundles differ.",
        "recipe.precision.dit bf16 fp8",
        "dit equal 6 of another type, 0 equal equal",
        "dit BF16 F8_E4M3 6 double.*.image.q.weight (2), double.*.image.k.weight (2),",
        "GEMMs in BF16 7 1",
        "GEMMs in FP8 0 6",
        "attention in FP8 0 2",
        "weights 25.0 GB 12.0 GB",
        "activations, 480x832x81 2.7 GB 2.7 GB",
        "built in 470.0 s 286.0 s",
        "dit BF16 FP8 8 double.*.image.q (2), double.*.image.k (2), double.*.image.fc1 (2),",
        "measured on - 2 of 32x48x5, 4 steps, seed 7",
        "PSNR in dB, median - equal",
        "PSNR in dB, worst - 34.5",
    ):
        assert line in lines, line


def test_stages(tmp_path: Path) -> None:
    first = replace(BF16, stages=("modulation", "dit"), plans={})
    second = replace(BF16, stages=("dit", "vae_decoder"), plans={})
    found = compare(tmp_path, first, second)
    assert [(each.name, each.only_in) for each in found.stages] == [
        ("modulation", "first"),
        ("dit", None),
        ("vae_decoder", "second"),
    ]
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    assert "modulation only in first" in lines
    assert "vae_decoder only in second" in lines


def test_weights(tmp_path: Path) -> None:
    ours = {"a": ("BF16", b"1"), "b": ("BF16", b"2"), "c": ("BF16", b"3"), "d": ("BF16", b"4")}
    theirs = {"a": ("BF16", b"1"), "b": ("BF16", b"?"), "c": ("I8", b"3"), "e": ("BF16", b"5")}
    found = stage(compare(tmp_path, Written(weights={"dit": ours}), Written(weights={"dit": theirs})), "dit")
    assert found.weights_equal == 1
    assert found.weights_changed == ("b",)
    assert found.weights_retyped == (Change("c", "BF16", "I8"),)
    assert (found.weights_only_first, found.weights_only_second) == (("d",), ("e",))
    assert found.graph == "equal"  # the same file
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    assert any(line.startswith("dit equal 1 of another type, 1 with other content, 1 only in first,") for line in lines)


@pytest.mark.parametrize(("change", "graph"), [("constants", "other content"), ("nodes", "other nodes")])
def test_graphs(tmp_path: Path, change: str, graph: str) -> None:
    """The second has another file; whether its nodes differ too is in the manifest."""
    first, second = write(tmp_path, "first", BF16), write(tmp_path, "second", BF16)
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["stages"][1]["graph_digest"] = "0" * 64
    if change == "nodes":
        manifest["stages"][1]["nodes"] = {"Mul": 7, "QuantizeLinear": 4}
    next(file for file in manifest["files"] if file["path"] == "dit.onnx")["sha256"] = "1" * 64
    (second / "manifest.json").write_text(json.dumps(manifest))
    found = json.loads(shown(first, second, "--json", "--check", "sizes"))
    dit = found["stages"][1]
    assert dit["graph"] == graph
    assert (dit["nodes"] == []) == (change == "constants")
    assert not found["equal"]
    output = shown(first, second, "--check", "sizes")
    assert ("+4 QuantizeLinear" in output) == (change == "nodes")


def test_what_the_manifest_says(tmp_path: Path) -> None:
    second = replace(
        BF16,
        target="rtx:sm89",
        template=replace(BF16.template, text="line\n" * 40 + "{}", crop_start=3),
        spec=replace(BF16.spec, defaults=replace(BF16.spec.defaults, steps=30), family="other"),
        provenance={"reelforge": "2", "torch": "1"},
        recipe={"batch": 2, "kept": {"dit": ("final.*",)}, "attention": Precision.FP8},
    )
    found = compare(tmp_path, BF16, second)
    assert [change.name for change in found.manifest] == [
        "spec.family",
        "spec.defaults.steps",
        "target",
        "recipe.batch",
        "recipe.kept.dit",
        "recipe.attention",
        "prompt_template.text",
        "prompt_template.crop_start",
    ]
    assert found.manifest[4] == Change("recipe.kept.dit", None, ["final.*"])
    assert found.provenance == (Change("reelforge", "test", "2"), Change("torch", None, "1"))
    output = shown(tmp_path / "first", tmp_path / "second")
    lines = squeezed(output)
    assert "spec.defaults.steps 4 30" in lines
    assert 'recipe.kept.dit - ["final.*"]' in lines
    assert "line\\nline\\n" in output  # cut, and on one line
    assert "torch - 1" in lines


def test_other_tokenizers(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_fake_bundle(first)
    shutil.copytree(first, second)
    manifest = json.loads((second / "manifest.json").read_text())
    next(file for file in manifest["files"] if file["path"] == "tokenizers/llm.json")["sha256"] = "0" * 64
    (second / "manifest.json").write_text(json.dumps(manifest))
    found = json.loads(shown(first, second, "--check", "sizes", "--json"))
    assert [change["name"] for change in found["manifest"]] == ["tokenizers.llm.json"]
    assert found["manifest"][0]["second"] == "0" * 64


# Quality.


def test_quality_that_differs(tmp_path: Path) -> None:
    other = replace(QUALITY, psnr_db=(30.0, 40.0), prompts=("a", "b"), stages={})
    found = compare(tmp_path, FP8, replace(FP8, quality=other))
    changed = {change.name: (change.first, change.second) for change in found.quality if change.first != change.second}
    assert changed == {
        "prompts": ('["a red ball", "rain"]', '["a", "b"]'),
        "PSNR in dB, median": ("equal", 35.0),
        "PSNR in dB, worst": (34.5, 30.0),
        "dit: worst cosine": (0.99, None),
        "dit: worst relative error": (0.02, None),
    }
    assert not found.equal
    assert found.same_content
    lines = squeezed(shown(tmp_path / "first", tmp_path / "second"))
    assert "PSNR in dB, median equal 35" in lines
    assert 'prompts ["a red ball", "rain"] ["a", "b"]' in lines
    json.loads(shown(tmp_path / "first", tmp_path / "second", "--json"), parse_constant=pytest.fail)  # no Infinity


# Machines, and damage.


def test_for_machines(tmp_path: Path) -> None:
    first, second = write(tmp_path, "first", BF16), write(tmp_path, "second", FP8)
    value = json.loads(shown(first, second, "--json"))
    assert (value["first"], value["second"]) == (str(first), str(second))
    assert (value["equal"], value["same_content"]) == (False, False)
    [dit] = [each for each in value["plans"] if each["stage"] == "dit"]
    assert dit["precisions"][0] == {"name": "double.0.image.q", "first": "BF16", "second": "FP8"}
    assert len(dit["precisions"]) == 8
    assert dit["second"]["layer_counts"]["attention"] == {"FP8": 2}


def test_both_bundles_are_checked(tmp_path: Path) -> None:
    first, second = write(tmp_path, "first", BF16), write(tmp_path, "second", BF16)
    (second / "dit.onnx").write_bytes(b"x")
    result = CliRunner().invoke(cli, ["inspect", str(first), "--diff", str(second)])
    assert isinstance(result.exception, BundleError)
    assert "'dit.onnx' of bundle 'second'" in str(result.exception)


# Names.


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["final.proj"], "final.proj"),
        (["double.0.q", "double.12.q", "single.3.fc1"], "double.*.q (2), single.3.fc1"),
        (["a.0.fc1", "a.0.fc2"], "a.0.fc1, a.0.fc2"),
        (["up_blocks.0.conv1", "up_blocks.1.conv1"], "up_blocks.*.conv1 (2)"),
    ],
)
def test_folded_names(names: list[str], text: str) -> None:
    assert fold_names(names) == text


@given(st.lists(st.from_regex(r"(double|single)\.\d{1,2}\.(q|k|fc1)", fullmatch=True), unique=True))
def test_folded_names_count_every_name(names: list[str]) -> None:
    parts = [part for part in fold_names(names).split(", ") if part]
    counts = [int(part.split("(")[1].rstrip(")")) if "(" in part else 1 for part in parts]
    assert sum(counts) == len(names)
