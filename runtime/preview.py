"""What latents look like before they are decoded: a linear map from channels to colours, learned on the way.

From two consecutive latents of a step follows the velocity, ``v = (x' - x) / (sigma' - sigma)``, and from it what the
model expects at the end, ``x0 = x' - sigma' v``. Its channels become colours by the affine map that fits, in least
squares, what the decoder made of earlier latents of the same pipeline (each frame's 8 x 8 pixels averaged). Before
anything was decoded, the first principal component is shown in grey. The map knows no neighbours: a preview has the
latents' resolution, and colours are approximate. Nothing here is computed unless previews were asked for.

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reelforge.runtime.events import Event, FloatArray, Frames, Pixels, to_uint8
from reelforge.runtime.schedule import flow_match_sigmas

if TYPE_CHECKING:
    from reelforge.runtime.spec import VaeSpec

_RIDGE = 1e-6
"""Of the mean square of a channel: keeps the fit solvable where a video has fewer positions than channels."""


class ColourMap:
    """The map from channels to colours, as far as it is known. Any thread may use it."""

    def __init__(self, vae: VaeSpec) -> None:
        self._vae = vae
        size = vae.latent_channels + 1
        self._squares = np.zeros((size, size))
        self._products = np.zeros((size, 3))
        self._lock = threading.Lock()

    @property
    def is_known(self) -> bool:
        """Whether anything was decoded before."""
        return bool(self._squares[-1, -1])

    def learn(self, latents: FloatArray, frames: Frames) -> None:
        """Take decoded frames into account: of those that share a latent frame, the last.

        Args:
            latents: Final latents ``[1, C, T, H, W]`` of the whole video.
            frames: Some of its frames.
        """
        side = self._vae.spatial_compression
        for number, frame in enumerate(frames.values, frames.start):
            place, rest = divmod(number, self._vae.temporal_compression)  # the first latent frame is one frame
            if rest:
                continue
            channels = _with_one(latents[0, :, place])
            height, width, _ = frame.shape
            colours = frame.reshape(height // side, side, width // side, side, 3).mean(axis=(1, 3)).reshape(-1, 3)
            with self._lock:
                self._squares += channels.T @ channels
                self._products += channels.T @ colours

    def learning(self, latents: FloatArray, events: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """Pass on what a decoder says, and learn from its frames."""
        with closing(events):
            for event in events:
                if isinstance(event, Frames):
                    self.learn(latents, event)
                yield event

    def show(self, latents: FloatArray) -> Pixels:
        """Return latents ``[1, C, T, H, W]`` as uint8 ``[T, H, W, 3]``."""
        shape = latents.shape[2:]
        if not self.is_known:
            return np.repeat(_principal_component(latents).reshape(*shape, 1), 3, axis=3)
        with self._lock:
            squares, products = self._squares.copy(), self._products.copy()
        squares[np.diag_indices_from(squares)] += _RIDGE * np.trace(squares) / len(squares)
        weights = np.linalg.solve(squares, products).astype(np.float32)
        flat = latents[0].reshape(len(weights) - 1, -1)
        colours = weights[:-1].T @ flat
        colours += weights[-1][:, None]
        pixels = to_uint8(np.clip(colours, 0.0, 1.0, out=colours))
        return np.ascontiguousarray(pixels.T).reshape(*shape, 3)


class Previews:
    """Previews of one sampling run.

    Args:
        colours: What is known of colours.
        steps: Of the run.
        shift: Of its schedule.
    """

    def __init__(self, colours: ColourMap, steps: int, shift: float) -> None:
        self._colours = colours
        self._sigmas = flow_match_sigmas(steps, shift)

    def after(self, step: int, before: FloatArray, latents: FloatArray) -> Pixels:
        """Return what the model expected at the end, uint8 ``[T, H, W, 3]``.

        Args:
            step: The step that was done, from 0.
            before: Latents ``[1, C, T, H, W]`` before it.
            latents: And after it.
        """
        return self._colours.show(expected_end(before, latents, self._sigmas[step], self._sigmas[step + 1]))


def expected_end(before: FloatArray, after: FloatArray, sigma_before: float, sigma_after: float) -> FloatArray:
    """Return ``x0``, to which the straight line through two latents leads at noise level 0."""
    slope = np.float32(sigma_after / (sigma_after - sigma_before))
    end: FloatArray = after - slope * (after - before)
    return end


def _with_one(latents: FloatArray) -> NDArray[np.float64]:
    """Return ``[C, H, W]`` as float64 ``[H W, C + 1]``, the last column ones."""
    flat = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def _principal_component(latents: FloatArray) -> Pixels:
    """Return the direction in which channels vary most, as grey, uint8 ``[T H W]``; equal latents are black."""
    flat = latents[0].reshape(latents.shape[1], -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    axis = vectors[:, -1]
    axis = axis * np.sign(axis[np.argmax(np.abs(axis))])  # eigenvectors have no sign: without one, previews would blink
    values = axis.astype(np.float32) @ centred
    low, high = float(values.min()), float(values.max())
    return to_uint8((values - low) / max(high - low, 1e-20))
