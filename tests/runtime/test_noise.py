"""The noise against its written definition, and against the statistics of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime.noise import MAX_SEED, gaussian_noise

_MASK = 2**64 - 1


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox-4x64-10 in Python's integers, from the paper."""
    x = [counter >> (64 * i) & _MASK for i in range(4)]
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & _MASK, (k[1] + 0xBB67AE8584CAA73B) & _MASK]
    return x


def reference(count: int, seed: int) -> list[float]:
    """The definition of the module's docstring, step by step. numpy counts up before it draws a block."""
    words = [word for block in range(count // 4 + 1) for word in philox_block(block + 1, (seed, 0))]
    uniform = [((word >> 11) + 1) * 2.0**-53 for word in words]
    values = []
    for first, second in zip(uniform[0::2], uniform[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(first))
        values += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    return values[:count]


@given(st.integers(0, MAX_SEED), st.integers(1, 40))
def test_equals_the_written_definition(seed: int, count: int) -> None:
    np.testing.assert_allclose(gaussian_noise((count,), seed), reference(count, seed), rtol=2e-7, atol=1e-12)


def test_shape_order_and_type() -> None:
    noise = gaussian_noise((1, 2, 3, 5), 7)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise.ravel(), gaussian_noise((30,), 7))
    assert not np.array_equal(noise, gaussian_noise((1, 2, 3, 5), 8))


def test_moments_and_tails() -> None:
    noise = gaussian_noise((400_000,), 3).astype(np.float64)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((np.abs(noise) > 1.959964).mean() - 0.05) < 0.002
    assert abs(np.corrcoef(noise[0::2], noise[1::2])[0, 1]) < 0.01
