from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.scheduling.limits import QueueLimits
from reelforge.runtime.scheduling.pool import PipelinePool
from tests.runtime.scheduling.fake_pipeline import WAIT_S, Open, World


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


@pytest.fixture
def opened(world: World) -> Iterator[Open]:
    pools: list[PipelinePool] = []

    def make(devices: int = 1, **limits: float | int | None) -> PipelinePool:
        names = [f"fake:{number}" for number in range(devices)]
        pools.append(PipelinePool(world.open, names, QueueLimits(**limits)))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for hold in world.holds.values():
        hold.release()
    for pool in pools:
        pool.close()
