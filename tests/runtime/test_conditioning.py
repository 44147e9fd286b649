"""Sinusoids, guidance rounding and rotary tables against diffusers and against torch's bfloat16."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.conditioning import guidance_value, rope_tables, round_to_bf16, sinusoids
from reelforge.runtime.spec import GuidanceRounding


@pytest.mark.parametrize("width", [16, 256])
def test_sinusoids_equal_diffusers_formula(width: int) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    values = np.array([0.001, 0.5, 1.0, 12.25], np.float32)
    theirs = get_timestep_embedding(torch.from_numpy(values), width, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(sinusoids(values, width), theirs.numpy(), atol=3e-6)


def test_sinusoids_are_exact_for_large_values() -> None:
    values = np.array([997.0934, 1000.0, 6016.0], np.float32)
    half = 128
    with np.errstate(all="ignore"):
        angles = values.astype(np.longdouble)[:, None] * np.longdouble(10000) ** (
            -np.arange(half) / np.longdouble(half)
        )
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert np.abs(sinusoids(values, 256) - expected).max() < 6e-8


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100))
def test_bf16_rounding_equals_torch(value: float) -> None:
    assert round_to_bf16(value) == torch.tensor(value).to(torch.bfloat16).item()


@given(st.floats(0.125, 100))
def test_guidance_equals_the_references_arithmetic(guidance: float) -> None:
    # diffusers' pipeline: torch.tensor([guidance_scale], dtype=transformer_dtype) * 1000.0
    expected = (torch.tensor([guidance], dtype=torch.bfloat16) * 1000.0).item()
    assert guidance_value(guidance, GuidanceRounding.BF16) == expected


def test_guidance_values_of_the_specification() -> None:
    values = [guidance_value(scale, GuidanceRounding.BF16) for scale in (6.0, 7.0, 3.5, 4.0, 8.0)]
    assert values == [6016, 7008, 3504, 4000, 8000]
    assert guidance_value(6.0, GuidanceRounding.NONE) == 6000


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 2), (3, 2, 5)])
def test_rope_equals_diffusers(grid: tuple[int, int, int]) -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    axes = (4, 6, 6)
    theirs = HunyuanVideoRotaryPosEmbed(1, 1, list(axes), theta=256.0)(torch.zeros(1, 4, *grid))
    ours = rope_tables(grid, axes, 256.0)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == (np.prod(grid), 8)
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, other.numpy()[:, 0::2], atol=2e-6)  # theirs repeats every value


def test_rope_equals_a_loop_in_float64() -> None:
    grid, axes, theta = (2, 3, 4), (4, 2, 6), 256.0
    rows = []
    for t, y, x in itertools.product(*(range(size) for size in grid)):
        axis_positions = zip((t, y, x), axes, strict=True)
        rows.append([p * theta ** (-2 * i / width) for p, width in axis_positions for i in range(width // 2)])
    cos, sin = rope_tables(grid, axes, theta)
    np.testing.assert_allclose(cos, np.cos(rows), atol=6e-8)
    np.testing.assert_allclose(sin, np.sin(rows), atol=6e-8)
