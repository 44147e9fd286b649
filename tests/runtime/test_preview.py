"""Previews: the estimate of the end, the fit against a map that is known, and no work where none was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Frames, Pipeline, Progress, Request, preview
from reelforge.runtime.preview import ColourMap, Previews, expected_end
from reelforge.runtime.schedule import flow_match_sigmas
from tests.runtime.fake_bundle import CHANNELS, SPEC

REQUEST = Request("a ball", height=32, width=48, frames=13, steps=4, seed=3)


def test_a_straight_path_shows_its_end_from_the_first_step() -> None:
    random = np.random.default_rng(0)
    end, noise = (random.standard_normal((1, 4, 2, 3, 5)).astype(np.float32) for _ in range(2))
    sigmas = flow_match_sigmas(7, 5.0)
    path = [(1 - sigma) * end + sigma * noise for sigma in sigmas]
    for step in range(7):
        found = expected_end(path[step], path[step + 1], sigmas[step], sigmas[step + 1])
        np.testing.assert_allclose(found, end, atol=2e-5)


def decoded(latents: np.ndarray, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """An affine decoder: each latent is 8 x 8 pixels and, after the first, four frames."""
    colours = np.einsum("cthw,cr->thwr", latents[0], weights) + offset
    frames = np.concatenate([colours[:1], np.repeat(colours[1:], 4, axis=0)])
    noise = np.random.default_rng(1).standard_normal((*frames.shape[:1], frames.shape[1] * 8, frames.shape[2] * 8, 3))
    noise -= (
        noise.reshape(len(frames), frames.shape[1], 8, frames.shape[2], 8, 3)
        .mean(axis=(2, 4))
        .repeat(8, axis=1)
        .repeat(8, axis=2)
    )  # of mean 0 in each latent's pixels: a linear map can know nothing of it
    return (frames.repeat(8, axis=1).repeat(8, axis=2) + 0.1 * noise).astype(np.float32)


def test_an_affine_decoder_is_learned_exactly() -> None:
    random = np.random.default_rng(0)
    weights, offset = random.uniform(-0.1, 0.1, (4, 3)), np.array([0.3, 0.5, 0.6])
    colours = ColourMap(SPEC.vae)
    assert not colours.is_known
    for _ in range(2):
        latents = random.standard_normal((1, 4, 3, 4, 6)).astype(np.float32)
        frames = decoded(latents, weights, offset)
        for start in range(0, len(frames), 4):
            colours.learn(latents, Frames(start, frames[start : start + 4]))
    assert colours.is_known
    unseen = random.standard_normal((1, 4, 2, 4, 6)).astype(np.float32)
    expected = np.einsum("cthw,cr->thwr", unseen[0], weights) + offset
    shown = colours.show(unseen)
    assert (shown.shape, shown.dtype) == ((2, 4, 6, 3), np.uint8)
    np.testing.assert_allclose(shown, np.clip(expected, 0, 1) * 255, atol=1)


def test_too_few_positions_are_no_obstacle() -> None:
    colours = ColourMap(SPEC.vae)
    latents = np.ones((1, 4, 1, 1, 1), np.float32)
    colours.learn(latents, Frames(0, np.full((1, 8, 8, 3), 0.25, np.float32)))
    np.testing.assert_allclose(colours.show(latents), 64, atol=1)


def test_grey_before_anything_is_known() -> None:
    ramp = np.linspace(-1, 1, 30, dtype=np.float32).reshape(1, 1, 5, 6)
    latents = np.concatenate([0.1 * ramp, -3 * ramp, ramp, np.zeros_like(ramp)])[None]
    shown = ColourMap(SPEC.vae).show(latents)
    assert (shown[..., 0] == shown[..., 1]).all()
    np.testing.assert_allclose(shown[0, ..., 0], np.linspace(255, 0, 30).reshape(5, 6), atol=1)
    np.testing.assert_array_equal(ColourMap(SPEC.vae).show(latents), shown)
    assert ColourMap(SPEC.vae).show(np.zeros((1, 4, 1, 2, 2), np.float32)).max() == 0


@pytest.fixture(scope="module")
def pipeline(fake_bundle: Path) -> Pipeline:
    return Pipeline.open(fake_bundle, threads=1)


def test_previews_while_sampling(pipeline: Pipeline) -> None:
    expected = pipeline.generate(REQUEST)
    for known in (False, True):
        events = list(pipeline.stream(REQUEST, previews=True))
        frames = np.concatenate([event.pixels for event in events if isinstance(event, Frames)])
        np.testing.assert_array_equal(frames, expected)
        shown = [event for event in events if isinstance(event, Progress)]
        assert [event.preview is not None for event in shown] == [event.phase == "sampling" for event in shown]
        last = [event.preview for event in shown if event.preview is not None][-1]
        assert (last.shape, last.dtype) == ((4, 4, 6, 3), np.uint8)
        if known:
            # The fake decoder is the tangent of a linear map of single positions, which a linear map comes near to.
            real = expected[[0, 1, 5, 9], ::8, ::8].astype(int)
            assert np.corrcoef(last.reshape(-1), real.reshape(-1))[0, 1] > 0.95


def test_no_previews_no_work(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a preview was computed")

    for owner, name in ((ColourMap, "show"), (ColourMap, "learn"), (Previews, "after"), (preview, "expected_end")):
        monkeypatch.setattr(owner, name, refuse)
    assert all(
        event.preview is None for event in pipeline.stream(replace(REQUEST, seed=5)) if isinstance(event, Progress)
    )
    assert CHANNELS == 4
