"""What the transformer is told besides the text: sinusoids of timestep and guidance, and the rotary position tables.

All of it is computed in float64 and rounded to float32 once, because sines of arguments up to 6016 lose three digits in
float32 (specification 8). Knows the formulas, not the stages that consume them.

Letters: ``T`` ``H`` ``W`` the grid of tokens (latents divided by the patch), ``N = T * H * W``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.spec import GuidanceRounding

FloatArray = NDArray[np.float32]

MAX_PERIOD = 10_000.0


def sinusoids(values: Sequence[float] | FloatArray, width: int) -> FloatArray:
    """Return the sinusoidal embedding of each value (specification 3.2).

    ``angle_i = value * 10000 ** (-i / half)`` for ``i < half = width / 2``; cosines first, then sines.

    Args:
        values: ``[n]`` timesteps, or guidance values times 1000.
        width: Even width of the embedding.

    Returns:
        float32 ``[n, width]``.
    """
    half = width // 2
    frequencies = MAX_PERIOD ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.asarray(values, dtype=np.float64)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def round_to_bf16(value: float) -> float:
    """Round to the nearest bfloat16, ties to even, by arithmetic on the bits of the float32."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def guidance_value(guidance: float, rounding: GuidanceRounding) -> float:
    """Return ``guidance * 1000`` as the references compute it.

    They hold the scale in bfloat16 and multiply there, so both the scale and the product are rounded: 6.0 becomes 6016
    (specification 3.2).
    """
    if rounding is GuidanceRounding.BF16:
        return round_to_bf16(round_to_bf16(guidance) * 1000.0)
    return guidance * 1000.0


def rope_tables(grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float) -> tuple[FloatArray, FloatArray]:
    """Return the rotary tables of the image tokens (specification 3.4).

    Token order is t-major, then h, then w; positions are integers from 0. An axis of width ``D_a`` has the frequencies
    ``theta ** (-2 i / D_a)``, ``i < D_a / 2``; the axes' angles are concatenated t | h | w.

    Args:
        grid: ``(T, H, W)`` tokens.
        axes: Widths of the three axes; their sum is the head's width.
        theta: Base of the frequencies.

    Returns:
        ``(cos, sin)``, each float32 ``[N, head_dim / 2]``, for the half-split layout (pairs are ``i`` and
        ``i + head_dim / 2``).
    """
    parts = []
    for axis, (size, width) in enumerate(zip(grid, axes, strict=True)):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.arange(size, dtype=np.float64)[:, None] * frequencies  # [size, width / 2]
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        parts.append(np.broadcast_to(angles.reshape(shape), (*grid, width // 2)))
    table = np.concatenate(parts, axis=-1).reshape(-1, sum(axes) // 2)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
