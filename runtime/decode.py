"""Final latents to frames: tile by tile, and in smaller tiles where the memory does not suffice.

Tiles are part of the numeric definition, so a change of tiles is said in the events, and made only from the window on
that failed. What was decoded is never decoded again, and an error carries the latents: none of the sampling is lost.
The module does not know where the engine comes from, nor what becomes of the frames.

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Engine
from reelforge.runtime.errors import EngineError, NotFiniteError, OutOfMemoryError, RequestError
from reelforge.runtime.events import Event, FloatArray, Frames, Notice, Progress
from reelforge.runtime.latents_file import kind_of
from reelforge.runtime.sampling import all_finite
from reelforge.runtime.tiling import TiledDecoder, smaller_tiles

if TYPE_CHECKING:
    from reelforge.runtime.spec import ModelSpec, VaeTiling

Lend = Callable[[], AbstractContextManager[Engine]]


class DecodingError(EngineError):
    """Decoding failed; what was sampled is not lost.

    Attributes:
        latents: The final latents ``[1, C, T, H, W]``, for ``Pipeline.decode``.
        frames: How many frames were finished before.
    """

    def __init__(
        self,
        where: str,
        latents: FloatArray,
        frames: int,
        *,
        received: object = None,
        expected: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(where, received=received, expected=expected, fix=fix)
        self.latents = latents
        self.frames = frames


def check_latents(latents: FloatArray, spec: ModelSpec) -> None:
    """Check that latents can be decoded.

    Raises:
        RequestError: If they are of another type or rank, or not finite.
    """
    channels = spec.vae.latent_channels
    shape = latents.shape if isinstance(latents, np.ndarray) and latents.dtype == np.float32 else ()
    if len(shape) != 5 or shape[:2] != (1, channels) or 0 in shape:
        raise RequestError(
            "the latents are not those of a video of this model.",
            received=kind_of(latents),
            expected=f"float32 [1, {channels}, frames, height, width]",
            fix="pass what --save-latents wrote for a bundle of the same model",
        )
    if not np.isfinite(latents).all():
        raise RequestError(
            "the latents are not finite numbers.",
            received=f"{int(np.count_nonzero(~np.isfinite(latents)))} of {latents.size} values",
            fix="sample them again",
        )


def decoding(
    latents: FloatArray, lend: Lend, spec: ModelSpec, stop: Stop, make_room: Callable[[], bool], saved: str = ""
) -> Generator[Event, None, None]:
    """Decode latents ``[1, C, T, H, W]``; progress after every tile, frames after every window.

    Args:
        latents: Final latents.
        lend: Lends the decoder's engine.
        spec: Gives tiles and compression factors.
        stop: Asked before every tile.
        make_room: Frees memory that others hold, and returns whether there was any.
        saved: Where the latents are on disk, for the message.

    Raises:
        DecodingError: If the engine fails, or the memory does not suffice for the smallest tiles.
        CancelledError: If ``stop`` ends it.
    """
    finished = 0
    try:
        for event in _events(latents, lend, spec, stop, make_room):
            if isinstance(event, Frames):
                finished = event.start + len(event.values)
            yield event
    except (EngineError, MemoryError) as error:
        known = error if isinstance(error, EngineError) else OutOfMemoryError("the machine is out of memory.")
        again = f"reelforge decode BUNDLE {saved} -o out.mp4" if saved else "Pipeline.decode(error.latents)"
        raise DecodingError(
            f"decoding failed after {finished} frames: {known.where}",
            latents,
            finished,
            received=known.received,
            expected=known.expected,
            fix=f"{known.fix + '; ' if known.fix else ''}the latents are kept: finish later with {again}",
        ) from error


def _events(
    latents: FloatArray, lend: Lend, spec: ModelSpec, stop: Stop, make_room: Callable[[], bool]
) -> Generator[Event, None, None]:
    done = total = first = done_before = 0
    tiling = spec.tiling
    with lend() as vae:

        def decode_tile(tile: FloatArray) -> FloatArray:
            stop.check(f"tile {done + 1} of {total}")
            frames: FloatArray = vae.run({"latent_tile": tile})["frame_tile"]
            if not all_finite(frames):  # as bytes they would be a picture, black or of nothing
                wrong = int(np.count_nonzero(~np.isfinite(frames)))
                raise NotFiniteError(
                    "stage 'vae_decoder' gave frames that are not finite numbers.",
                    received=f"{wrong} NaN or infinite of {frames.size} values of a tile",
                    fix="rebuild the bundle with --precision fp32, or check its parity with reelforge verify",
                )
            return frames

        decoder = TiledDecoder(latents, decode_tile, tiling, spec.vae)
        began_s = time.monotonic()  # with these tiles, after `done_before` others
        while decoder.finished < len(decoder.windows):
            total = done + _tiles_left(decoder, tiling)
            notice = ""
            try:
                for picture in decoder.window(tiling):
                    done += 1
                    pace_s = (time.monotonic() - began_s) / (done - done_before)
                    yield Progress("decoding", done, total, pace_s * (total - done))
                    if picture is not None:
                        yield from _frames(picture, first, spec.vae.temporal_compression)
                        first += picture.shape[2]
                    del picture  # the next window needs the room
            except (OutOfMemoryError, MemoryError):
                if make_room():
                    continue
                smaller = smaller_tiles(tiling, spec.tiling, (latents.shape[2], latents.shape[3], latents.shape[4]))
                if smaller is None:
                    raise
                notice = _change_of_tiles(tiling, smaller, first, latents, spec.vae.spatial_compression)
                tiling, done_before, began_s = smaller, done, time.monotonic()
            if notice:  # said here, because until the handler's end the error holds the tiles that did not fit
                yield Notice(notice)


def _tiles_left(decoder: TiledDecoder, tiling: VaeTiling) -> int:
    plan = decoder.plan(tiling)
    return plan.tiles // len(plan.windows) * (len(plan.windows) - decoder.finished)


def _frames(picture: FloatArray, first: int, count: int) -> Generator[Frames, None, None]:
    """Yield frames ``[1, 3, F, rows, columns]`` in [-1, 1], ``count`` at a time, as events."""
    for start in range(0, picture.shape[2], count):
        some = picture[0, :, start : start + count].transpose(1, 2, 3, 0)
        values = np.ascontiguousarray(some)
        values *= np.float32(0.5)
        values += np.float32(0.5)
        yield Frames(first + start, np.clip(values, 0.0, 1.0, out=values))


def _change_of_tiles(before: VaeTiling, after: VaeTiling, first: int, latents: FloatArray, compression: int) -> str:
    old, new = (
        "x".join(str(min(tiling.tile, side) * compression) for side in (latents.shape[4], latents.shape[3]))
        for tiling in (before, after)
    )
    return (
        f"there is too little memory to decode tiles of {old} pixels: from frame {first + 1} on they are of {new}, "
        "and the pictures differ a little from those of larger tiles"
    )
