"""The fingerprint: independent of order and of the checkpoint's layout, and different for different heads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.calibration.fingerprint import HEAD_BYTES, StoredTensor, bundle_fingerprint, fingerprint
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.errors import BundleError
from tests.bundles import build

TENSORS = (
    StoredTensor("dit", "a.weight", "BF16", (4, 2), b"\x01" * 16),
    StoredTensor("dit", "b.weight", "BF16", (4, 2), b"\x02" * 16),
    StoredTensor("llm", "a.weight", "F32", (2,), b"\x03" * 8),
)


@given(st.permutations(TENSORS))
def test_the_order_does_not_matter(tensors: list[StoredTensor]) -> None:
    assert fingerprint(tensors) == fingerprint(TENSORS)
    assert fingerprint(tensors).startswith("sha256:")


@pytest.mark.parametrize(
    "change",
    [{"stage": "clip"}, {"name": "c.weight"}, {"dtype": "F16"}, {"shape": (2, 4)}, {"head": b"\x01" * 15 + b"\x00"}],
)
def test_everything_counts(change: dict[str, object]) -> None:
    assert fingerprint([TENSORS[0]._replace(**change), *TENSORS[1:]]) != fingerprint(TENSORS)  # type: ignore[arg-type]
    assert fingerprint(TENSORS[:2]) != fingerprint(TENSORS)


def test_only_the_beginning_counts() -> None:
    head = bytes(range(256)) * (HEAD_BYTES // 256)
    one, other, short = (TENSORS[0]._replace(head=data) for data in (head + b"a", head + b"b", head[:-1]))
    assert fingerprint([one]) == fingerprint([other]) != fingerprint([short])


@pytest.mark.usefixtures("remembered_traces")
def test_both_layouts_have_one_fingerprint(tiny_bundle: Path, tiny_tencent_checkpoint: Path, tmp_path: Path) -> None:
    build(tiny_tencent_checkpoint, tmp_path / "b")
    theirs, ours = Bundle.open(tmp_path / "b"), Bundle.open(tiny_bundle)
    assert {entry.path for entry in theirs.manifest.files} != {entry.path for entry in ours.manifest.files}
    assert bundle_fingerprint(theirs) == bundle_fingerprint(ours)
    part = replace(ours.manifest, stages=ours.manifest.stages[:-1])
    assert bundle_fingerprint(Bundle(ours.path, part)) != bundle_fingerprint(ours)


def test_a_file_that_cannot_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "b"), Check.SIZES)
    name = bundle.stage("dit").weights[0].file
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=f"file '{name}' of bundle 'b' cannot be read: No such file"):
        bundle_fingerprint(bundle)
