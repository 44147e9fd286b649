from __future__ import annotations

from pathlib import Path

import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.tools.triton.repository import ExportRequest, export_repository
from tests.runtime.fake_bundle import CACHED, write_fake_bundle


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every stage that a family can have; do not alter it."""
    path = tmp_path_factory.mktemp("bundles") / "whole.bundle"
    write_fake_bundle(path, stages=CACHED)
    return path


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A bundle of the six stages, to add files to."""
    path = tmp_path / "copy.bundle"
    write_fake_bundle(path)
    return path


@pytest.fixture(scope="session")
def repository(whole_bundle: Path) -> Path:
    """Its repository; do not alter it."""
    path = whole_bundle.parent / "models"
    export_repository(Bundle.open(whole_bundle), ExportRequest(path))
    return path
