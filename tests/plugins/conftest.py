"""The interpreter and the compiled kernels, each once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reelforge.plugins.interpreter import Interpreter
from tests.bundles import session_folder


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels, shared by all workers of a session."""
    return session_folder(tmp_path_factory) / "kernels"
