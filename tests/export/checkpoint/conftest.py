import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_diffusers_checkpoint, make_tencent_checkpoint


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_diffusers_checkpoint(tmp_path_factory.mktemp("checkpoints") / "diffusers", seed=1)


@pytest.fixture(scope="session")
def tencent_folder(tmp_path_factory: pytest.TempPathFactory, diffusers_folder: Path) -> Path:
    return make_tencent_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tencent", diffusers_folder)


@pytest.fixture
def diffusers_copy(tmp_path: Path, diffusers_folder: Path) -> Path:
    """A copy that a test may damage."""
    return _copied(diffusers_folder, tmp_path / "copy")


@pytest.fixture
def tencent_copy(tmp_path: Path, tencent_folder: Path) -> Path:
    """A copy that a test may damage."""
    return _copied(tencent_folder, tmp_path / "tencent_copy")


def _copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
