from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.fake_bundle import write_fake_bundle


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle; do not alter it."""
    path = tmp_path_factory.mktemp("bundles") / "fake.bundle"
    write_fake_bundle(path)
    return path


@pytest.fixture
def bundle_copy(fake_bundle: Path, tmp_path: Path) -> Path:
    """A whole bundle of one's own, to damage."""
    return Path(shutil.copytree(fake_bundle, tmp_path / "copy.bundle"))


@pytest.fixture(autouse=True)
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled kernels are kept: not in the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return tmp_path / "user_cache" / "reelforge" / "kernels"
