"""``reelforge inspect``: a table for people, one object for machines, and the check of the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BundleError
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
