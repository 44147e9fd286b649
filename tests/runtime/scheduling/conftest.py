from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reelforge.runtime.bundle.open import Bundle, Check
from tests.runtime.scheduling.fake_pipeline import WAIT_S, World


@pytest.fixture
def world(fake_bundle: Path) -> Iterator[World]:
    world = World(Bundle.open(fake_bundle, Check.SIZES).manifest)
    yield world
    for hold in world.holds.values():
        hold.release()


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("reelforge"):
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{thread.name} goes on"
