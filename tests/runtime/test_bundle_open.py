"""Damage to a bundle: every kind is an error that names the file, and the tensor where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import BundleError
from reelforge.runtime.manifest import SCHEMA_VERSION, content_digest
from tests.runtime.fake_bundle import STAGES, write_fake_bundle


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_open(fake_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    bundle = Bundle.open(fake_bundle, on_progress=lambda done, total: seen.append((done, total)))
    assert [stage.name for stage in bundle.manifest.stages] == list(STAGES)
    assert bundle.graph("dit") == fake_bundle / "dit.onnx"
    assert bundle.tokenizer_path("llm").is_file()
    assert bundle.manifest.content_digest == content_digest(bundle.manifest)
    assert seen[-1][0] == seen[-1][1] > 0
    assert Bundle.open(fake_bundle, Check.SIZES).manifest == bundle.manifest


def test_an_altered_graph_is_named(bundle_copy: Path) -> None:
    flip(bundle_copy / "dit.onnx", 40)
    Bundle.open(bundle_copy, Check.SIZES)  # sizes cannot show it
    with pytest.raises(BundleError, match=r"file 'dit.onnx' of bundle 'copy.bundle' is altered") as caught:
        Bundle.open(bundle_copy)
    assert "sha256" in str(caught.value)
    assert "fix: copy the bundle again" in str(caught.value)


def test_an_altered_weight_names_tensor_and_file(bundle_copy: Path) -> None:
    flip(bundle_copy / "weights" / "llm.safetensors", 100)
    expected = "tensor 'embed_tokens.weight' of stage 'llm' in file 'weights/llm.safetensors' of bundle"
    with pytest.raises(BundleError, match=expected):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["tokenizers/clip.json", "weights/llm.safetensors", "vae_decoder.onnx"])
@pytest.mark.parametrize("check", list(Check))
def test_missing_and_truncated_files_are_named(bundle_copy: Path, name: str, check: Check) -> None:
    path = bundle_copy / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"file '{name}' of bundle 'copy.bundle' is truncated"):
        Bundle.open(bundle_copy, check)
    path.write_bytes(data + b"x")
    with pytest.raises(BundleError, match=f"file '{name}' of bundle 'copy.bundle' is altered"):
        Bundle.open(bundle_copy, check)
    path.unlink()
    with pytest.raises(BundleError, match=f"file '{name}' of bundle 'copy.bundle' is missing"):
        Bundle.open(bundle_copy, check)


@pytest.mark.parametrize("version", [0, 1, SCHEMA_VERSION + 1, "2", None, True])
def test_another_schema_version(bundle_copy: Path, version: object) -> None:
    # Another version may have other fields: the version is what the message is about all the same.
    edit(bundle_copy, lambda value: value.update(schema_version=version, another_field=1))
    with pytest.raises(BundleError, match="schema version that this reelforge does not read") as caught:
        Bundle.open(bundle_copy)
    assert f"received: {version!r}" in str(caught.value)
    assert caught.value.exit_code == 4


def test_unknown_field_and_wrong_type_name_the_field(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value["spec"]["vae"].update(scaling_factor="half"))
    with pytest.raises(BundleError, match=r"\$.spec.vae.scaling_factor"):
        Bundle.open(bundle_copy)


def test_an_edited_manifest_does_not_fit_its_digest(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value["spec"]["vae"].update(scaling_factor=0.25))
    with pytest.raises(BundleError, match="content digest"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_manifest(bundle_copy: Path, text: str) -> None:
    (bundle_copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError):
        Bundle.open(bundle_copy)


def test_files_outside_of_the_bundle_are_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value["files"][0].update(path="../elsewhere"))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle_copy)


def test_a_weight_outside_of_its_file_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value["stages"][0]["weights"][1].update(offset=10**9))
    with pytest.raises(BundleError, match=r"places tensor 'unused.weight' of stage 'llm' outside of file"):
        Bundle.open(bundle_copy)


def test_an_unlisted_graph_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda value: value["stages"][0].update(graph="other.onnx"))
    with pytest.raises(BundleError, match=r"names the graph 'other.onnx' of stage 'llm' but does not list it"):
        Bundle.open(bundle_copy)


def test_two_digests_for_one_range_are_refused(bundle_copy: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        twin = dict(value["stages"][0]["weights"][0], name="twin", sha256="0" * 64)
        value["stages"][0]["weights"].append(twin)

    edit(bundle_copy, change)
    with pytest.raises(BundleError, match="content digest"):
        Bundle.open(bundle_copy)


def test_not_a_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(path)


def test_missing_stage_and_tokenizer(tmp_path: Path) -> None:
    write_fake_bundle(tmp_path / "part.bundle", stages=("llm",))
    bundle = Bundle.open(tmp_path / "part.bundle")
    with pytest.raises(BundleError, match="has no stage 'dit'"):
        bundle.graph("dit")
    with pytest.raises(BundleError, match="has no tokenizer 'other'"):
        bundle.tokenizer_path("other")


def test_unlisted_files_are_ignored(bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    assert Bundle.open(bundle_copy).name == "copy.bundle"


def test_a_moved_bundle_opens(fake_bundle: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(fake_bundle, tmp_path / "a b" / "ü.bundle")
    assert Bundle.open(moved).name == "ü.bundle"
