"""Tiled decoding against diffusers with equal parameters, and against a float64 restatement of Tencent's procedure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelforge.runtime.spec import VaeSpec, VaeTiling
from reelforge.runtime.tiling import decode_tiled, plan_tiles
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


def tencent_decode(z: np.ndarray, tiling: VaeTiling, spatial: int, temporal: int) -> np.ndarray:
    """``AutoencoderKLCausal3D.temporal_tiled_decode`` of Tencent's package, restated in float64 with its own names.

    There, tiles overlap by a factor: ``tile_overlap_factor`` of the tile's size in latents and pixels.
    """
    tile_latent_min_size, tile_sample_min_size = tiling.tile, tiling.tile * spatial
    overlap_size = tiling.stride
    blend_extent = (tiling.tile - tiling.stride) * spatial
    row_limit = tile_sample_min_size - blend_extent
    tile_latent_min_tsize, tile_sample_min_tsize = tiling.frame_window, tiling.frame_window * temporal
    overlap_tsize = tiling.frame_stride
    t_blend_extent = (tiling.frame_window - tiling.frame_stride) * temporal
    t_limit = tile_sample_min_tsize - t_blend_extent

    def blend(a: np.ndarray, b: np.ndarray, extent: int, axis: int) -> np.ndarray:
        a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        extent = min(len(a), len(b), extent)
        for k in range(extent):
            b[k] = a[-extent + k] * (1 - k / extent) + b[k] * (k / extent)
        return np.moveaxis(b, 0, axis)

    def spatial_tiled_decode(z: np.ndarray) -> np.ndarray:
        rows = [
            [
                fake_decode(z[..., i : i + tile_latent_min_size, j : j + tile_latent_min_size], spatial, temporal)
                for j in range(0, z.shape[-1], overlap_size)
            ]
            for i in range(0, z.shape[-2], overlap_size)
        ]
        result_rows = []
        for i, row in enumerate(rows):
            result_row = []
            for j, tile in enumerate(row):
                if i > 0:
                    tile = blend(rows[i - 1][j], tile, blend_extent, -2)
                if j > 0:
                    tile = blend(row[j - 1], tile, blend_extent, -1)
                result_row.append(tile[..., :row_limit, :row_limit])
            result_rows.append(np.concatenate(result_row, axis=-1))
        return np.concatenate(result_rows, axis=-2)

    def one(z: np.ndarray) -> np.ndarray:
        if z.shape[-1] > tile_latent_min_size or z.shape[-2] > tile_latent_min_size:
            return spatial_tiled_decode(z)
        return fake_decode(z, spatial, temporal)

    if z.shape[2] <= tile_latent_min_tsize:
        return one(z)
    row = []
    for i in range(0, z.shape[2], overlap_tsize):
        decoded = one(z[:, :, i : i + tile_latent_min_tsize + 1])
        row.append(decoded if i == 0 else decoded[:, :, 1:])
    result_row = []
    for i, tile in enumerate(row):
        if i > 0:
            tile = blend(row[i - 1], tile, t_blend_extent, 2)
            result_row.append(tile[:, :, :t_limit])
        else:
            result_row.append(tile[:, :, : t_limit + 1])
    return np.concatenate(result_row, axis=2)


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
    expected = tencent_decode(latents.copy(), tiling, 2, factor)
    vae = spec(spatial=2, temporal=factor)
    batches = list(decode_tiled(latents.astype(np.float32), lambda tile: fake_decode(tile, 2, factor), tiling, vae))
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
