"""The world of the demonstration model: one coloured shape, one motion, one plain background.

A clip is a soft-edged coverage mask that blends an object colour over a background colour:
``pixel = background + mask * (colour - background)``. So masks are rendered once per (shape, motion, place) and every
colour pair follows by arithmetic. This module knows nothing about latents, networks or checking.

Shapes: ``T`` frames, ``H`` ``W`` pixels, values in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SIZE = 64
FRAMES = 9
EDGE_PIXELS = 3.0
SPEED_PIXELS = 2.0
GROWTH_PIXELS = 1.0
GROWTH_START_RADIUS = 8.0
# Where objects start, (x, y) in pixels, and how large they are. The transformer's world has few places, all on the
# latent cells' 8-pixel grid; the decoder is trained on a fine grid and off it.
STARTS: dict[str, tuple[tuple[int, int], ...]] = {
    "right": ((24, 16), (24, 32), (24, 48)),
    "left": ((40, 16), (40, 32), (40, 48)),
    "up": ((16, 40), (32, 40), (48, 40)),
    "down": ((16, 24), (32, 24), (48, 24)),
    "grow": ((24, 24), (32, 32), (40, 40)),
    "still": ((16, 16), (48, 16), (32, 32), (16, 48), (48, 48)),
}
RADII = (12.0,)
FINE_MARKS = tuple(range(16, 49, 4))
FINE_RADII = (11.0, 13.0)

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.12, 0.20, 0.92),
    "orange": (1.00, 0.58, 0.02),
    "magenta": (0.85, 0.15, 0.80),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.55, 0.55, 0.55),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS: dict[str, tuple[str, str]] = {
    "right": ("moving right", "moves right"),
    "left": ("moving left", "moves left"),
    "up": ("moving up", "moves up"),
    "down": ("moving down", "moves down"),
    "grow": ("growing", "grows"),
    "still": ("standing still", "stands still"),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "grow": (0, 0), "still": (0, 0)}


@dataclass(frozen=True, order=True)
class Scene:
    """What a prompt asks for.

    Attributes:
        colour: a key of ``COLOURS``.
        shape: one of ``SHAPES``.
        motion: a key of ``MOTIONS``.
        background: a key of ``BACKGROUNDS``.
    """

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this colour x shape x motion never occurs in training (one colour in five per shape and motion)."""
        index = list(COLOURS).index(self.colour)
        shift = 2 * SHAPES.index(self.shape) + list(MOTIONS).index(self.motion)
        return (index + shift) % len(COLOURS) == 0

    def captions(self) -> tuple[str, ...]:
        """Return every phrasing of this scene for a clip, the plainest first."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        continuous, present = MOTIONS[self.motion]
        thing = f"{article} {self.colour} {self.shape}"
        return (
            f"{thing} {continuous} on a {self.background} background",
            f"{thing} {present} on a {self.background} background",
            f"{self.background} background, {thing} {continuous}",
        )

    def image_caption(self) -> str:
        """Return the phrasing for a single image, which names no motion."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"


@dataclass(frozen=True)
class Placement:
    """One trajectory of the object.

    Attributes:
        shape: one of ``SHAPES``.
        motion: a key of ``MOTIONS``.
        x: centre in the first frame, pixels from the left.
        y: centre in the first frame, pixels from the top.
        radius: size in the first frame, pixels.
    """

    shape: str
    motion: str
    x: float
    y: float
    radius: float

    def at(self, frame: int) -> tuple[float, float, float]:
        """Return (x, y, radius) in pixels at ``frame``."""
        step_x, step_y = DIRECTIONS[self.motion]
        growth = GROWTH_PIXELS * frame if self.motion == "grow" else 0.0
        travel = SPEED_PIXELS * frame
        return self.x + step_x * travel, self.y + step_y * travel, self.radius + growth


def scenes() -> list[Scene]:
    """Return all scenes in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)]


def signed_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Return the distance to the outline in pixels, negative inside.

    Args:
        shape: one of ``SHAPES``.
        x: horizontal offset from the centre, pixels, any shape.
        y: vertical offset from the centre (down is positive), pixels, same shape.
        radius: nominal radius, pixels.

    Raises:
        ValueError: for a shape that is not in ``SHAPES``.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif shape == "triangle":
        lowered = y - 0.3 * radius
        slanted = np.abs(x) * np.cos(np.pi / 6) - lowered * np.sin(np.pi / 6)
        distance = np.maximum(slanted, lowered) - 0.6 * radius
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
    else:
        raise ValueError(f"unknown shape\n  received: {shape!r}   expected: one of {SHAPES}")
    return distance.astype(np.float32)


def render_shape(shape: str, x: float, y: float, radius: float) -> Array:
    """Return the coverage [H, W] in [0, 1] of one object with edges that are ``EDGE_PIXELS`` wide."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + np.float32(0.5)
    distance = signed_distance(shape, columns - np.float32(x), rows - np.float32(y), radius)
    coverage: Array = np.clip(0.5 - distance / EDGE_PIXELS, 0.0, 1.0).astype(np.float32)
    return coverage


def render_mask(placement: Placement, frames: int = FRAMES) -> Array:
    """Return the coverage [T, H, W] of an object along its trajectory."""
    return np.stack([render_shape(placement.shape, *placement.at(frame)) for frame in range(frames)])


def colourise(mask: Array, colour: str, background: str) -> Array:
    """Return the clip [T, 3, H, W] in [0, 1] that paints ``mask`` [T, H, W] in ``colour`` over ``background``."""
    front = np.asarray(COLOURS[colour], np.float32)[None, :, None, None]
    back = np.asarray(BACKGROUNDS[background], np.float32)[None, :, None, None]
    return back + mask[:, None] * (front - back)


def _fine_starts(motion: str) -> Iterator[tuple[int, int]]:
    """Yield the marks of the fine grid from which the object stays inside the picture."""
    travel = round(SPEED_PIXELS * (FRAMES - 1))
    for x, y in itertools.product(FINE_MARKS, FINE_MARKS):
        if motion == "grow":
            inside = min(x, y) >= 20 and max(x, y) <= 44
        else:
            step_x, step_y = DIRECTIONS[motion]
            inside = {x + travel * step_x, y + travel * step_y} <= set(FINE_MARKS)
        if inside:
            yield x, y


def placements(shape: str, motion: str, fine: bool = False) -> list[Placement]:
    """Return every trajectory of one shape and motion, in a fixed order; ``fine`` for the decoder's fine grid."""
    starts = list(_fine_starts(motion)) if fine else STARTS[motion]
    radii = (GROWTH_START_RADIUS,) if motion == "grow" else FINE_RADII if fine else RADII
    return [Placement(shape, motion, x, y, radius) for (x, y), radius in itertools.product(starts, radii)]


def jittered(placement: Placement, rng: np.random.Generator) -> Placement:
    """Return ``placement`` moved off the marks by up to 2 pixels and resized by up to 1 pixel.

    The decoder is trained on these too, so that it does not depend on the marks.
    """
    shift_x, shift_y = rng.uniform(-2.0, 2.0, 2)
    radius = placement.radius + rng.uniform(-1.0, 1.0)
    return Placement(placement.shape, placement.motion, placement.x + shift_x, placement.y + shift_y, radius)
