"""``reelforge inspect``: a table for people, one object for machines, and the check of the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import StageEntry, WeightEntry
from reelforge.runtime.recipe import Precision, SparseAttention, SparseKind
from reelforge.tools.build_report import shown
from reelforge.tools.console import format_bytes
from reelforge.tools.main import cli
from tests.runtime.fake_bundle import STAGES, write_fake_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_fake_bundle(tmp_path / "fake.bundle")
    return tmp_path / "fake.bundle"


def test_table(bundle: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(bundle)], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    for stage in STAGES:
        assert stage in result.output
    for text in (
        "every digest fits",
        "48x64x13",
        "[batch, 4, latent_frames, latent_height, latent_width]",
        "6 ReduceMean, 2 Add, 2 Mul, 1 Sum",
        "7.2 kB",
        "1.0e-06",
        "crops 7 tokens",
        Bundle.open(bundle).manifest.content_digest,
    ):
        assert text in result.output


def test_json(bundle: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(bundle), "--json", "--check", "sizes"])
    value = json.loads(result.output)
    manifest = Bundle.open(bundle).manifest
    assert value["check"] == "sizes"
    assert value["content_digest"] == manifest.content_digest
    assert value["target"] == "cpu"
    assert [stage["name"] for stage in value["stages"]] == list(STAGES)
    llm = value["stages"][0]
    assert (llm["weights"], llm["weights_bytes"], llm["weight_files"]) == (2, 7228, ["weights/llm.safetensors"])
    assert llm["precision"] == "fp32"
    assert llm["inputs"] == [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "prompt_tokens"]}]
    assert value["provenance"] == {"reelforge": "test"}
    assert value["files_bytes"] == sum(entry.bytes for entry in manifest.files)


def resealed(bundle: Path, **changes: Any) -> Path:
    """Let the manifest of a bundle say something else."""
    manifest = replace(Bundle.open(bundle).manifest, **changes).with_content_digest()
    (bundle / "manifest.json").write_text(json.dumps(to_json(manifest)))
    return bundle


def test_views_of_a_stage_store_nothing_and_have_its_layers(bundle: Path) -> None:
    """A recipe says fp32 of the view: of what is beside the 8-bit layers that the whole has."""
    manifest = Bundle.open(bundle).manifest
    first, second = manifest.stages[0].weights
    assert first.name != second.name
    codes = (replace(first, dtype="I8"), second)
    whole = replace(manifest.stages[0], weights=codes)
    views = [
        replace(whole, name="of_codes", weights=codes[:1]),
        replace(whole, name="of_others", weights=codes[1:]),
        replace(whole, name="of_nothing", weights=()),
    ]
    names = {"llm": Precision.INT8, **{view.name: Precision.FP32 for view in views}}
    stages = (whole, *manifest.stages[1:], *views)
    resealed(bundle, stages=stages, recipe=replace(manifest.recipe, precision={**manifest.recipe.precision, **names}))
    result = CliRunner().invoke(cli, ["inspect", str(bundle), "--check", "sizes"], env={"COLUMNS": "140"})
    sizes = [format_bytes(weight.length) for weight in codes]
    rows = [line.split()[:6] for line in result.output.splitlines() if "of llm's" in line]
    assert rows == [
        ["of_codes", "int8", *sizes[0].split(), "of", "llm's"],
        ["of_others", "fp32", *sizes[1].split(), "of", "llm's"],
    ]
    assert "beside 8 bits" in result.output
    value = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--check", "sizes", "--json"]).output)
    found = {stage["name"]: (stage["weights_of"], stage["precision"]) for stage in value["stages"]}
    assert found["llm"] == (None, "int8")
    assert found["of_codes"] == ("llm", "int8")
    assert found["of_others"] == ("llm", "fp32")
    assert found["of_nothing"] == (None, "fp32")


def test_what_was_asked_for_beside_precisions_is_said(bundle: Path) -> None:
    plain = CliRunner().invoke(cli, ["inspect", str(bundle)], env={"COLUMNS": "140"}).output
    recipe = Bundle.open(bundle).manifest.recipe
    changed = replace(
        recipe,
        precision={**recipe.precision, "dit": Precision.FP8},
        kept={"dit": ("single.0.*",)},
        attention=Precision.INT8,
        sparse_attention=SparseAttention(SparseKind.LISTS),
        batch=2,
    )
    resealed(bundle, recipe=changed, step_cache="easycache:0.1")
    said = CliRunner().invoke(cli, ["inspect", str(bundle)], env={"COLUMNS": "140"}).output
    for text in (
        "int8, of dit",
        "lists, blocks of 128 queries and 64 keys",
        "beside 8 bits",
        "dit: single.0.* in fp32",
        "videos per call",
        "easycache:0.1, for requests that say nothing",
    ):
        assert text in said, said
        assert text not in plain


def entry(name: str, weights: tuple[WeightEntry, ...], **nodes: int) -> StageEntry:
    return StageEntry(name, f"{name}.onnx", "", (), (), weights, None, None, nodes)


def test_a_build_s_lines_say_whose_weights_a_view_has(capsys: pytest.CaptureFixture[str]) -> None:
    weights = tuple(WeightEntry(name, "F32", (250,), "w", 0, 1000, "") for name in ("a", "b"))
    with shown(False, lambda _entry: None) as events:
        events.stage(entry("dit", weights, Add=5, Mul=4, Sub=3, Div=2, Abs=1))
        events.stage(entry("dit_head", weights[:1], Add=5, Mul=4))
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "dit 2.0 kB weights 15 nodes (5 Add, 4 Mul, 3 Sub, 2 Div, ...)" in lines
    assert "dit_head 1.0 kB of dit's 9 nodes (5 Add, 4 Mul)" in lines


def test_damage_is_an_error(bundle: Path) -> None:
    (bundle / "clip.onnx").write_bytes(b"x")
    result = CliRunner().invoke(cli, ["inspect", str(bundle)])
    assert isinstance(result.exception, BundleError)
    assert "clip.onnx" in str(result.exception)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (25_640_000_000, "25.6 GB"), (2 * 10**12, "2.0 TB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
