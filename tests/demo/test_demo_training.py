"""Pieces of the demonstration model's training that can be checked in seconds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from demo.train import attention, bank, data, dit, latents, optim, ranks, state, text, vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return bank.sample_clips(bank.build(bank.world_placements(), held_out=False), 64, generator)


@pytest.fixture(scope="module")
def projections(clips: torch.Tensor) -> list[latents.Projection]:
    return latents.fit(clips)


def test_encoder_computes_the_analytic_latents(clips: torch.Tensor, projections: list[latents.Projection]) -> None:
    model = diffusers.AutoencoderKLHunyuanVideo(**vae.CONFIG)
    latents.write_encoder(model, projections)
    for frames in (1, data.FRAMES):
        pixels = clips[:4, :, :frames]
        expected = latents.encode(pixels, projections)
        with torch.no_grad():
            received = model.encode(pixels).latent_dist.mode()
        assert received.shape == expected.shape
        assert (received - expected).norm() < 2e-3 * expected.norm()


def test_latents_of_a_crop_are_the_crop_of_the_latents(
    clips: torch.Tensor, projections: list[latents.Projection]
) -> None:
    whole = latents.encode(clips[:2], projections)
    crop = latents.encode(clips[:2, :, :, 16:48, 8:40], projections)
    torch.testing.assert_close(crop, whole[..., 2:6, 1:5], rtol=1e-4, atol=1e-4)


def test_training_split_never_shows_a_held_out_combination() -> None:
    for shape in data.SHAPES:
        for motion in data.MOTIONS:
            trained = set(bank.pairs(shape, motion, held_out=False))
            held_out = set(bank.pairs(shape, motion, held_out=True))
            assert not trained & held_out
            assert len(trained) == 12
            assert len(held_out) == 3


def test_lean_attention_equals_the_stock_processor() -> None:
    torch.manual_seed(0)
    model = dit.build(0)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 8, 8),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 7, text.LLM_WIDTH),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, text.CLIP_WIDTH),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }
    with torch.no_grad():
        expected = model(**inputs).sample
        attention.install(model)
        received = model(**inputs).sample
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-5)


def test_text_states_do_not_depend_on_the_batch() -> None:
    captions = [scene.captions()[0] for scene in data.scenes()[:3]]
    together, alone = text.encode(captions), text.encode(captions[:1])
    row, single = together.index[captions[0]], alone.index[captions[0]]
    torch.testing.assert_close(together.states[row], alone.states[single], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.pooled[row], alone.pooled[single], rtol=1e-4, atol=1e-4)
    distances = torch.cdist(together.pooled, together.pooled) + 9 * torch.eye(len(together.pooled))
    assert distances.min() > 0.5


def test_too_long_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="caption too long"):
        text.encode(["a red circle moving right and then left on a black background"])


def test_orthogonalised_updates() -> None:
    updates = optim.orthogonalised(torch.randn(3, 32, 96))
    values = torch.linalg.svdvals(updates)
    assert values.min() > 0.4
    assert values.max() < 1.6


def test_rate_warms_up_holds_and_falls() -> None:
    factors = [optim.rate(step, 1000, 100, 0.5, 0.01) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[100:501] == [1.0] * 401
    assert factors[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(factors[500:]))


def test_state_survives_and_logs_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(state.STATE_VARIABLE, str(tmp_path))
    assert state.load("job") is None
    module = torch.nn.Linear(4, 4)
    optimisers: list[optim.Rated] = [(optim.Muon([module.weight], 0.1), 0.1), (torch.optim.AdamW([module.bias]), 0.1)]
    average = optim.Average(module, 0.9)
    module(torch.ones(4)).sum().backward()
    optim.advance(optimisers, 0.5)
    average.update(0)
    optim.store("job", 7, 1.5, module, average, optimisers)
    again = torch.nn.Linear(4, 4)
    restored = optim.Average(again, 0.9)
    others: list[optim.Rated] = [(optim.Muon([again.weight], 0.1), 0.1), (torch.optim.AdamW([again.bias]), 0.1)]
    assert optim.resume("job", again, restored, others) == (7, 1.5)
    assert torch.equal(again.weight, module.weight)
    assert torch.equal(restored.values[0], average.values[0])
    for record in ({"step": 50, "loss": 3.0}, {"step": 100, "loss": 2.0}, {"step": 50, "loss": 1.0}):
        state.log("job", record)
    assert state.read_log("job") == [{"step": 50, "loss": 1.0}, {"step": 100, "loss": 2.0}]


def test_random_streams_are_per_step_and_seed() -> None:
    first = torch.randn(4, generator=ranks.generator(0, 3))
    assert torch.equal(first, torch.randn(4, generator=ranks.generator(0, 3)))
    assert not torch.equal(first, torch.randn(4, generator=ranks.generator(0, 4)))
