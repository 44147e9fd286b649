"""Tencent's tiled decoding, restated in float64 from the specification (5.2): what our tiling is compared with.

Independent of ``reelforge.runtime.tiling``: whole tiles in lists, blended in place, cropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.spec import VaeTiling

Array = NDArray[Any]


def tencent_decode(z: Array, decode: Callable[[Array], Array], tiling: VaeTiling, spatial: int, temporal: int) -> Array:
    """``AutoencoderKLCausal3D.temporal_tiled_decode`` of Tencent's package, restated in float64 with its own names.

    There, tiles overlap by a factor: ``tile_overlap_factor`` of the tile's size in latents and pixels.

    Args:
        z: Latents [1, C, T, H, W].
        decode: Decodes one tile to float64 frames.
        tiling: Sizes of tiles in latents.
        spatial: Pixels per latent in height and width.
        temporal: Frames per latent.
    """
    tile_latent_min_size, tile_sample_min_size = tiling.tile, tiling.tile * spatial
    overlap_size = tiling.stride
    blend_extent = (tiling.tile - tiling.stride) * spatial
    row_limit = tile_sample_min_size - blend_extent
    tile_latent_min_tsize, tile_sample_min_tsize = tiling.frame_window, tiling.frame_window * temporal
    overlap_tsize = tiling.frame_stride
    t_blend_extent = (tiling.frame_window - tiling.frame_stride) * temporal
    t_limit = tile_sample_min_tsize - t_blend_extent

    def blend(a: Array, b: Array, extent: int, axis: int) -> Array:
        a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        extent = min(len(a), len(b), extent)
        for k in range(extent):
            b[k] = a[-extent + k] * (1 - k / extent) + b[k] * (k / extent)
        return np.moveaxis(b, 0, axis)

    def spatial_tiled_decode(z: Array) -> Array:
        rows = [
            [
                decode(z[..., i : i + tile_latent_min_size, j : j + tile_latent_min_size])
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

    def one(z: Array) -> Array:
        if z.shape[-1] > tile_latent_min_size or z.shape[-2] > tile_latent_min_size:
            return spatial_tiled_decode(z)
        return decode(z)

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
