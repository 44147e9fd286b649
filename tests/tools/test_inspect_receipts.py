"""``reelforge inspect`` on bundles with plans: tables, layers, JSON, and receipts that cannot be believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError, RequestError
from reelforge.runtime.manifest import ProfileEntry
from reelforge.runtime.recipe import Precision
from reelforge.tools.inspect_receipts import (
    _kernel,
    architectures_text,
    layer_counts,
    precisions_text,
    read_receipts,
    words_of,
)
from reelforge.tools.main import cli
from tests.tools.plan_bundles import Part, Written, dit_layers, other, write_plan_bundle

PROFILES = (
    ProfileEntry("720x1280x129", {"latent_frames": (1, 33, 33), "text_tokens": (1, 80, 256)}, 9_800_000_000),
    ProfileEntry("480x832x81", {"latent_frames": (21, 21, 21), "text_tokens": (1, 80, 256)}, 2_700_000_000),
)
CONVOLUTIONS = tuple(other("convolution", f"decoder.{k}", "BF16") for k in range(3))
RTX = Written(
    precision={"dit": Precision.FP8},
    plans={
        "dit": {
            "sm89+sm120": [Part(dit_layers("FP8", "FP8"), b"d" * 900, 12_550_000_000, PROFILES, 286.4)],
            "sm80+sm86": [
                Part(dit_layers("INT8", "BF16", [0]), b"a", 6_000_000_000, PROFILES[:1], 100.0),
                Part(dit_layers("INT8", "BF16", [1]), b"b", 6_500_000_000, PROFILES[:1], 110.0),
            ],
        },
        "vae_decoder": {"sm89+sm120": [Part(CONVOLUTIONS, b"v", 290_000_000)]},
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; not to be altered."""
    path = tmp_path_factory.mktemp("plans") / "rtx.bundle"
    write_plan_bundle(path, RTX)
    return path


def run(*arguments: str | Path, columns: int = 100) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], env={"COLUMNS": str(columns)})


def rows(output: str, title: str) -> list[list[str]]:
    """Return the words of the lines of one table."""
    lines = output[output.index(title) :].splitlines()
    ruler = next(index for index, line in enumerate(lines) if line.startswith("──"))
    end = next((index for index, line in enumerate(lines[ruler + 1 :], ruler + 1) if line == ""), len(lines))
    return [line.split() for line in lines[ruler + 1 : end] if line.strip()]


def test_a_row_for_every_plan(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert rows(result.output, "\nplans") == [
        ["dit", "6", "FP8", "2", "FP8", "-", "1/2", "14", "12.6", "GB", "919", "B", "286.4", "s"],
        ["sm89+sm120", "1", "BF16"],
        ["dit.0", "3", "INT8", "1", "BF16", "-", "1/1", "7", "6.0", "GB", "21", "B", "100.0", "s"],
        ["sm80+sm86"],
        ["dit.1", "3", "INT8", "1", "BF16", "-", "0/1", "7", "6.5", "GB", "21", "B", "110.0", "s"],
        ["sm80+sm86", "1", "BF16"],
        ["vae_decoder", "-", "-", "3", "BF16", "0/0", "3", "290.0", "MB", "28", "B", "12.5", "s"],
        ["sm89+sm120"],
        ["all", "31", "25.3", "GB", "989", "B", "508.9", "s"],
    ]
    assert rows(result.output, "\nprofiles")[:4] == [
        ["dit", "sm89+sm120", "720x1280x129", "9.8", "GB", "latent_frames", "1..33"],
        ["text_tokens", "1..256", "(80)"],
        ["480x832x81", "2.7", "GB", "latent_frames", "21"],
        ["text_tokens", "1..256", "(80)"],
    ]


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_no_line_is_wider_than_the_screen(folder: Path, columns: int) -> None:
    for arguments in ([], ["--layers", "dit"], ["--diff", folder]):
        output = run(folder, *arguments, columns=columns).output
        assert max(map(len, output.splitlines())) <= columns


def test_at_eighty_columns_nothing_is_cut(folder: Path) -> None:
    output = run(folder, columns=80).output
    tables = output[output.index("\nplans") :]
    assert "…" not in tables
    assert "vae_decoder" in tables


def test_at_a_hundred_columns_no_heading_is_cut(folder: Path) -> None:
    output = run(folder).output
    plans = output[output.index("\nplans") :].splitlines()
    assert plans[2].split() == ["atten-", "reformat"]
    headings = "plan, for GEMMs tion conv. /cast layers weights plan built"
    assert plans[3].split() == headings.split()
    assert "…" not in "\n".join(plans[:15])


def test_one_plan_has_no_sum(tmp_path: Path) -> None:
    write_plan_bundle(tmp_path / "b", replace(RTX, plans={"vae_decoder": RTX.plans["vae_decoder"]}))
    output = run(tmp_path / "b").output
    assert [row[0] for row in rows(output, "\nplans")] == ["vae_decoder", "sm89+sm120"]


def test_every_layer(folder: Path) -> None:
    result = run(folder, "--layers", "dit")
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.output.splitlines() if " layers" in line] == [
        "dit for sm89+sm120: 14 layers",
        "dit.0 for sm80+sm86: 7 layers",
        "dit.1 for sm80+sm86: 7 layers",
    ]
    first = rows(result.output, "dit for")
    assert first[1] == ["1", "gemm", "FP8", "FP8", "BF16", "double.0.image.q/MatMul+"]
    assert first[2] == ["double.0.image.q/Add_myl0_1"]
    assert ["4", "attention", "FP8", "x3", "BF16", "_gemm_mha_v2_double.0.attention"] in first


