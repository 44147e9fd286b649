"""The arena: one block for all engines that are loaded, and no larger than they need."""

from __future__ import annotations

import numpy as np
import pytest

from reelforge.runtime.cuda.driver import Cuda, open_cuda
from reelforge.runtime.cuda.memory import Arena
from tests.runtime.fake_bundle import CHANNELS
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.test_tensorrt_engine import STEPS, Rig, loop_inputs, on_the_cpu, rig  # noqa: F401 - a fixture

NEEDS = {"llm": 1024, "dit": 5120, "vae_decoder": 6144}
"""Of the fake's plans, rounded up to whole blocks."""
TILE = {"latent_tile": np.zeros((1, CHANNELS, 2, 3, 5), np.float32)}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    with installed(monkeypatch, {"cuda.bindings.runtime": FakeCuda()}):
        return open_cuda()


def test_shrinking_frees_what_is_too_large(cuda: Cuda) -> None:
    arena = Arena(cuda)
    arena.shrink(0)
    assert arena.generation == 0
    arena.reserve(5000, "a test")
    for enough in (5000, 5120, 9000):
        arena.shrink(enough)
    assert (arena.size_bytes, arena.generation) == (5120, 1)
    arena.shrink(4864)
    assert (arena.size_bytes, arena.generation) == (0, 2)
    assert arena.reserve(4000, "a test").size_bytes == 4096
    arena.shrink(0)
    assert (arena.size_bytes, arena.generation) == (0, 4)


def test_the_arena_follows_what_is_loaded(rig: Rig) -> None:  # noqa: F811
    llm, vae = rig.engine("llm"), rig.engine("vae_decoder")
    arena = rig.session.arena
    assert arena.size_bytes == 0
    llm.run({"input_ids": np.ones((1, 4), np.int64)})
    assert arena.size_bytes == NEEDS["llm"]
    vae.run(TILE)
    assert arena.size_bytes == NEEDS["vae_decoder"]
    vae.close()
    assert arena.size_bytes == 0, "too large for what is left, which asks again"
    llm.run({"input_ids": np.ones((1, 4), np.int64)})
    assert arena.size_bytes == NEEDS["llm"]
    vae = rig.engine("vae_decoder")
    vae.run(TILE)
    llm.close()
    assert arena.size_bytes == NEEDS["vae_decoder"], "one that is loaded needs it"
    vae.close()
    vae.close()
    assert arena.size_bytes == 0


def test_an_engine_that_has_not_run_needs_nothing(rig: Rig) -> None:  # noqa: F811
    vae, llm = rig.engine("vae_decoder"), rig.engine("llm")
    vae.run(TILE)
    rig.engine("dit")
    llm.close()
    assert rig.session.arena.size_bytes == NEEDS["vae_decoder"]
    vae.close()
    assert rig.session.arena.size_bytes == 0


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_loop_survives_an_arena_that_shrinks(rig: Rig, cuda_graph: bool) -> None:  # noqa: F811
    """Its graph holds an address of the arena: it is recorded again."""
    engine, vae = rig.engine(cuda_graph=cuda_graph), rig.engine("vae_decoder")
    vae.run(TILE)
    loop = engine.loop(*loop_inputs())
    for step in range(STEPS):
        loop.advance(step)
        if step == 2:
            vae.close()
            assert rig.session.arena.size_bytes == 0
    assert rig.session.arena.size_bytes == NEEDS["dit"]
    np.testing.assert_array_equal(loop.latents(), on_the_cpu(rig))
    recorded = [call for call in rig.cuda.log if call.startswith("cudaGraphInstantiate")]
    assert len(recorded) == (2 if cuda_graph else 0)
