"""Tiled decoding against diffusers with equal parameters, and against a float64 restatement of Tencent's procedure."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.spec import VaeSpec, VaeTiling
from reelforge.runtime.tiling import decode_tiled, plan_tiles
from reelforge.tools.bench.tencent_tiling import tencent_decode
from tests.runtime.fake_bundle import SPEC


def spec(spatial: int = 8, temporal: int = 4) -> VaeSpec:
    return VaeSpec(4, (8,), 1, 2, 1e-6, 1.0, spatial, temporal)


@pytest.fixture(scope="module")
def tiny_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 3), (1, 4, 4), (1, 5, 4), (1, 4, 9), (2, 7, 6), (3, 4, 4), (4, 4, 3), (5, 3, 3), (6, 5, 5), (4, 8, 11),
    ],
)  # fmt: skip
def test_equals_diffusers_tiled_decoding(tiny_vae: torch.nn.Module, shape: tuple[int, int, int]) -> None:
    tiling = VaeTiling(tile=4, stride=3, frame_window=3, frame_stride=2)
    tiny_vae.enable_tiling(32, 32, 12, 24, 24, 8)
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(1))

    def decode(tile: np.ndarray) -> np.ndarray:
        return tiny_vae.decoder(tiny_vae.post_quant_conv(torch.from_numpy(np.ascontiguousarray(tile)))).numpy()

    expected = tiny_vae.decode(latents).sample.numpy()
    batches = list(decode_tiled(latents.numpy(), decode, tiling, spec()))
    np.testing.assert_allclose(np.concatenate(batches, axis=2), expected, atol=2e-6)
    assert len(batches) == len(plan_tiles(shape, tiling).windows)


def fake_decode(latents: np.ndarray, spatial: int, temporal: int) -> np.ndarray:
    """A decoder whose result depends on the whole tile, as GroupNorm makes the real one do."""
    frames = np.concatenate([latents[:, :1, :1], np.repeat(latents[:, :1, 1:], temporal, axis=2)], axis=2)
    picture = np.repeat(np.repeat(frames, spatial, axis=3), spatial, axis=4)
    ramp = np.linspace(0, 1, picture.shape[3])[:, None] * np.linspace(1, 2, picture.shape[4])
    ramp = ramp * np.linspace(1, 3, picture.shape[2])[:, None, None]
    picture = picture + ramp + latents.mean() * 3
    return np.concatenate([picture, 2 * picture, -picture], axis=1).astype(latents.dtype)


tilings = st.builds(
    lambda tile, stride, window, frame_stride: VaeTiling(tile, min(stride, tile), window, min(frame_stride, window)),
    st.integers(2, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 12), st.integers(1, 11), st.integers(1, 11)), tilings, st.sampled_from([1, 2, 4]))
def test_equals_tencents_procedure(shape: tuple[int, int, int], tiling: VaeTiling, factor: int) -> None:
    latents = np.random.default_rng(shape[0]).standard_normal((1, 2, *shape))
    decode = partial(fake_decode, spatial=2, temporal=factor)
    expected = tencent_decode(latents.copy(), decode, tiling, 2, factor)
    batches = list(decode_tiled(latents.astype(np.float32), decode, tiling, spec(spatial=2, temporal=factor)))
    ours = np.concatenate(batches, axis=2)
    np.testing.assert_allclose(ours, expected, atol=3e-5)
    assert ours.shape == (1, 3, (shape[0] - 1) * factor + 1, shape[1] * 2, shape[2] * 2)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 40)), tilings)
def test_tiles_cover_everything_and_stay_inside(shape: tuple[int, int, int], tiling: VaeTiling) -> None:
    plan = plan_tiles(shape, tiling)
    limits = (tiling.frame_window + 1, tiling.tile, tiling.tile)
    for spans, size, limit in zip((plan.windows, plan.rows, plan.columns), shape, limits, strict=True):
        covered = {position for start, stop in spans for position in range(start, stop)}
        assert covered == set(range(size))
        assert all(0 < stop - start <= limit for start, stop in spans)
        assert all(before[0] < after[0] for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("shape", "lengths", "heights", "widths", "count"),
    [
        ((33, 90, 160), [17, 17, 9], [32, 32, 32, 18], [32] * 6 + [16], 84),
        ((33, 68, 120), [17, 17, 9], [32, 32, 20], [32] * 4 + [24], 45),
        ((33, 60, 106), [17, 17, 9], [32, 32, 12], [32] * 4 + [10], 45),
    ],
)
def test_published_tile_counts(
    shape: tuple[int, int, int], lengths: list[int], heights: list[int], widths: list[int], count: int
) -> None:
    plan = plan_tiles(shape, VaeTiling(tile=32, stride=24, frame_window=16, frame_stride=12))
    spans = (plan.windows, plan.rows, plan.columns)
    assert [[stop - start for start, stop in part] for part in spans] == [lengths, heights, widths]
    assert plan.tiles == count


def test_a_last_window_of_one_latent_is_not_decoded() -> None:
    assert plan_tiles((25, 4, 4), VaeTiling(32, 24, 16, 12)).windows == ((0, 17), (12, 25))


def test_tiles_are_views_and_frames_stream() -> None:
    latents = np.zeros((1, 4, 7, 9, 4), np.float32)
    calls = []

    def decode(tile: np.ndarray) -> np.ndarray:
        assert np.shares_memory(tile, latents)
        calls.append(tile.shape)
        return fake_decode(tile, 8, 4)

    stream = decode_tiled(latents, decode, SPEC.tiling, SPEC.vae)
    plan = plan_tiles((7, 9, 4), SPEC.tiling)
    next(stream)
    assert len(calls) == plan.tiles // len(plan.windows)
    assert sum(1 for _ in stream) == len(plan.windows) - 1
    assert len(calls) == plan.tiles