def test_every_layer_for_machines(folder: Path) -> None:
    """In the compiler's own words, which the tables shorten."""
    value = json.loads(run(folder, "--layers", "dit", "--json").output)
    assert (value["bundle"], value["stage"]) == (str(folder), "dit")
    assert [len(plan["layers"]) for plan in value["plans"]] == [14, 7, 7]
    assert value["plans"][0]["layers"][4] == {
        "name": "_gemm_mha_v2_double.0.attention",
        "kind": "attention",
        "kernel": "_gemm_mha_v2",
        "inputs": ["FP8", "FP8", "FP8"],
        "outputs": ["BFloat16"],
        "constants": [],
        "nodes": ["double.0.attention"],
    }


def test_receipts_for_machines(folder: Path) -> None:
    value = json.loads(run(folder, "--json").output)
    modulation, dit, _ = value["stages"]
    assert modulation["plans"] == []
    plan = dit["plans"][0]
    assert "layers" not in plan
    assert plan == {
        "stage": "dit",
        "path": "plans/dit.sm89+sm120.plan",
        "sha256": plan["sha256"],
        "architectures": ["sm89", "sm120"],
        "part": 0,
        "parts": 1,
        "backend": "tensorrt_rtx 1.7.1.116",
        "plan_bytes": 919,
        "weight_bytes": 12_550_000_000,
        "activation_bytes": {"720x1280x129": 9_800_000_000, "480x832x81": 2_700_000_000},
        "profiles": plan["profiles"],
        "build_seconds": 286.4,
        "layer_counts": {
            "attention": {"FP8": 2},
            "cast": {"all": 2},
            "gemm": {"BF16": 1, "FP8": 6},
            "other": {"all": 2},
            "reformat": {"all": 1},
        },
    }
    assert plan["profiles"][1]["dimensions"] == {"latent_frames": [21, 21, 21], "text_tokens": [1, 80, 256]}


def test_a_bundle_without_plans(tmp_path: Path) -> None:
    write_plan_bundle(tmp_path / "b", Written(target="cpu"))
    output = run(tmp_path / "b").output
    assert "profiles" not in output
    assert "\nplans" not in output
    value = json.loads(run(tmp_path / "b", "--json").output)
    assert [stage["plans"] for stage in value["stages"]] == [[], [], []]
    error = run(tmp_path / "b", "--layers", "dit").exception
    assert isinstance(error, RequestError)
    assert "stage 'dit' of bundle 'b' has no plans whose layers could be listed" in str(error)
    assert "received: the target cpu   expected: a bundle that was built for rtx or trt" in str(error)
    assert "fix: leave --layers out" in str(error)


def test_layers_of_no_stage(folder: Path) -> None:
    error = run(folder, "--layers", "vae").exception
    assert isinstance(error, RequestError)
    assert "bundle 'rtx.bundle' has no stage 'vae'" in str(error)
    assert "received: vae   expected: modulation, dit, vae_decoder" in str(error)
    assert "fix: use one of them with --layers" in str(error)


def test_layers_and_diff_together(folder: Path) -> None:
    error = run(folder, "--layers", "dit", "--diff", folder).exception
    assert isinstance(error, RequestError)
    assert "--layers and --diff are given together" in str(error)
    assert "fix: compare with --diff" in str(error)


