"""What a generation says while it runs: progress, notices, and the frames themselves, in order.

The module knows the events' shapes and not what makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Progress:
    """Where a generation is.

    Attributes:
        phase: ``text``, ``conditioning``, ``sampling`` or ``decoding``.
        step: Finished units of the phase.
        total: Its units.
        eta_s: Seconds until the phase ends, from the pace so far; None before there is one.
        preview: uint8 ``[T, H, W, 3]``, what the latents look like so far; None where none was asked for.
        skipped: Sampling steps so far that reused earlier ones instead of evaluating the model.
    """

    phase: str
    step: int
    total: int
    eta_s: float | None = None
    preview: Pixels | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Notice:
    """A sentence for the user, for example that the prompt was cut."""

    text: str


@dataclass(frozen=True)
class Frames:
    """Frames that are final.

    Attributes:
        start: Number of the first one in the video, from 0.
        values: float32 ``[n, height, width, 3]``, RGB in [0, 1].
    """

    start: int
    values: FloatArray

    @property
    def pixels(self) -> Pixels:
        """The same as uint8, rounded to nearest."""
        return to_uint8(self.values)


Event = Progress | Notice | Frames


def to_uint8(frames: FloatArray) -> Pixels:
    """Return frames in [0, 1] as uint8, rounded to nearest."""
    rounded: Pixels = np.rint(frames * np.float32(255)).astype(np.uint8)
    return rounded
