"""Files of an open bundle are watched, also those that an unfinished bundle does not list yet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from reelforge.runtime.bundle.watch import Watch
from reelforge.runtime.errors import BundleError


def test_files_that_are_not_listed_yet(tmp_path: Path) -> None:
    (tmp_path / "dit.onnx").write_bytes(b"graph")
    (tmp_path / "codes").write_bytes(b"weights")
    entry = SimpleNamespace(plans=(), graph="dit.onnx", weights=(SimpleNamespace(file="codes"),))
    manifest = SimpleNamespace(files=(), stages=(entry,))
    bundle = SimpleNamespace(path=tmp_path, name="b", manifest=manifest, stage=lambda _: entry)
    watch = Watch(bundle)  # type: ignore[arg-type]
    watch.check_stage("dit")
    (tmp_path / "codes").write_bytes(b"other weights")
    with pytest.raises(BundleError, match="file 'codes' of bundle 'b' was altered while the bundle was open"):
        watch.check_stage("dit")
    (tmp_path / "codes").unlink()
    with pytest.raises(BundleError, match="was removed while"):
        watch.check_stage("dit")
