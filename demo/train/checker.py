"""Rule-based judge of a clip: which background, colour, shape and motion does it show?

The judge never sees the prompt while it looks; ``compare`` sets its findings beside a scene afterwards. An attribute
that the clip does not show clearly is None, which counts as wrong. Knows the world's palette and outlines (``data``)
and nothing about the model.

Shapes: ``T`` frames, ``H`` ``W`` pixels. Pixels in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.measure import label

from demo.train import data
from demo.train.data import Array

PALETTE_TOLERANCE = 0.2
FAINT_COVERAGE = 0.2
MIN_AREA_PIXELS = 60.0
MIN_OVERLAP = 0.8
MIN_SOLID_SHARE = 0.9
MIN_TRAVEL_PIXELS = 8.0
MAX_STRAY_PIXELS = 4.0
MAX_STILL_PIXELS = 2.5
MIN_GROWTH = 1.4
MAX_STEADY_GROWTH = 1.2
# Area of each outline at radius 1, and how far its centroid lies below its centre.
UNIT_AREA = {"circle": np.pi, "square": 1.8**2, "triangle": 3 * 3**0.5 * 0.6**2, "ring": 0.75 * np.pi}
CENTROID_DROP = {"circle": 0.0, "square": 0.0, "triangle": 0.3, "ring": 0.0}


@dataclass(frozen=True)
class Findings:
    """What a clip shows; None where it shows nothing clear. ``motion`` is also None for a single image."""

    background: str | None = None
    colour: str | None = None
    shape: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Score:
    """Which attributes agree with the prompt. For a single image ``motion`` is True: it is not asked for."""

    background: bool
    colour: bool
    shape: bool
    motion: bool

    @property
    def together(self) -> bool:
        """Whether all four agree."""
        return self.background and self.colour and self.shape and self.motion


def _nearest(value: Array, palette: dict[str, tuple[float, float, float]]) -> str | None:
    """Return the palette's nearest name to an RGB value [3], or None when even that is far."""
    distances = {name: float(np.linalg.norm(value - np.asarray(entry))) for name, entry in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= PALETTE_TOLERANCE else None


def _border(clip: Array) -> Array:
    """Return the outermost pixels of every frame of [T, 3, H, W] as rows [P, 3]."""
    edges = (clip[:, :, 0], clip[:, :, -1], clip[:, :, :, 0], clip[:, :, :, -1])
    return np.concatenate([edge.transpose(0, 2, 1).reshape(-1, 3) for edge in edges])


def _coverage(clip: Array, back: Array) -> tuple[Array, Array] | None:
    """Return (object colour [3], coverage [T, H, W] in [0, 1]) of a clip over ``back`` [3], or None without object."""
    difference = np.linalg.norm(clip - back[None, :, None, None], axis=1)
    strongest = float(np.quantile(difference, 0.99))
    if strongest < 0.2:
        return None
    front = np.median(clip.transpose(0, 2, 3, 1)[difference > 0.75 * strongest], axis=0)
    contrast = front - back
    coverage = np.tensordot(clip - back[None, :, None, None], contrast, axes=([1], [0])) / float(contrast @ contrast)
    return front, np.where(coverage < FAINT_COVERAGE, 0.0, np.clip(coverage, 0.0, 1.0)).astype(np.float32)


def _moments(mask: Array) -> tuple[float, float, float]:
    """Return (area, x, y) of a coverage [H, W]; the centroid in pixels from the left and the top."""
    area = float(mask.sum())
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]] + 0.5
    if area <= 0.0:
        return 0.0, 0.0, 0.0
    return area, float((mask * columns).sum()) / area, float((mask * rows).sum()) / area


def _overlaps(mask: Array) -> dict[str, float]:
    """Return, for each outline fitted by area and centroid to [H, W], intersection over union of the coverages."""
    area, x, y = _moments(mask)
    result = {}
    for shape in data.SHAPES:
        radius = (area / UNIT_AREA[shape]) ** 0.5
        fitted = data.render_shape(shape, x, y - CENTROID_DROP[shape] * radius, radius)
        result[shape] = float(np.minimum(mask, fitted).sum() / np.maximum(mask, fitted).sum())
    return result


def _solid(mask: Array) -> bool:
    """Whether nearly all of a coverage [H, W] is one piece."""
    pieces = label(mask > 0.5, connectivity=1)
    if pieces.max() == 0:
        return False
    sizes = np.bincount(pieces.ravel())[1:]
    return float(sizes.max()) >= MIN_SOLID_SHARE * float(sizes.sum())


def _shape(coverage: Array) -> str | None:
    """Return the outline that fits best in at least two thirds of the frames of [T, H, W], and well on average."""
    if any(mask.sum() < MIN_AREA_PIXELS or not _solid(mask) for mask in coverage):
        return None
    overlaps = [_overlaps(mask) for mask in coverage]
    votes = [max(overlap, key=overlap.__getitem__) for overlap in overlaps]
    winner = max(set(votes), key=votes.count)
    mean = float(np.mean([overlap[winner] for overlap in overlaps]))
    return winner if votes.count(winner) * 3 >= 2 * len(votes) and mean >= MIN_OVERLAP else None


def _motion(coverage: Array) -> str | None:
    """Return the motion of a coverage [T, H, W] from its centroids and areas."""
    moments = np.array([_moments(mask) for mask in coverage])
    areas, path = moments[:, 0], moments[:, 1:]
    if areas.min() < MIN_AREA_PIXELS:
        return None
    travel = path[-1] - path[0]
    straight = path[0] + np.linspace(0.0, 1.0, len(path))[:, None] * travel
    if float(np.abs(path - straight).max()) > MAX_STRAY_PIXELS:
        return None
    growth = float(np.sqrt(areas[-1] / areas[0]))
    steady = 1 / MAX_STEADY_GROWTH <= growth <= MAX_STEADY_GROWTH
    if growth >= MIN_GROWTH:
        return "grow" if float(np.abs(travel).max()) <= MAX_STRAY_PIXELS else None
    if not steady:
        return None
    if float(np.abs(travel).max()) <= MAX_STILL_PIXELS:
        return "still"
    for name, direction in data.DIRECTIONS.items():
        along = float(travel @ np.asarray(direction))
        across = float(np.abs(travel - along * np.asarray(direction)).max())
        if along >= MIN_TRAVEL_PIXELS and across <= MAX_STRAY_PIXELS:
            return name
    return None


def inspect(clip: Array) -> Findings:
    """Judge a clip [T, 3, H, W].

    Raises:
        ValueError: if the clip is not four-dimensional with three channels.
    """
    if clip.ndim != 4 or clip.shape[1] != 3:
        raise ValueError(f"not a clip\n  received: shape {clip.shape}   expected: [T, 3, H, W]")
    border = _border(clip)
    back = np.median(border, axis=0).astype(np.float32)
    plain = float((np.linalg.norm(border - back, axis=1) <= PALETTE_TOLERANCE).mean()) >= 0.9
    background = _nearest(back, data.BACKGROUNDS) if plain else None
    found = _coverage(clip, back)
    if found is None:
        return Findings(background=background)
    front, coverage = found
    motion = _motion(coverage) if len(clip) > 1 else None
    return Findings(background, _nearest(front, data.COLOURS), _shape(coverage), motion)


def compare(findings: Findings, scene: data.Scene, image: bool = False) -> Score:
    """Set findings beside what was asked for."""
    return Score(
        findings.background == scene.background,
        findings.colour == scene.colour,
        findings.shape == scene.shape,
        image or findings.motion == scene.motion,
    )
