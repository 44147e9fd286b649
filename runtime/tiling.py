"""Tiled decoding: which latent tiles are decoded, and how their frames are blended (specification 5.2).

The tiles are part of the numeric definition, since the decoder's GroupNorm sees whole tiles. The procedure is Tencent's
and equals diffusers' with equal parameters. Frames are yielded as soon as they are final, one batch per temporal
window, so that a video streams to its file. Of finished neighbours only the strips that later tiles need are kept.

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns, ``F`` decoded frames. A decoded tile is
``[1, 3, F, rows, columns]``. The module does not know what decodes a tile, nor the range of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.spec import VaeSpec, VaeTiling

FloatArray = NDArray[np.float32]
TileDecoder = Callable[[FloatArray], FloatArray]

_FRAMES, _ROWS, _COLUMNS = 2, 3, 4  # axes of a decoded tile


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of one video lie, in latents; each entry is ``(start, stop)``.

    Without temporal tiling there is one window; without spatial tiling one row and one column.
    """

    windows: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]

    @property
    def tiles(self) -> int:
        """How often the decoder is called."""
        return len(self.windows) * len(self.rows) * len(self.columns)


def plan_tiles(latent_shape: tuple[int, int, int], tiling: VaeTiling) -> TilePlan:
    """Lay out the tiles of latents of ``(T, H, W)``.

    More than ``frame_window`` latent frames are decoded in windows of up to ``frame_window + 1`` that start at
    multiples of ``frame_stride``. A last window of one latent frame is left out: its one decoded frame is the one that
    every window but the first drops. If either side exceeds ``tile``, both sides are cut into tiles that start at
    multiples of ``stride``, and are smaller at the far border.
    """
    frames, height, width = latent_shape
    windows: tuple[tuple[int, int], ...] = ((0, frames),)
    if frames > tiling.frame_window:
        starts = range(0, frames, tiling.frame_stride)
        windows = tuple((start, min(start + tiling.frame_window + 1, frames)) for start in starts)
        windows = tuple(window for window in windows if window[0] == 0 or window[1] - window[0] > 1)
    if height <= tiling.tile and width <= tiling.tile:
        return TilePlan(windows, ((0, height),), ((0, width),))
    return TilePlan(windows, _spans(height, tiling), _spans(width, tiling))


def decode_tiled(latents: FloatArray, decode: TileDecoder, tiling: VaeTiling, vae: VaeSpec) -> Iterator[FloatArray]:
    """Decode latents tile by tile.

    Args:
        latents: ``[1, C, T, H, W]``; tiles of it are passed on as views.
        decode: ``[1, C, t, h, w]`` to a new array ``[1, 3, temporal_compression * (t - 1) + 1,
            spatial_compression * h, spatial_compression * w]``, which is blended in place.
        tiling: The tiles.
        vae: Gives the two compression factors.

    Yields:
        ``[1, 3, F, rows, columns]`` of the whole picture, in order; the first batch has one frame more than the others.
    """
    plan = plan_tiles((latents.shape[2], latents.shape[3], latents.shape[4]), tiling)
    overlap = (tiling.frame_window - tiling.frame_stride) * vae.temporal_compression
    kept = tiling.frame_stride * vae.temporal_compression
    tail: FloatArray | None = None
    for start, stop in plan.windows:
        frames = _decode_window(latents[:, :, start:stop], decode, plan, tiling, vae.spatial_compression)
        if tail is not None:
            frames = frames[:, :, 1:]  # a window's first frame has no past to be decoded from; the tile before has it
            _blend(tail, frames, _FRAMES, overlap)
        tail = _last(frames, _FRAMES, overlap) if (start, stop) != plan.windows[-1] else None
        if len(plan.windows) == 1:
            yield frames
        else:
            yield frames[:, :, : kept + (1 if start == 0 else 0)]


def _spans(size: int, tiling: VaeTiling) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + tiling.tile, size)) for start in range(0, size, tiling.stride))


def _decode_window(
    latents: FloatArray, decode: TileDecoder, plan: TilePlan, tiling: VaeTiling, compression: int
) -> FloatArray:
    """Decode one temporal window: tiles in raster order, each blended with the one above, then the one to its left.

    The neighbours are the already blended and uncropped tiles. A finished tile is cropped into the picture at once; the
    strip along its lower and right border is copied before that.
    """
    if len(plan.rows) == 1 and len(plan.columns) == 1:
        return decode(latents)
    overlap = (tiling.tile - tiling.stride) * compression
    kept = tiling.stride * compression
    picture: FloatArray | None = None
    above: list[FloatArray] = []
    for row, (top, bottom) in enumerate(plan.rows):
        strips = []
        left: FloatArray | None = None
        for column, (near, far) in enumerate(plan.columns):
            tile = decode(latents[..., top:bottom, near:far])
            if row > 0:
                _blend(above[column], tile, _ROWS, overlap)
            if left is not None:
                _blend(left, tile, _COLUMNS, overlap)
            strips.append(_last(tile, _ROWS, overlap))
            left = _last(tile, _COLUMNS, overlap)
            if picture is None:
                size = (plan.rows[-1][1] * compression, plan.columns[-1][1] * compression)
                picture = np.empty((*tile.shape[:3], *size), np.float32)
            y, x = top * compression, near * compression
            picture[..., y : y + kept, x : x + kept] = tile[..., :kept, :kept]
        above = strips
    assert picture is not None
    return picture


def _last(tile: FloatArray, axis: int, count: int) -> FloatArray:
    """Copy the last ``count`` slices along ``axis`` (all, if there are fewer), so that the tile itself can be freed."""
    index = [slice(None)] * tile.ndim
    index[axis] = slice(max(tile.shape[axis] - count, 0), None)
    return tile[tuple(index)].copy()


def _blend(before: FloatArray, tile: FloatArray, axis: int, overlap: int) -> None:
    """Fade from ``before`` into ``tile``, in place.

    Over ``E = min(both sizes, overlap)``: ``tile[k] = before[-E + k] * (1 - k / E) + tile[k] * k / E``.
    """
    extent = min(before.shape[axis], tile.shape[axis], overlap)
    if extent == 0:
        return
    index = [slice(None)] * tile.ndim
    index[axis] = slice(0, extent)
    head = tile[tuple(index)]
    index[axis] = slice(before.shape[axis] - extent, None)
    shape = [1] * tile.ndim
    shape[axis] = extent
    ramp = (np.arange(extent, dtype=np.float64) / extent).reshape(shape)
    head *= ramp.astype(np.float32)
    head += before[tuple(index)] * (1.0 - ramp).astype(np.float32)
