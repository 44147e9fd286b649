"""What step caching measures in the transformer, against diffusers' own blocks with hooks on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from reelforge.tools.bench.oracle import Oracle, Stages, normal, our_modulation, their_velocity

SHAPES = [(1, 2, 2), (1, 6, 8), (3, 6, 8), (5, 2, 10)]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path) -> Oracle:
    return Oracle(tiny_checkpoint)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
def test_the_input_s_change_is_that_of_diffusers_first_block(
    tiny_bundle: Path, oracle: Oracle, shape: tuple[int, int, int], closeness: float
) -> None:
    config = oracle.transformer.config
    before = normal(1, 1, config.in_channels, *shape)
    latents = before + closeness * normal(2, 1, config.in_channels, *shape)
    states, pooled = normal(3, 1, 5, config.text_embed_dim), normal(4, 1, config.pooled_projection_dim)
    times = torch.tensor([925.3, 925.3 - 50 * closeness])
    given: list[torch.Tensor] = []
    hook = oracle.transformer.transformer_blocks[0].norm1.register_forward_hook(
        lambda _module, _inputs, outputs: given.append(outputs[0].double())
    )
    try:
        for one, time in zip((before, latents), times, strict=True):
            their_velocity(oracle, one, states, torch.ones(1, 5, dtype=torch.int64), pooled, float(time))
    finally:
        hook.remove()
    first, second = given
    expected = float((second - first).abs().mean() / first.abs().mean())
    assert 1e-3 < expected < 3
    stages = Stages(tiny_bundle)
    rows = our_modulation(stages, oracle, pooled, times)["double_modulation"]
    received = stages(
        "input_change",
        latents=latents.numpy(),
        previous_latents=before.numpy(),
        double_modulation=rows[1:],
        previous_modulation=rows[:1],
    )["input_change"]
    assert received.shape == ()
    assert float(received) == pytest.approx(expected, rel=1e-4)


def test_the_input_s_change_has_the_weights_of_dit(tiny_bundle: Path) -> None:
    """No byte is stored twice: the entries are the same ranges of the same files."""
    manifest = Stages(tiny_bundle).bundle.manifest
    whole, own = manifest.stage("dit"), manifest.stage("input_change")
    assert whole is not None
    assert own is not None
    assert {weight.name for weight in own.weights} == {"patch_embed.weight", "patch_embed.bias"}
    assert set(own.weights) < set(whole.weights)
    assert manifest.recipe.precision["input_change"] is manifest.recipe.precision["dit"]


def test_latents_that_rest_have_not_moved(tiny_bundle: Path) -> None:
    stages = Stages(tiny_bundle)
    dit = stages.bundle.manifest.spec.dit
    latents = normal(5, 1, dit.latent_channels, 1, 4, 4).numpy()
    modulation = normal(6, 1, dit.double_blocks, 2, 6, dit.width).numpy()
    still = stages("input_change", latents=latents, previous_latents=latents, double_modulation=modulation,
                   previous_modulation=modulation)  # fmt: skip
    assert float(still["input_change"]) == 0
    others = modulation.copy()
    others[:, 1:], others[:, 0, 1], others[:, 0, 0, 2:] = 7, 7, 7  # other blocks, the text stream, gates and the MLP
    same = stages("input_change", latents=latents, previous_latents=latents, double_modulation=others,
                  previous_modulation=modulation)  # fmt: skip
    assert float(same["input_change"]) == 0
    others[:, 0, 0, 0] += np.float32(0.1)
    moved = stages("input_change", latents=latents, previous_latents=latents, double_modulation=others,
                   previous_modulation=modulation)  # fmt: skip
    assert float(moved["input_change"]) > 0