def test_an_unknown_amount_of_memory(tmp_path: Path) -> None:
    """A receipt need not state every profile: the plan's own entry says which there are."""
    path = tmp_path / "b"
    write_plan_bundle(path, RTX)
    edit(path, lambda value: value["activation_bytes"].pop("480x832x81"))
    assert ["480x832x81", "unknown", "latent_frames", "21"] in rows(run(path, "--check", "sizes").output, "\nprofiles")


# Receipts that cannot be believed. A full check finds altered bytes first, so these are checked by size only.

RECEIPT = "receipts/dit.sm89+sm120.plan.json"


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    """Change a receipt, and its size in the manifest."""
    path = bundle / RECEIPT
    value = json.loads(path.read_text())
    change(value)
    resize(bundle, json.dumps(value).encode())


def resize(bundle: Path, data: bytes) -> None:
    (bundle / RECEIPT).write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    next(entry for entry in manifest["files"] if entry["path"] == RECEIPT)["bytes"] = len(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def unlist(bundle: Path, path: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != path]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda b: edit(b, lambda v: v.update(version=7)), ["has a version that this reelforge does not read", "7"]),
        (lambda b: edit(b, lambda v: v.pop("version")), ["has a version", "received: None   expected: 1"]),
        (lambda b: resize(b, b"[]"), ["has a version that this reelforge does not read"]),
        (lambda b: resize(b, b"{"), ["cannot be read: Expecting property name"]),
        (lambda b: resize(b, b"\xff"), ["cannot be read: 'utf-8' codec"]),
        (lambda b: edit(b, lambda v: v.update(layers=3)), ["cannot be read: $.layers: expected a list, received 3"]),
        (lambda b: edit(b, lambda v: v.update(stage="clip")), ["describes another plan", "received: stage 'clip'"]),
        (lambda b: edit(b, lambda v: v.update(plan_sha256="0")), ["describes another plan", "expected: stage 'dit'"]),
    ],
)
def test_receipts_that_cannot_be_believed(tmp_path: Path, damage: Callable[[Path], None], parts: list[str]) -> None:
    path = tmp_path / "b"
    write_plan_bundle(path, RTX)
    damage(path)
    for arguments in ([], ["--json"], ["--layers", "dit"], ["--diff", path]):
        error = run(path, "--check", "sizes", *arguments).exception
        assert isinstance(error, BundleError)
        for part in [f"receipt {RECEIPT!r} of bundle 'b'", *parts, "fix: "]:
            assert part in str(error), str(error)


@pytest.mark.parametrize("path", [RECEIPT, "plans/dit.sm89+sm120.plan"])
def test_files_that_the_manifest_does_not_list(tmp_path: Path, path: str) -> None:
    """Nothing outside of what the manifest lists, and therefore outside of the folder, is read."""
    write_plan_bundle(tmp_path / "b", RTX)
    unlist(tmp_path / "b", path)
    error = run(tmp_path / "b", "--check", "sizes").exception
    assert isinstance(error, BundleError)
    assert "manifest.json" in str(error)
    assert repr(path) in str(error)


# Words.


def test_counts(folder: Path) -> None:
    receipts = [item.receipt for item in read_receipts(Bundle.open(folder))]
    counts = layer_counts(receipts)
    assert counts["gemm"] == {"BF16": 2, "FP8": 6, "INT8": 6}
    assert sum(sum(each.values()) for each in counts.values()) == sum(len(receipt.layers) for receipt in receipts)
    bare = replace(dit_layers("FP8", "FP8")[1], inputs=())
    assert layer_counts([replace(receipts[0], layers=(bare,))]) == {"gemm": {"none": 1}}
    assert layer_counts([]) == {}


def test_words() -> None:
    assert precisions_text({"BF16": 3, "FP8": 240, "INT8": 3}) == "240 FP8\n3 BF16\n3 INT8"
    assert precisions_text({}) == "-"
    assert architectures_text(("sm80", "sm86", "sm89")) == "sm80+sm86+\nsm89"
    assert words_of(["FP8", "FP8", "BF16", "FP8"]) == ["FP8 x2", "BF16", "FP8"]
    assert words_of([]) == []
    assert words_of(["BFloat16", "Float", "Half", "Bool"]) == ["BF16", "FP32", "FP16", "Bool"]


def test_kernels_that_say_nothing_new_are_left_out() -> None:
    layer = other("other")
    merged = replace(layer, name="__myl_MulCast_myl0_1", kernel="__myl_MulCast_0x6ec415f3bd3c6ae0856fc06399a684dc")
    told = replace(layer, name="fc_myl0_2", kernel="sm80_xmma_gemm_0x12ef")
    assert [_kernel(each) for each in (layer, merged, told)] == ["", "", "sm80_xmma_gemm"]
