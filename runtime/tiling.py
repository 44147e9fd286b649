"""Tiled decoding: which latent tiles are decoded, and how their frames are blended (specification 5.2).

The tiles are part of the numeric definition, since the decoder's GroupNorm sees whole tiles. The procedure is Tencent's
and equals diffusers' with equal parameters. Frames are yielded as soon as they are final, when the last tile of their
temporal window is done, so that a video streams to its file. Of finished neighbours only the strips that later tiles
need are kept, and of finished windows only the frames that the next one is faded into.

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns, ``F`` decoded frames. A decoded tile is
``[1, 3, F, rows, columns]``. The module does not know what decodes a tile, nor the range of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
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


def smaller_tiles(tiling: VaeTiling, defined: VaeTiling, latent_shape: tuple[int, int, int]) -> VaeTiling | None:
    """Return tiles of half the side, which take about a quarter of the memory; None where that is no decoder any more.

    The temporal windows stay as they are, so that a video can change its tiles from one window to the next. Below a
    quarter of the defined side nothing is offered: what GroupNorm would see has little to do with the picture.

    Args:
        tiling: The tiles that were too large.
        defined: The model's own; their proportion of overlap is kept.
        latent_shape: ``(T, H, W)``; tiles that exceed the picture are halved until they cut it.
    """
    tile = (min(tiling.tile, max(latent_shape[1:])) + 1) // 2
    if tile * 4 < defined.tile or tile < 2:
        return None
    return replace(tiling, tile=tile, stride=max(tile * defined.stride // defined.tile, 1))


def decode_tiled(latents: FloatArray, decode: TileDecoder, tiling: VaeTiling, vae: VaeSpec) -> Iterator[FloatArray]:
    """Decode latents tile by tile; :class:`TiledDecoder` without a choice between tiles.

    Args:
        latents: ``[1, C, T, H, W]``; tiles of it are passed on as views.
        decode: See :class:`TiledDecoder`.
        tiling: The tiles.
        vae: Gives the two compression factors.

    Yields:
        ``[1, 3, F, rows, columns]`` of the whole picture, in order; the first batch has one frame more than the others.
    """
    decoder = TiledDecoder(latents, decode, tiling, vae)
    for _ in decoder.windows:
        for picture in decoder.window(tiling):
            if picture is not None:
                yield picture


class TiledDecoder:
    """Decodes one video window by window.

    At any time it holds one window of the picture and the frames that the next window is faded into (twice while a
    window is decoded, so that a window that fails can be decoded again), however long the video is.

    Args:
        latents: ``[1, C, T, H, W]``; tiles of it are passed on as views.
        decode: ``[1, C, t, h, w]`` to a new array ``[1, 3, temporal_compression * (t - 1) + 1,
            spatial_compression * h, spatial_compression * w]``, which is blended in place.
        tiling: Gives the windows.
        vae: Gives the two compression factors.

    Attributes:
        windows: The temporal windows, in latent frames.
        finished: How many of them are done.
    """

    def __init__(self, latents: FloatArray, decode: TileDecoder, tiling: VaeTiling, vae: VaeSpec) -> None:
        self._latents = latents
        self._decode = decode
        self._compression = vae.spatial_compression
        self._overlap = (tiling.frame_window - tiling.frame_stride) * vae.temporal_compression
        self._kept = tiling.frame_stride * vae.temporal_compression
        self._tail: FloatArray | None = None
        self.windows = self.plan(tiling).windows
        self.finished = 0

    def plan(self, tiling: VaeTiling) -> TilePlan:
        """Return where the tiles lie."""
        return plan_tiles((self._latents.shape[2], self._latents.shape[3], self._latents.shape[4]), tiling)

    def window(self, tiling: VaeTiling) -> Iterator[FloatArray | None]:
        """Decode the next window: tiles in raster order, each blended with the one above, then the one to its left.

        The neighbours are the already blended and uncropped tiles. A finished tile is cropped, blended with the window
        before, and put into the picture at once; the strip along its lower and right border is copied before that. A
        window that fails or is left halfway can be asked for again, with other tiles.

        Args:
            tiling: How the picture is cut; its windows must be those of the decoder.

        Yields:
            None after each tile but the last, then the finished frames ``[1, 3, F, rows, columns]``.
        """
        plan = self.plan(tiling)
        assert plan.windows == self.windows
        start, stop = self.windows[self.finished]
        whole = len(plan.rows) == 1 and len(plan.columns) == 1
        overlap = 0 if whole else (tiling.tile - tiling.stride) * self._compression
        picture = _Picture(plan, self._compression, self._tail)
        above: list[FloatArray] = []
        for row, (top, bottom) in enumerate(plan.rows):
            strips = []
            left: FloatArray | None = None
            for column, (near, far) in enumerate(plan.columns):
                if row or column:
                    yield None
                tile = self._decode(self._latents[:, :, start:stop, top:bottom, near:far])
                if row > 0:
                    _blend(above[column], tile, _ROWS, overlap)
                if left is not None:
                    _blend(left, tile, _COLUMNS, overlap)
                strips.append(_last(tile, _ROWS, overlap))
                left = _last(tile, _COLUMNS, overlap)
                kept = None if whole else tiling.stride * self._compression
                picture.put(tile[..., :kept, :kept], top, near, self._overlap, self._frames_kept)
                del tile
            above = strips
        self.finished += 1
        assert picture.frames is not None
        frames, self._tail = picture.frames, picture.tail if self.finished < len(self.windows) else None
        del picture
        yield frames

    @property
    def _frames_kept(self) -> int | None:
        """How many frames of the next window are final; the others are in the window after it."""
        if len(self.windows) == 1:
            return None
        return self._kept + (1 if self.finished == 0 else 0)


class _Picture:
    """The final frames of one window, and those that fade into the next, as they are put together from tiles."""

    def __init__(self, plan: TilePlan, compression: int, before: FloatArray | None) -> None:
        self._size = (plan.rows[-1][1] * compression, plan.columns[-1][1] * compression)
        self._compression = compression
        self._before = before
        self.frames: FloatArray | None = None
        self.tail: FloatArray | None = None

    def put(self, tile: FloatArray, top: int, near: int, overlap: int, kept: int | None) -> None:
        """Put a tile, which lies at ``top`` and ``near`` in latents, where it belongs."""
        y, x = top * self._compression, near * self._compression
        place = (..., slice(y, y + tile.shape[_ROWS]), slice(x, x + tile.shape[_COLUMNS]))
        if self._before is not None:
            tile = tile[:, :, 1:]  # a window's first frame has no past to be decoded from; the tile before has it
            _blend(self._before[place], tile, _FRAMES, overlap)
        final = tile[:, :, :kept]
        fading = tile[:, :, max(tile.shape[_FRAMES] - overlap, 0) :]
        if self.frames is None or self.tail is None:
            self.frames = np.empty((*final.shape[:3], *self._size), np.float32)
            self.tail = np.empty((*fading.shape[:3], *(self._size if kept is not None else (0, 0))), np.float32)
        self.frames[place] = final
        if kept is not None:
            self.tail[place] = fading


def _spans(size: int, tiling: VaeTiling) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + tiling.tile, size)) for start in range(0, size, tiling.stride))


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
