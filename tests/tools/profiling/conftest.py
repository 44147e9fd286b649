from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.fake_bundle import write_fake_bundle


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle of hand-made graphs; do not alter it."""
    path = tmp_path_factory.mktemp("profiled") / "fake.bundle"
    write_fake_bundle(path)
    return path
